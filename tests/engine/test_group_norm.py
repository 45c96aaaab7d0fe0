"""GroupNorms above layers that sleep or are frozen: torch's own backward crashes there where inputs are channels-last.

Each case runs in a forked child: what is looked for is a process that dies.
"""

import copy
import os
import signal
import traceback
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from tests.pairs import in_turn
from tests.workset.test_steps import check
from tests.zoo import distance, twins

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
PIXELS = {3: (6,), 4: (4, 3), 5: (3, 2, 2)}


def survives(task):
    """Run the task in a child; fail with its signal or its traceback."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            task()
            code = 0
        except BaseException:
            os.write(writing, traceback.format_exc()[-3000:].encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    assert not os.WIFSIGNALED(status), signal.Signals(os.WTERMSIG(status)).name
    assert os.WEXITSTATUS(status) == 0, said


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Load what the first step of any optimizer loads, once instead of in every child."""
    layer = nn.Linear(2, 2)
    for kind in (torch.optim.AdamW, torch.optim.SGD, gradfold.AdamW, gradfold.SGD):
        optimizer = kind(layer.parameters(), lr=0.1)
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    for model in twins(lambda: nn.Linear(2, 2)):
        gradfold.fold(model, gradfold.AdamW(model.parameters()))
        model(torch.ones(1, 2, dtype=torch.float64)).sum().backward()


class Sub(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) * 2


class Functional(nn.Module):
    """A user's own norm; `given`: which of weight and bias it has."""

    def __init__(self, given="weight and bias", call=F.group_norm):
        super().__init__()
        self.call = call
        self.weight = nn.Parameter(torch.ones(16)) if "weight" in given else torch.ones(16, dtype=torch.float64)
        self.bias = nn.Parameter(torch.zeros(16)) if "bias" in given else None

    def forward(self, x):
        return self.call(x, 4, self.weight, self.bias)


def scaled(x, groups, weight, bias):
    """The operator underneath, as compiled graphs call it."""
    size = x.shape[2:].numel()
    return torch.ops.aten.native_group_norm(x, weight, bias, x.shape[0], x.shape[1], size, groups, 1e-5)[0]


NORMS = {
    "module": lambda: nn.GroupNorm(4, 16),
    "one group": lambda: nn.GroupNorm(1, 16),
    "a channel each": lambda: nn.GroupNorm(16, 16),
    "subclass": lambda: Sub(4, 16),
    "functional": Functional,
    "torch.group_norm": lambda: Functional(call=torch.group_norm),
    "operator": lambda: Functional(call=scaled),
    "weight only": lambda: Functional("weight"),
    "bias only": lambda: Functional("bias"),
}


class Pixels(nn.Module):
    """A convolution, a norm, another of both, and a head."""

    def __init__(self, norm, dim):
        super().__init__()
        conv = getattr(nn, f"Conv{dim - 2}d")
        self.a, self.norm_a = conv(3, 16, 1), norm()
        self.b, self.norm_b = conv(16, 16, 1), norm()
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = torch.tanh(self.norm_a(self.a(x)))
        y = torch.tanh(self.norm_b(self.b(y)))
        return self.head(y.flatten(2).mean(2))


def last(x):
    return x.contiguous(memory_format=LAST[x.dim()]) if x.dim() in LAST else x


def inputs(dim, step, pixels=None):
    generator = torch.Generator().manual_seed(step)
    return last(torch.randn(2, 3, *(pixels or PIXELS[dim]), dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dim", [3, 4, 5])
def test_above_layers_that_sleep(norm, dim):
    def task():
        check(lambda: Pixels(NORMS[norm], dim), lambda m, step: m(inputs(dim, step)).pow(2).sum(), 6, by="layer")

    survives(task)


CUTS = {
    "always": {"by": "layer", "always": ["norm"]},
    "rows": {"chunks": 5},
    "importance": {"chunks": 4, "order": "importance", "interval": 2},
}


@pytest.mark.parametrize("cut", CUTS)
def test_in_any_cut(cut):
    def task():
        check(lambda: Pixels(NORMS["module"], 4), lambda m, step: m(inputs(4, step)).pow(2).sum(), 8, **CUTS[cut])

    survives(task)


@pytest.mark.parametrize("pixels", [(1, 1), (1, 4), (5, 1)], ids=str)
def test_layouts_that_are_both(pixels):
    """With one row or column of pixels a tensor is contiguous and channels-last at once."""

    def task():
        check(
            lambda: Pixels(NORMS["module"], 4), lambda m, step: m(inputs(4, step, pixels)).pow(2).sum(), 6, by="layer"
        )

    survives(task)


@in_turn(norm=NORMS, dim=[3, 4, 5])
def test_above_frozen_layers_without_a_working_set(norm, dim):
    def task():
        plain, folded = twins(lambda: Pixels(NORMS[norm], dim))
        folded.a.requires_grad_(False)
        folded.b.requires_grad_(False)
        trained = [p for name, p in plain.named_parameters() if name[:2] not in ("a.", "b.")]
        theirs = torch.optim.SGD(trained, lr=0.1)
        optimizer = gradfold.SGD([p for p in folded.parameters() if p.requires_grad], lr=0.1)
        gradfold.fold(folded, optimizer)
        for step in range(3):
            plain(inputs(dim, step)).pow(2).sum().backward()  # where nothing is frozen, torch does not crash
            theirs.step()
            plain.zero_grad()
            folded(inputs(dim, step)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert distance(folded, plain) <= 1e-12

    survives(task)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [3, 4, 5])
def test_gradients_are_bit_for_bit_those_beside_an_inputs_own(dtype, dim):
    """In a fold, paused or not, after it, and in modules of no fold: the kernel is mended for the process."""

    def task():
        warnings.simplefilter("error")  # nor does mending it warn
        layer = nn.Linear(2, 2)
        fold = gradfold.fold(layer, gradfold.SGD(layer.parameters(), lr=0.1))
        norm = nn.GroupNorm(4, 16).to(dtype)
        x = last(torch.randn(2, 16, *PIXELS[dim]).to(dtype))
        for removed in (False, True):
            found = []
            for needed in (True, False):
                y = norm(x.clone(memory_format=torch.preserve_format).requires_grad_(needed))
                y.backward(last(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)))
                found.append([norm.weight.grad, norm.bias.grad])
                norm.zero_grad()
            assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
            if not removed:
                fold.remove()

    survives(task)


@pytest.mark.slow
def test_twice_differentiated_and_compiled_as_before():
    def task():
        model = nn.Linear(2, 2)
        gradfold.fold(model, gradfold.SGD(model.parameters(), lr=0.1))
        x = last(torch.randn(2, 8, 2, 2, dtype=torch.float64)).requires_grad_()
        weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, w: F.group_norm(x, 4, w), (x, weight))
        assert torch.autograd.gradgradcheck(lambda x, w: F.group_norm(x, 4, w), (x, weight))
        norm = nn.GroupNorm(4, 8).double()
        compiled = torch.compile(copy.deepcopy(norm), backend="aot_eager")
        for call in (norm, compiled):
            call(x.detach()).pow(3).sum().backward()
        assert torch.allclose(norm.weight.grad, compiled.weight.grad, rtol=1e-12, atol=0)

    survives(task)
