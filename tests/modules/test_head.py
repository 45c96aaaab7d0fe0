"""The loss head with no fold, against torch's cross-entropy: every option."""

import pytest
import torch
import torch.nn.functional as F

from gradfold import FoldError, linear_cross_entropy, linear_log_probs
from gradfold.head import online_softmax as sweep
from tests.modules.heads import CLOSE, EACH_OPTION, B, H, T, V, gap, some, torchs_losses, words
from tests.pairs import each_pair

pytestmark = pytest.mark.usefixtures("small_blocks")


@each_pair(**EACH_OPTION, with_bias=[False, True], reduction=["mean", "sum", "none", "items"])
def test_loss_and_gradients_are_torchs(label_smoothing, z_loss, softcap, with_bias, reduction):
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
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


STRANGE = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one row for all": lambda x: x[:1, :1].expand(B, T, H),
    "none": lambda x: x[:0],
}


@pytest.mark.parametrize("how", STRANGE)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_strange_strides_and_small_labels(how, dtype):
    """-100 is no number of 8 bits: the token that follows nothing is ignored all the same."""
    leaf, weight = some(B, T, H), some(V, H, seed=1)
    x = STRANGE[how](leaf)
    labels = words(*x.shape[:-1], ignored=0).to(dtype)
    found = linear_cross_entropy(x, weight, labels, shift=True, reduction="sum")
    wanted = F.cross_entropy((x[:, :-1] @ weight.t()).flatten(0, 1), labels[:, 1:].flatten().long(), reduction="sum")
    got, expected = (torch.autograd.grad(loss, (leaf, weight), retain_graph=True) for loss in (found, wanted))
    assert gap([found, *got], [wanted, *expected]) <= CLOSE


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
    monkeypatch.setattr(sweep, "TILE_BYTES", 2**15)
    tokens, vocabulary, width = 61, 1501, 64
    keep_bytes = {"again": 0, "part": 2 * tokens * 700, "kept": 2**30}[request.node.callspec.params["small_blocks"]]
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
