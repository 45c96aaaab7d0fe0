"""Forwards that use their weights themselves, in regions that torch.compile has compiled."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import gradfold
from tests.zoo import compare, distance, ours, torchs

CLOSE = 1e-10
V, H, E = 11, 6, 3


@pytest.fixture(autouse=True)
def forgotten():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Weights(nn.Module):
    """Weights of a name each."""

    def __init__(self, **shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.rand(*shape, generator=generator) - 0.5))


class Matrices(Weights):
    def __init__(self):
        wide = dict.fromkeys(("linear", "matmul", "item", "addmm", "flipped", "cast"), (H, H))
        super().__init__(table=(V, H), rows=(V, H), **wide, bias=(H,))

    def forward(self, ids):
        x = F.embedding(ids, self.table) + self.rows[ids - V]
        x = torch.tanh(F.linear(x, self.linear, self.bias))
        x = torch.tanh(x @ self.matmul.t())
        x = torch.tanh(torch.matmul(x, self.item.transpose(-2, -1)))
        x = torch.tanh(torch.addmm(self.bias, x.flatten(0, 1), self.addmm.t()))
        return F.linear(x @ self.flipped, self.cast.to(x.dtype))


class Experts(Weights):
    """As ``batched_mm`` and Llama 4 use theirs."""

    def __init__(self):
        three = dict.fromkeys(("all", "out", "left", "right"), (E, H, H))
        super().__init__(table=(V, H), **three, biases=(E, H))
        self.grouped = gradfold.nn.GroupedLinear(E, H, H)
        self.grouped.bias = nn.Parameter(torch.linspace(-1, 1, E * H).view(E, H))

    def forward(self, ids):
        x = self.table[ids].flatten(0, 1)  # [6, H]
        x = torch.bmm(x.view(E, 2, H), self.all)
        x = torch.tanh(torch.bmm(x, self.out.transpose(1, 2)).view(6, H))
        experts = torch.tensor([2, 0, 2, 0, 0, -1])
        x = torch.bmm(x.unsqueeze(1), self.right[experts]).squeeze(1) + self.biases[experts]
        x = torch.bmm(self.left[experts], torch.tanh(x).unsqueeze(-1)).squeeze(-1)
        return self.grouped(torch.tanh(x), counts=torch.tensor([0, 4, 2]))


HIDDEN = {"grouped.bias", "bias"}  # an index of a GroupedLinear's own forward, and a vector


@pytest.mark.parametrize("make", [Matrices, Experts])
def test_steps_are_torchs(make):
    folds = []

    def run(model, optimizer, step):
        ids = torch.tensor([[3, 1, 4], [1, 5, 9]]) + step % 2
        folded = any("plain_class" in vars(type(module)) for module in model.modules())
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if folded else model
        called(ids).square().mean().backward()

    def fold(*args, **options):
        folds.append(real(*args, **options))
        return folds[-1]

    real = gradfold.fold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradfold, "fold", fold)
        assert compare(make, run) <= CLOSE
    assert {row.name for row in folds[-1].report().rows if row.route != "folded"} <= HIDDEN


def test_a_use_that_is_not_known_is_dense():
    class Sums(Weights):
        def forward(self, x):
            return F.linear(x, self.a) + self.b.sum() * (x @ self.b.T)

    model = Sums(a=(H, H), b=(H, H)).double()
    plain = copy.deepcopy(model)
    fold = gradfold.fold(model, mine := ours(model))
    theirs, x = torchs(plain), torch.linspace(-1, 1, 2 * H, dtype=torch.float64).view(2, H)
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match=r"1 weights of folded modules had dense gradients, .* MiB: b"):
        for one, optimizer in ((plain, theirs), (called, mine)):
            one(x).square().sum().backward()
            optimizer.step()
    assert distance(model, plain) <= CLOSE
    assert {row.name: row.route for row in fold.report().rows} == {"a": "folded", "b": "hooked"}


def test_no_gradient_in_the_graph():
    made = []

    def look(graph, _):
        made.extend(
            tuple(node.meta["val"].shape)
            for node in graph.graph.nodes
            if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
        )
        return make_boxed_func(graph)

    model = Experts()
    gradfold.fold(model, ours(model))
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=look)
    torch.compile(model, backend=backend, fullgraph=True)(torch.tensor([[3, 1, 4], [1, 5, 9]])).sum().backward()
    assert made
    assert not {(E, H, H), (6, H, H)} & set(made)


def test_a_hook_on_a_weight_is_refused():
    model = Matrices().double()
    gradfold.fold(model, ours(model))
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = [param.clone() for param in model.parameters()]
    loss = called(torch.tensor([[3, 1, 4]])).square().sum()
    model.cast.register_hook(lambda grad: None)
    with pytest.raises(gradfold.FoldError, match="cast: has a hook that waits for its gradient"):
        loss.backward()
    assert all(map(torch.equal, before, model.parameters()))


def test_export_is_refused_while_it_trains():
    model = Matrices()
    fold = gradfold.fold(model, ours(model))
    ids = torch.tensor([[3, 1, 4]])
    with pytest.raises(Exception, match="an exported program cannot step weights"):
        torch.export.export(model, (ids,))
    fold.remove()
    assert not [name for name in vars(model) if "gradfold" in name]


# memory ---------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
WIDE, ROWS, LAYERS, MANY = 256, 64, 10, 8

MEASURE = f"""
import sys, torch, gradfold
from torch import nn
from tests.allocator import peak_bytes

torch.manual_seed(0)
counts = torch.tensor([0, 20, 1, 11, 8, 24, 0, 0])

class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(gradfold.nn.GroupedLinear({MANY}, {WIDE}, {WIDE}) for _ in range({LAYERS}))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x, counts=counts))
        return x

x = torch.randn({ROWS}, {WIDE})

def measured(how):
    model = Tower()
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer)
    called = model
    if how == "whole":
        called = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif how == "layers":
        gradfold.compile_layers(model, backend="aot_eager", fullgraph=True)

    def step():
        called(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    return peak_bytes(step)

print(*map(measured, ("eager", "whole", "layers")))
"""


@pytest.mark.slow
def test_memory_of_a_step():
    """All gradients are 20 MiB; the uses of a region, two tensors of 64 KiB each."""
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    eager, whole, layers = (int(word) for word in done.stdout.split()[-3:])
    use = 2 * ROWS * WIDE * 4
    assert whole <= eager + LAYERS * use + 2**20
    assert layers <= eager + use + 2**20
