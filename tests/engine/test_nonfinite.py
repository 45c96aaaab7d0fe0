"""Gradients that are not finite: no weight and no state ever holds one, in any timing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from gradfold.errors import FoldError, NonFiniteError
from tests.pairs import each_pair
from tests.zoo import Net, batches, ours

TIMINGS = {
    "immediate": {},
    "clipped": {"clip_norm": 1.0},
    "accumulated": {"accumulate": 2},
    "two passes": {"clip_norm": 1.0, "clip": "two_pass"},
    "delayed": {"clip_norm": 1.0, "clip": "delayed"},
}


class Injected(torch.autograd.Function):
    """Lets a value through, and spoils one element of it, or of its gradient."""

    @staticmethod
    def forward(ctx, x, value, where):
        ctx.value, ctx.where = value, where
        return spoilt(x, value) if where == "X" else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (spoilt(grad, ctx.value) if ctx.where == "dY" else grad), None, None


def spoilt(x, value):
    x = x.clone()
    x.view(-1)[1] = value
    return x


@each_pair(
    timing=TIMINGS, where=["X", "dY"], value=[math.nan, math.inf], options=[{}, {"states": "int8", "small_size": 0}]
)
def test_nothing_that_is_not_finite_reaches_a_weight_or_state(timing, where, value, options):
    """Injected at every folded layer in turn."""
    names = [name for name, _ in Net("untied").named_modules() if name == "head" or name.endswith(("up", "down"))]
    for name in names:
        torch.manual_seed(0)
        model = Net("untied")
        optimizer = gradfold.AdamW(model.parameters(), lr=1e-2, **options)
        fold = gradfold.fold(model, optimizer, **TIMINGS[timing])
        count = TIMINGS[timing].get("accumulate", 1)

        def go(model=model, fold=fold, optimizer=optimizer, count=count):
            for ids in batches(count):
                fold.backward(model.loss(ids))
            optimizer.step()
            optimizer.zero_grad()

        go()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        module = model.get_submodule(name)
        if where == "X":
            handle = module.register_forward_pre_hook(lambda m, args: Injected.apply(args[0], value, where))
        else:
            handle = module.register_forward_hook(lambda m, args, y: Injected.apply(y, value, where))
        with pytest.raises(NonFiniteError, match="not finite") as caught:
            go()
        assert str(caught.value).startswith(f"{caught.value.what}. ")
        optimizer.zero_grad()
        handle.remove()
        assert any(n in str(caught.value) for n in before)
        if where == "dY" and name == "head" and timing == "immediate":
            assert "head.weight" in str(caught.value)
        for param in model.parameters():
            assert param.isfinite().all()
            for key, state in optimizer.state[param].items():
                assert not state.is_floating_point() or state.isfinite().all(), key
        if timing in ("clipped", "two passes"):
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        go()  # and on
        assert all(p.isfinite().all() for p in model.parameters())
        assert math.isfinite(fold.grad_norm)


@pytest.mark.parametrize("timing", TIMINGS)
def test_skipping_goes_on(timing):
    model = Net("untied")
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer, on_nonfinite="skip", **TIMINGS[timing])
    for step, factor in enumerate((1.0, math.nan, 1.0)):
        for ids in batches(TIMINGS[timing].get("accumulate", 1)):
            fold.backward(model.loss(ids) * factor)
        optimizer.step()
        optimizer.zero_grad()
        assert math.isfinite(fold.grad_norm) == (step != 1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_ignoring_is_torchs_way():
    model = nn.Linear(3, 3)
    optimizer = ours(model)
    gradfold.fold(model, optimizer, on_nonfinite="ignore")
    (model(torch.ones(1, 3)).sum() * math.nan).backward()
    optimizer.step()
    assert model.weight.isnan().all()


def test_a_product_that_overflows_is_not_finite():
    """dY and X are, their product is not: no tile of the weight may move."""
    model = nn.Linear(4, 300, bias=False)
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer, scratch_bytes=256)
    before = model.weight.detach().clone()
    scale = torch.ones(300)
    scale[-1] = 1e30
    (F.linear(torch.full((1, 4), 1e30), model.weight.detach()) * 0).sum()
    (model(torch.full((1, 4), 1e30)) * scale).sum().backward()
    with pytest.raises(FoldError, match="weight.*not finite"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_large_but_finite_gradients_step():
    model = nn.Linear(4, 4, bias=False)
    optimizer = gradfold.SGD(model.parameters(), lr=1e-38)
    fold = gradfold.fold(model, optimizer)
    (model(torch.full((1, 4), 1e19)) * 1e18).sum().backward()
    optimizer.step()
    assert fold.grad_norm == pytest.approx(4e37, rel=1e-5)


def test_the_message_says_whether_other_weights_have_moved():
    """Of four weights one is not reached by the last backward and waits on its tape; the others step inside it."""
    model = Net("partial")
    optimizer = ours(model)
    gradfold.fold(model, optimizer, accumulate=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = batches(1)[0]
    (model.loss(ids, step=0) + model.head.weight.sum() * math.nan).backward()  # head, embedding, two blocks
    model.loss(ids, step=1).backward()  # embedding and one block
    with pytest.raises(FoldError, match=r"head.weight.*the other weights have"):
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "embed.weight" in moved and "head.weight" not in moved
