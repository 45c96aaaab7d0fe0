"""Reentrant checkpointing where it is hardest: weights also used outside, lengths that change, reads that mislead."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold
from tests.pairs import each_pair
from tests.zoo import compare, ours, same_bits, twins

CLOSE = 1e-10
XG = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)


def reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


class Cell(nn.Module):
    """One cell, ``times`` times, each in its own checkpoint; a head."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell()
        self.head = nn.Linear(6, 6)

    def forward(self, x, times):
        for _ in range(times):
            x = reentrant(self.cell, x)
        return self.head(x)


CELLS = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
    "no_bias": lambda: nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh()),
    "norm": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()),
    "encoder_layer": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
}
cells = pytest.mark.parametrize("cell", CELLS)


@cells
@pytest.mark.parametrize("lengths", [(3, 3, 3), (1, 2, 3, 1, 2), (3, 1, 2, 3)], ids=str)
def test_lengths_may_change(cell, lengths):
    def run(model, optimizer, step):
        model(XG, lengths[step]).pow(2).mean().backward()

    assert compare(lambda: Cell(CELLS[cell]), run, len(lengths)) <= CLOSE


@cells
def test_a_dropped_forward_teaches_nothing(cell):
    def run(model, optimizer, step):
        if step == 0:
            model(XG, 1)
        model(XG, 1 if step == 0 else 2).pow(2).mean().backward()

    assert compare(lambda: Cell(CELLS[cell]), run) <= CLOSE


@cells
def test_a_pass_without_grad_teaches_nothing(cell):
    def run(model, optimizer, step):
        if step < 2:
            with torch.no_grad():
                model(XG, 1)
        model(XG, 1 if step < 2 else 2).pow(2).mean().backward()

    assert compare(lambda: Cell(CELLS[cell]), run, 4) <= CLOSE


@cells
def test_in_eval_mode(cell):
    def run(model, optimizer, step):
        model.eval()
        model(XG, step + 1).pow(2).mean().backward()

    assert compare(lambda: Cell(CELLS[cell]), run) <= CLOSE


HOOKED_CELLS = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "conv": lambda: nn.Conv1d(6, 6, 1),
    "norm": lambda: nn.LayerNorm(6),
}


