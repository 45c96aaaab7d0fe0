"""Convolutions whose weight steps in blocks of output channels."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.backends import Convolution, ConvTerm, MatmulTerm, RowsTerm
from gradfold.planner.trace import LiveBytes
from tests.zoo import compare, ours

KINDS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "uneven_same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "patches": lambda: nn.Conv2d(4, 6, 4, stride=4),
    "groups": lambda: nn.Conv2d(4, 12, 3, groups=2),
    "narrow_groups": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
    "transposed_groups": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
}
DEPTHWISE = lambda: nn.Conv2d(4, 4, 3, groups=4)  # noqa: E731


def net(make):
    return lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), make(), nn.Tanh())


def images(step):
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def backward(model, optimizer, step):
    model(images(step)).square().sum().backward()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_steps_as_torch(name):
    assert compare(net(KINDS[name]), backward) <= 1e-12
    model = net(KINDS[name])().double()
    fold = gradfold.fold(model, ours(model))
    for _ in range(2):  # before a backward, and after one
        rows = {row.name: row for row in fold.report().rows}
        assert rows["2.weight"].route == "folded" and not rows["2.weight"].dense
        backward(model, None, 0) if not rows["2.weight"].handed else None


def test_depthwise_is_hooked():
    model = net(DEPTHWISE)().double()
    fold = gradfold.fold(model, ours(model))
    assert compare(net(DEPTHWISE), backward) <= 1e-12
    assert {row.name: row.route for row in fold.report().rows}["2.weight"] == "hooked"


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_checkpoints(reentrant):
    def run(model, optimizer, step):
        x = model[:2](images(step))
        checkpoint(model[2:], x, use_reentrant=reentrant).square().sum().backward()

    assert compare(net(KINDS["plain"]), run) <= 1e-12


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 12])
def test_any_block_of_rows(rows, transposed, groups):
    """And of slices of rows and channels, as working sets step them."""
    x, grad = torch.randn(2, 12, 8, dtype=torch.float64), torch.randn(2, 12, 6, dtype=torch.float64)
    if transposed:
        x, grad = grad, x
    how = Convolution((1,), (0,), (1,), transposed, (0,), groups)
    shape = 12, 12 // groups, 3
    weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(torch.convolution(x, weight, None, *how), [weight], grad)
    term = ConvTerm(x, grad, shape, how)
    for part, wanted in (
        (term, exact),
        (term.narrow(0, 5, 11), exact[5:11]),
        (term.narrow(1, 1, 3), exact[:, 1:3]),
        (term.narrow(0, 2, 9).narrow(0, 3, 7), exact[5:9]),
    ):
        found = torch.full((len(wanted), wanted[0].numel()), torch.nan, dtype=torch.float64)
        for start in range(0, len(wanted), rows):
            stop = min(start + rows, len(wanted))
            part.write(found[start:stop], start, stop)
            part.add(found[start:stop], start, stop)
        assert (found.view_as(wanted) - 2 * wanted).abs().max() <= 1e-12
        assert wanted.abs().max() <= part.bound()


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_term_of_some_rows(rows):
    left, right = torch.randn(5, 4), torch.randn(5, 6)
    term = RowsTerm(MatmulTerm(left, right), 3, 4)
    exact = torch.zeros(9, 6)
    exact[3:7] = left.t() @ right
    for part, wanted in ((term, exact), (term.narrow(0, 5, 9), exact[5:]), (term.narrow(1, 2, 5), exact[:, 2:5])):
        found = torch.full(wanted.shape, torch.nan)
        for start in range(0, len(wanted), rows):
            stop = min(start + rows, len(wanted))
            part.write(found[start:stop], start, stop)
            part.add(found[start:stop], start, stop)
        assert (found - 2 * wanted).abs().max() <= 1e-5


def test_a_weight_that_is_used_often_does_not_keep_every_input():
    """A head on several levels: what waits for the gate is at most the gradient, and one use."""
    model = nn.Conv2d(4, 4, 3, padding=1)
    optimizer = gradfold.SGD(model.parameters(), lr=1e-3)
    gradfold.fold(model, optimizer)
    x = torch.randn(1, 4, 64, 64)

    def peak(uses):
        y = x
        for _ in range(uses):
            y = model(y)
        with LiveBytes() as live:
            live.track(model)
            y.square().mean().backward()
            optimizer.step()
        return live.peak_bytes

    peak(1)
    assert peak(8) - peak(4) < 2 * x.nbytes


def test_no_gradient_exists():
    model = nn.Conv2d(64, 128, 3)
    optimizer = gradfold.SGD(model.parameters(), lr=1e-3)
    gradfold.fold(model, optimizer, scratch_bytes=2**16)
    x = torch.randn(1, 64, 4, 4)

    def step():
        model(x).square().sum().backward()
        optimizer.step()

    step()
    with LiveBytes() as live:
        live.track(model)
        before = live.now_bytes
        step()
        assert live.peak_bytes - before < model.weight.nbytes / 2
