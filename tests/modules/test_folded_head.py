"""The loss head of a folded model against transformers' own loss and torch's AdamW: every option, every timing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from gradfold import FoldError, WorkingSet, linear_cross_entropy
from gradfold.head import loss as head
from tests.modules.heads import CLOSE, EACH_OPTION, KEPT, B, H, T, V, gap, some, torchs_losses, words
from tests.pairs import each_pair, in_turn
from tests.zoo import CHECKPOINTS, RULES, distance, no_gradients, ours, torchs, twins

pytestmark = pytest.mark.usefixtures("small_blocks")


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
    options.setdefault("keep_bytes", head.KEEP_BYTES)  # on a tape, too

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


@each_pair(**EACH_OPTION, tied=[False, True])
def test_folded_options(label_smoothing, z_loss, softcap, tied):
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
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
    "rows": {"working_set": WorkingSet(interval=1, chunks=3)},
    "columns": {"working_set": WorkingSet(interval=1, chunks=3, axis="in")},
    "columns_clipped": {"working_set": WorkingSet(interval=1, chunks=3, axis="in"), "clip_norm": 0.01},
    "two_bands_of_columns": {
        "working_set": WorkingSet(
            interval=1,
            by=[
                [("lm_head.weight", (slice(None), slice(0, 2))), ("lm_head.weight", (slice(None), slice(4, 6)))],
                ["embed.weight", "body.weight", "body.bias", ("lm_head.weight", (slice(None), slice(2, 4)))],
            ],
        )
    },
    "two_bands_of_rows": {
        "working_set": WorkingSet(
            interval=1,
            by=[
                [("lm_head.weight", slice(0, 9)), ("lm_head.weight", slice(20, 37))],
                ["embed.weight", "body.weight", "body.bias", ("lm_head.weight", slice(9, 20))],
            ],
        )
    },
}


# a tied weight has one name, the embedding's, so that bands of the head's are none
WAYS = [(how, tied) for how in FOLDS for tied in (False, True) if not (tied and "two_bands" in how)]


@in_turn(way=WAYS, small_blocks=KEPT, indirect=["small_blocks"])
def test_every_way_to_fold(way):
    """Against the same fold of a head that has its logits in memory."""
    how, tied = way
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


@each_pair(kind=CHECKPOINTS, tied=[False, True], small_blocks=KEPT, indirect=["small_blocks"])
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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_a_frozen_head(tied, listed):
    """It passes gradients on, and stays; whether the optimizer knows it or not."""
    plain, folded = twins(lambda: Tiny(tied, bias=True))
    for model in (plain, folded):
        model.lm_head.weight.requires_grad_(False)
    before = folded.lm_head.weight.clone()
    trained = [p for p in folded.parameters() if listed or p.requires_grad]
    optimizers = torchs(plain), gradfold.AdamW(trained, **RULES["AdamW"])
    gradfold.fold(folded, optimizers[1])
    for step in range(3):
        for model, optimizer, loss in ((plain, optimizers[0], plain_loss), (folded, optimizers[1], folded_loss)):
            loss(model, *batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= CLOSE and torch.equal(folded.lm_head.weight, before)


def test_only_the_head_is_trained():
    plain, folded = twins(Tiny)
    for model in (plain, folded):
        model.requires_grad_(False)
        model.lm_head.requires_grad_()
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    for step in range(3):
        for model, optimizer, loss in ((plain, optimizers[0], plain_loss), (folded, optimizers[1], folded_loss)):
            loss(model, *batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= CLOSE


def test_the_gradient_of_the_hidden_states_alone():
    """No step, no gradient; the backward that follows steps as if it had not been."""
    plain, folded = twins(Tiny)
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    before = folded.lm_head.weight.clone()
    ids, labels = batch(0)
    losses = []
    for model in (plain, folded):
        x = model.hidden(ids)
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
        if model is plain:
            loss = torchs_losses(x, model.lm_head.weight, shifted).sum()
        else:
            loss = linear_cross_entropy(x, model.lm_head.weight, shifted, reduction="sum", keep_bytes=head.KEEP_BYTES)
        losses.append((loss, torch.autograd.grad(loss, x, retain_graph=True)[0]))
    assert gap(losses[1], losses[0]) <= CLOSE
    assert torch.equal(folded.lm_head.weight, before) and no_gradients(folded)
    for (loss, _), optimizer in zip(losses, optimizers, strict=True):
        loss.backward()
        optimizer.step()
    assert distance(folded, plain) <= CLOSE


def test_after_a_forward_and_a_backward_that_failed():
    plain, folded = twins(lambda: Tiny(tied=True))
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    with pytest.raises(IndexError):
        folded_loss(folded, batch(0)[0], torch.full((B, T), V))
    x = folded.hidden(batch(0)[0])
    x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        linear_cross_entropy(x, folded.lm_head.weight, batch(0)[1]).backward()
    optimizers[1].zero_grad()
    for model, optimizer, loss in ((plain, optimizers[0], plain_loss), (folded, optimizers[1], folded_loss)):
        loss(model, *batch(1)).backward()
        optimizer.step()
    assert distance(folded, plain) <= CLOSE


@pytest.mark.parametrize("waits", [{"accumulate": 2}, {"clip_norm": 1.0}, {"timing": "deferred"}])
def test_no_softmax_lies_on_a_tape(waits, monkeypatch):
    """Unless it was asked for: a tape is there until the step ends."""
    monkeypatch.setattr(head, "KEEP_BYTES", 2**20)
    model, _ = twins(Tiny)
    gradfold.fold(model, ours(model), **waits)
    for keep_bytes, words_kept in ((None, None), (2**20, V)):
        with monkeypatch.context() as patch:
            made = []
            patch.setattr(head, "HeadTerm", lambda *args, made=made: made.append(args[-1]) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                folded_loss(model, *batch(0), keep_bytes=keep_bytes).backward()
        assert (None if made[0] is None else made[0].values.shape[1]) == words_kept


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
