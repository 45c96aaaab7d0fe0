"""The loss head against transformers' own loss, torch's cross-entropy and torch's AdamW: every option, every timing."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from gradfold import FoldError, WorkingSet, linear_cross_entropy, linear_log_probs
from gradfold.backends import uses
from gradfold.modules import head, sweep
from tests.zoo import CHECKPOINTS, RULES, distance, no_gradients, ours, torchs, twins

CLOSE = 1e-12
V, H, B, T = 37, 6, 2, 11  # the vocabulary is no multiple of a block of 7


@pytest.fixture(autouse=True, params=["again", "kept"])
def small_blocks(monkeypatch, request):
    """Logits are computed again, or what follows from them is kept; a block is seven words."""
    monkeypatch.setattr(head, "KEEP_BYTES", {"again": 0, "kept": 2**20}[request.param])
    for module in (sweep, uses):
        for name in ("TILE_BYTES", "HEAD_BYTES", "ROW_BYTES"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 100)
    monkeypatch.setattr(uses, "MIN_HEAD_ROWS", 7)


def some(*shape, dtype=torch.float64, seed=0, scale=1.0):
    made = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(dtype).requires_grad_()


def words(*shape, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def torchs_losses(x, weight, labels, bias=None, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """From logits in memory, by torch's own functions."""
    logits = F.linear(x, weight, bias).flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    losses = F.cross_entropy(logits, labels.flatten(), label_smoothing=label_smoothing, reduction="none")
    return losses + z_loss * (labels.flatten() != -100).to(losses) * logits.logsumexp(-1) ** 2


def gap(found, wanted):
    return float(torch.stack([(a - b).detach().abs().max() for a, b in zip(found, wanted, strict=True)]).max())


# the function, with no fold -------------------------------------------------------------------------------------------

OPTIONS = [
    dict(zip(("label_smoothing", "z_loss", "softcap"), row, strict=True))
    for row in itertools.product([0.0, 0.1], [0.0, 1e-2], [None, 1.5])
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda row: "-".join(map(str, row.values())))


@each_option
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "items"])
def test_loss_and_gradients_are_torchs(options, with_bias, reduction):
    leaves = [some(B, T, H), some(V, H, seed=1), *([some(V, seed=2)] if with_bias else [])]
    x, weight, bias = leaves if with_bias else (*leaves, None)
    labels = words(B, T)
    wanted = torchs_losses(x, weight, labels, bias, **options)
    if reduction == "items":
        found = linear_cross_entropy(x, weight, labels, bias=bias, num_items=torch.tensor(5), **options)
        wanted = wanted.sum() / 5
    else:
        found = linear_cross_entropy(x, weight, labels, bias=bias, reduction=reduction, **options)
        wanted = {"mean": wanted.sum() / (labels != -100).sum(), "sum": wanted.sum(), "none": wanted.view(B, T)}[
            reduction
        ]
    assert found.shape == wanted.shape and found.dtype == torch.float64
    weights = some(*wanted.shape, seed=3).detach()  # what arrives for each token differs
    got = torch.autograd.grad(found, leaves, weights)
    assert gap([found, *got], [wanted, *torch.autograd.grad(wanted, leaves, weights)]) <= CLOSE


def test_log_probabilities():
    x, weight, labels = some(B, T, H), some(V, H, seed=1), words(B, T, ignored=0)
    wanted = F.log_softmax(x @ weight.t(), -1).gather(-1, labels[..., None]).squeeze(-1)
    assert gap([linear_log_probs(x, weight, labels)], [wanted]) <= CLOSE


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(tokens):
    x, weight, labels = some(tokens, H), some(V, H, seed=1), words(tokens, ignored=0)
    found = linear_cross_entropy(x, weight, labels, reduction="sum")
    found.backward()
    wanted = torchs_losses(x, weight, labels).sum()
    assert gap([found, x.grad.sum(0), weight.grad], [wanted, *_sums(wanted, x, weight)]) <= CLOSE


def _sums(loss, x, weight):
    by_x, by_weight = torch.autograd.grad(loss, (x, weight))
    return by_x.sum(0), by_weight


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), 3])
def test_all_ignored_is_zero_and_not_nan(num_items):
    x, weight, labels = some(B, T, H), some(V, H, seed=1), torch.full((B, T), -100)
    loss = linear_cross_entropy(x, weight, labels, num_items=num_items, label_smoothing=0.1, z_loss=0.1, softcap=2.0)
    loss.backward()
    assert float(loss.detach()) == 0 and not x.grad.any() and not weight.grad.any()