@pytest.mark.parametrize("cell", HOOKED_CELLS)
@pytest.mark.parametrize("lengths", [(2, 2, 2), (1, 2, 3)], ids=str)
def test_no_folded_module_in_the_checkpoint(cell, lengths):
    """Nothing tells how often such a weight is read, and a first step would mislead."""

    def run(model, optimizer, step):
        model(XG, lengths[step]).pow(2).mean().backward()

    assert compare(lambda: Cell(HOOKED_CELLS[cell]), run) <= CLOSE


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_the_checkpoints_come_first_in_backward(times, outside):
    """The fold meets the inner backwards before it can have seen the outermost one."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

        def forward(self, x):
            x = self.linear(x)
            x = self.norm(x) if outside else x
            for _ in range(times):
                x = reentrant(self.norm, x)
            return x

    weight = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    assert compare(First, lambda m, o, step: (m(XG) * weight).pow(3).mean().backward()) <= CLOSE


@pytest.mark.parametrize("chunks", [(2, 2, 2), (1, 3, 2)], ids=str)
def test_an_lstm_in_chunks(chunks):
    class Chunks(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 6, batch_first=True)
            self.head = nn.Linear(6, 6)

        def chunk(self, x, h, c):
            y, (h, c) = self.lstm(x, (h, c))
            return y, h, c

        def forward(self, x, count):
            h = c = x.new_zeros(1, 2, 6)
            for part in x.chunk(count, 1):
                y, h, c = reentrant(self.chunk, part, h, c)
            return self.head(y)

    def run(model, optimizer, step):
        model(XG, chunks[step]).pow(2).mean().backward()

    assert compare(Chunks, run) <= CLOSE


class Tied(nn.Module):
    """One Linear inside a checkpoint and outside it, before or after."""

    def __init__(self, before, bias):
        super().__init__()
        self.before = before
        self.tied = nn.Linear(6, 6, bias=bias)
        self.own = nn.Linear(6, 6)

    def forward(self, x):
        x = self.tied(x) if self.before else x
        x = reentrant(lambda z: self.own(torch.tanh(self.tied(z))), x)
        return x if self.before else self.tied(x)


@each_pair(
    before=[True, False], bias=[True, False], mode=["train", "eval"], clear=["before_forward", "before_backward"]
)
def test_tied_inside_and_outside(before, bias, mode, clear):
    def run(model, optimizer, step):
        model.train(mode == "train")
        loss = model(XG).pow(2).mean()
        if clear == "before_backward":  # the order of many training loops
            optimizer.zero_grad()
        loss.backward()

    assert compare(lambda: Tied(before, bias), run) <= CLOSE


def whole(model, x):
    return reentrant(model, x)


PATTERNS = {
    "one": lambda m: whole(m, XG),
    "two": lambda m: whole(m, XG) + whole(m, 2 * XG),
    "then_plain": lambda m: m(whole(m, XG)),
    "plain_then": lambda m: whole(m, m(XG)),
    "plain": lambda m: m(XG),
    "nested": lambda m: reentrant(lambda x: whole(m, x), XG),
    "nested_and_plain": lambda m: reentrant(lambda x: m(whole(m, x)), XG) + m(XG),
    "two_in_one": lambda m: reentrant(lambda x: m(m(x)), XG),
}


@pytest.mark.parametrize("second", PATTERNS)
@pytest.mark.parametrize("first", PATTERNS)
def test_the_pattern_may_change_between_steps(first, second):
    def run(model, optimizer, step):
        PATTERNS[first if step < 1 else second](model).pow(2).mean().backward()

    make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))  # noqa: E731
    assert compare(make, run, 3) <= CLOSE


def test_a_weight_outside_checkpoints_does_not_wait():
    """Even in the first step: only what a checkpoint will read again has to wait."""
    model = nn.ModuleDict({"inner": nn.Linear(6, 6), "head": nn.Linear(6, 6, bias=False)}).double()
    gradfold.fold(model, ours(model))
    before = model["head"].weight.clone()
    moved = []
    h = reentrant(model["inner"], XG)
    h.register_hook(lambda grad: moved.append(not torch.equal(before, model["head"].weight)))
    model["head"](h).sum().backward()
    assert moved == [True]


def test_each_checkpointed_weight_steps_as_its_checkpoint_ends():
    model = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)]).double()
    gradfold.fold(model, ours(model))
    start = [p.clone() for p in model.parameters()]
    moved = []
    x = XG * 1
    for layer in model:
        x = reentrant(layer, x)
        x.register_hook(
            lambda grad: moved.append([not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True)])
        )
    x.sum().backward()
    assert moved == [[False, False, False], [False, False, True], [False, True, True]]


def test_a_detached_branch_that_reads_a_stepped_weight_is_refused():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            h = checkpoint(lambda z: self.a(z) + self.b(z).detach(), x, use_reentrant=False)
            return self.b(h)

    model = Branch().double()
    gradfold.fold(model, ours(model))
    with pytest.raises(gradfold.FoldError, match=r"b\.weight: read again inside the backward that has already stepped"):
        model(XG).sum().backward()


def test_second_backward_through_checkpoints_touches_nothing():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.a, self.b = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            h = reentrant(self.trunk, x)
            return self.a(h).sum(), self.b(h).sum()

    model = Heads().double()
    gradfold.fold(model, ours(model))
    first, second = model(XG)
    first.backward(retain_graph=True)
    _, copy = twins(lambda: model)
    with pytest.raises(gradfold.FoldError, match="second backward"):
        second.backward()
    assert same_bits(model, copy)