def test_another_ignored_word():
    x, weight, labels = some(T, H), some(V, H, seed=1), words(T, ignored=0)
    labels[:4] = 5
    found = linear_cross_entropy(x, weight, labels, ignore_index=5)
    wanted = F.cross_entropy(x @ weight.t(), labels, ignore_index=5)
    assert (
        gap([found, *torch.autograd.grad(found, (x, weight))], [wanted, *torch.autograd.grad(wanted, (x, weight))])
        <= CLOSE
    )


def test_words_that_are_masked_out():
    """A bias of minus infinity, over whole blocks of the vocabulary."""
    x, weight, labels = some(T, H), some(V, H, seed=1), words(T).clamp(max=5)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[6:] = -torch.inf
    for order in (torch.arange(V), torch.arange(V).flip(0)):
        at = torch.where(labels < 0, labels, order.argsort()[labels.clamp(min=0)])
        w = weight[order]
        found = linear_cross_entropy(x, w, at, bias=bias[order])
        wanted = F.cross_entropy(F.linear(x, w, bias[order]), at)
        assert (
            gap(
                [found, *torch.autograd.grad(found, (x, weight), retain_graph=True)],
                [wanted, *torch.autograd.grad(wanted, (x, weight), retain_graph=True)],
            )
            <= CLOSE
        )


def test_large_logits():
    x, weight, labels = some(T, H, scale=300.0), some(V, H, seed=1), words(T)
    found, wanted = linear_cross_entropy(x, weight, labels), F.cross_entropy(x @ weight.t(), labels)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-14)
    assert gap(torch.autograd.grad(found, (x, weight)), torch.autograd.grad(wanted, (x, weight))) <= 1e-10


def test_frozen_operands_get_no_gradient():
    x, weight, labels = some(T, H), some(V, H, seed=1), words(T)
    for leaf, other in ((x, weight), (weight, x)):
        other.requires_grad_(False)
        found, wanted = linear_cross_entropy(x, weight, labels), F.cross_entropy(x @ weight.t(), labels)
        assert gap(torch.autograd.grad(found, leaf), torch.autograd.grad(wanted, leaf)) <= CLOSE
        other.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, labels).requires_grad


def test_graphs_kept_for_a_second_backward():
    x, weight, labels = some(T, H), some(V, H, seed=1), words(T)
    loss = linear_cross_entropy(x, weight, labels)
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    assert all(map(torch.equal, once, torch.autograd.grad(loss, (x, weight))))
    with pytest.raises(FoldError, match="create_graph"):
        torch.autograd.grad(linear_cross_entropy(x, weight, labels), x, create_graph=True)


def test_transforms_take_the_plain_way():
    x, weight, labels = some(3, T, H), some(V, H, seed=1), words(3, T)
    found = torch.func.vmap(lambda x, y: linear_cross_entropy(x, weight, y))(x, labels)
    assert gap(found, [linear_cross_entropy(one, weight, y) for one, y in zip(x, labels, strict=True)]) <= CLOSE


def test_compiled_code_takes_the_plain_way():
    model, _ = twins(Tiny)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    compiled = torch.compile(lambda x, w, y: linear_cross_entropy(x, w, y, z_loss=0.1), backend="eager", fullgraph=True)
    x, weight, labels = some(T, H), model.lm_head.weight, words(T)
    assert gap([compiled(x, weight, labels)], [linear_cross_entropy(x, weight, labels, z_loss=0.1)]) <= CLOSE
    before = weight.detach().clone()
    compiled(x, weight, labels).backward()
    optimizer.step()
    assert not torch.equal(weight, before) and weight.grad is None


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"labels": torch.full((T,), V)}, IndexError, "label 37"),
        ({"labels": torch.full((T,), -1)}, IndexError, "label -1"),
        ({"labels": torch.zeros(T)}, ValueError, "labels"),
        ({"labels": torch.zeros(T + 1, dtype=torch.long)}, ValueError, "labels"),
        ({"x": torch.zeros(T, H + 1)}, ValueError, "x "),
        ({"x": torch.zeros(T, H)}, ValueError, "float32"),
        ({"bias": torch.zeros(H)}, ValueError, "bias"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"softcap": 0.0}, ValueError, "softcap"),
    ],
)
def test_refusals(change, error, says):
    given = {"x": some(T, H), "weight": some(V, H), "labels": words(T), **change}
    with pytest.raises(error, match=says):
        linear_cross_entropy(given.pop("x"), given.pop("weight"), given.pop("labels"), **given)


# rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("confident", [False, True])
def test_errors_are_no_larger_than_the_plain_heads(dtype, confident, monkeypatch, request):
    monkeypatch.undo()
    keep_bytes = {"again": 0, "kept": 2**30}[request.node.callspec.params["small_blocks"]]
    tokens, vocabulary, width = 61, 1501, 64
    x, weight = some(tokens, width), some(vocabulary, width, seed=1, scale=0.3)
    labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    if confident:  # softmax and one-hot cancel
        with torch.no_grad():
            x += 0.7 * weight[labels]
    errors = []
    exact = _all_of(F.cross_entropy(x.to(dtype).double() @ weight.to(dtype).double().t(), labels), x, weight)
    for ours_ in (True, False):
        low, lower = x.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
        if ours_:
            loss = linear_cross_entropy(low, lower, labels, keep_bytes=keep_bytes)
        else:
            loss = F.cross_entropy((low @ lower.t()).float(), labels)
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(_all_of(loss, low, lower), exact)])
    for mine, theirs in zip(*errors, strict=True):
        assert mine <= 1.05 * theirs + 1e-7


def _all_of(loss, x, weight):
    return [loss.detach().double().view(1), *torch.autograd.grad(loss, (x, weight))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, weight, labels = some(T, H, dtype=torch.float32), some(V, H, dtype=torch.float32, seed=1), words(T)
    with torch.autocast("cpu", dtype):
        found = linear_cross_entropy(x, weight, labels)
    with torch.autocast("cpu", dtype):
        wanted = F.cross_entropy((x @ weight.t()).float(), labels)
    assert found.dtype == torch.float32
    for a, b in zip(_all_of(found, x, weight), _all_of(wanted, x, weight), strict=True):
        assert a.dtype == b.dtype and float((a - b).norm() / b.norm()) < 0.02


# folded ---------------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Embedding, one layer, head."""

    def __init__(self, tied=False, bias=False):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def hidden(self, ids):
        return torch.tanh(self.body(self.embed(ids))) * 3


def folded_loss(model, ids, labels, kind="none", **options):
    def run(x):
        return linear_cross_entropy(x, model.lm_head.weight, labels, bias=model.lm_head.bias, shift=True, **options)

    return CHECKPOINTS[kind](run, model.hidden(ids), 0)


def transformers_loss(model, ids, labels, monkeypatch, **options):
    """``ForCausalLMLoss``, which goes down to fp32 unless it is kept from it."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor)
        return ForCausalLMLoss(model.lm_head(model.hidden(ids)), labels, V, **options)


def plain_loss(model, ids, labels, num_items_in_batch=None, **options):
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    losses = torchs_losses(model.hidden(ids), model.lm_head.weight, labels, model.lm_head.bias, **options)
    return losses.sum() / (num_items_in_batch or (labels != -100).sum())


def batch(step):
    return words(B, T, ignored=0, seed=step), words(B, T, seed=50 + step)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("items", [None, 7])
def test_folded_steps_are_transformers_and_torchs(tied, bias, items, monkeypatch):
    pytest.importorskip("transformers")
    plain, folded = twins(lambda: Tiny(tied, bias))
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1], scratch_bytes=1000)
    for step in range(4):
        ids, labels = batch(step)
        wanted = transformers_loss(plain, ids, labels, monkeypatch, num_items_in_batch=items)
        found = folded_loss(folded, ids, labels, num_items=items)
        assert gap([found], [wanted]) <= CLOSE
        for loss, optimizer in ((wanted, optimizers[0]), (found, optimizers[1])):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert no_gradients(folded)
        assert distance(folded, plain) <= CLOSE


@each_option
@pytest.mark.parametrize("tied", [False, True])
def test_folded_options(options, tied):
    plain, folded = twins(lambda: Tiny(tied, bias=True))
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1], scratch_bytes=1000)
    for step in range(3):
        for model, optimizer, loss in ((plain, optimizers[0], plain_loss), (folded, optimizers[1], folded_loss)):
            loss(model, *batch(step), **options).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= CLOSE


FOLDS = {
    "deferred": {"timing": "deferred"},
    "clipped": {"clip_norm": 0.01},
    "clipped_by_largest": {"clip_norm": 0.001, "norm_type": float("inf")},
    "two_passes": {"clip_norm": 0.01, "clip": "two_pass"},
    "by_value": {"clip_value": 1e-3},
    "accumulated": {"accumulate": 2},
    "accumulated_and_clipped": {"accumulate": 2, "clip_norm": 0.01},
    "on_the_host": {"accumulate": 2, "tape": "host"},
    "rows": {"working_set": WorkingSet(chunks=3)},
    "columns": {"working_set": WorkingSet(chunks=3, axis="in")},
    "columns_clipped": {"working_set": WorkingSet(chunks=3, axis="in"), "clip_norm": 0.01},
    "two_bands_of_columns": {
        "working_set": WorkingSet(
            by=[
                [("lm_head.weight", (slice(None), slice(0, 2))), ("lm_head.weight", (slice(None), slice(4, 6)))],
                ["embed.weight", "body.weight", "body.bias", ("lm_head.weight", (slice(None), slice(2, 4)))],
            ]
        )
    },
    "two_bands_of_rows": {
        "working_set": WorkingSet(
            by=[
                [("lm_head.weight", slice(0, 9)), ("lm_head.weight", slice(20, 37))],
                ["embed.weight", "body.weight", "body.bias", ("lm_head.weight", slice(9, 20))],
            ]
        )
    },
}


@pytest.mark.parametrize("how", FOLDS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_way_to_fold(how, tied):
    """Against the same fold of a head that has its logits in memory."""
    if tied and "two_bands" in how:
        pytest.skip("its weight has one name")
    plain, folded = twins(lambda: Tiny(tied))
    folds = []
    for model in (plain, folded):
        optimizer = ours(model)
        folds.append((model, optimizer, gradfold.fold(model, optimizer, scratch_bytes=1000, **FOLDS[how])))
    for step in range(6):
        for (model, optimizer, fold), loss in zip(folds, (plain_loss, folded_loss), strict=True):
            for micro in range(FOLDS[how].get("accumulate", 1)):
                value = loss(model, *batch(10 * step + micro), z_loss=1e-3)
                if "clip" in FOLDS[how]:
                    fold.backward(value)
                else:
                    value.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert distance(folded, plain) <= 1e-11
        assert no_gradients(folded)


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("tied", [False, True])
def test_checkpointed_heads(kind, tied):
    plain, folded = twins(lambda: Tiny(tied))
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    for step in range(3):
        for model, optimizer, loss in ((plain, optimizers[0], plain_loss), (folded, optimizers[1], folded_loss)):
            loss(model, *batch(step), **({"kind": kind} if loss is folded_loss else {})).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= CLOSE


def test_beside_other_uses_of_the_weight():
    """Two losses, logits in memory, the weight itself; a forward that is dropped."""

    def loss(model, step, own):
        total = 0.1 * model.lm_head.weight.pow(2).sum() + model.lm_head(model.hidden(batch(step)[0])).pow(2).mean()
        own(model, *batch(step + 20))
        return total + own(model, *batch(step)) + own(model, *batch(step + 10))

    plain, folded = twins(lambda: Tiny(tied=True))
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1], scratch_bytes=1000)
    for step in range(3):
        for model, optimizer, own in ((plain, optimizers[0], plain_loss), (folded, optimizers[1], folded_loss)):
            loss(model, step, own).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= CLOSE


@pytest.mark.parametrize("states", ["int8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coded_states_and_low_precision(states, dtype):
    """The same step as with the dense gradient, up to its rounding."""
    dense, folded = twins(Tiny, dtype)
    for model, pause in ((dense, True), (folded, False)):
        optimizer = gradfold.AdamW(model.parameters(), **RULES["AdamW"], states=states)
        fold = gradfold.fold(model, optimizer)
        for step in range(3):
            weight = model.lm_head.weight
            loss = folded_loss(model, *batch(step)) if not pause else plain_loss(model, *batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert weight.grad is None
        fold.remove()
    assert distance(folded, dense) <= (1e-3 if dtype == torch.float32 else 2e-2)


def test_paused_and_captured():
    model, _ = twins(Tiny)
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer)
    weight = model.lm_head.weight
    (captured,) = torch.autograd.grad(folded_loss(model, *batch(0)), weight)
    with fold.paused():
        folded_loss(model, *batch(0)).backward()
    wanted = torch.autograd.grad(plain_loss(model, *batch(0)), weight)[0]
    assert gap([captured, weight.grad], [wanted, wanted]) <= CLOSE
    optimizer.zero_grad()
    fold.remove()
    folded_loss(model, *batch(0)).backward()
    assert gap([weight.grad], [wanted]) <= CLOSE


def test_a_second_backward_is_refused():
    model, _ = twins(Tiny)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    folded_loss(model, *batch(0)).backward()
    with pytest.raises(FoldError, match="second backward"):
        folded_loss(model, *batch(1)).backward()


def test_a_gradient_that_is_not_finite():
    model, _ = twins(Tiny)
    optimizer = ours(model)
    gradfold.fold(model, optimizer, on_nonfinite="skip")
    before = model.lm_head.weight.detach().clone()
    (folded_loss(model, *batch(0)) * float("inf")).backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight, before)
