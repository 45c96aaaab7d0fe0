"""A batch whose memory is used again before the step: terms that wait keep copies of what autograd did not make."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import gradfold
from gradfold.errors import FoldError
from tests.pairs import each_pair
from tests.zoo import distance

T, H, N, V = 3, 8, 64, 40


def through(array):
    """Return a function that writes into this memory without torch's knowledge."""
    return lambda values: np.copyto(array, values)


def from_numpy(zeros):
    return torch.from_numpy(zeros), through(zeros)


def from_buffer(zeros):
    memory = bytearray(zeros.nbytes)
    tensor = torch.frombuffer(memory, dtype=torch.from_numpy(zeros).dtype).view(zeros.shape)
    return tensor, through(np.frombuffer(memory, zeros.dtype).reshape(zeros.shape))


def from_dlpack(zeros):
    return torch.from_dlpack(zeros), through(zeros)


def shown_to_numpy(zeros):
    tensor = torch.from_numpy(zeros).clone()
    return tensor, through(tensor.numpy())


def in_shared_memory(zeros):
    tensor = torch.from_numpy(zeros).clone().share_memory_()
    return tensor, through(tensor.numpy())


def refilled(zeros):
    """A static input buffer, as CUDA graphs need."""
    tensor = torch.from_numpy(zeros).clone()
    return tensor, lambda values: tensor.detach().copy_(torch.from_numpy(values))


def through_data(zeros):
    tensor = torch.from_numpy(zeros).clone()
    return tensor, lambda values: tensor.data.copy_(torch.from_numpy(values))


def row_of_a_file(zeros):
    """Memory that is far larger than the gradient."""
    array = np.zeros((5000, *zeros.shape), zeros.dtype)
    return torch.from_numpy(array)[7], through(array[7])


def views_of_a_leaf(zeros):
    """An input that is trained itself, as adversarial ones are."""
    leaf = torch.from_numpy(zeros)
    leaf = leaf.requires_grad_() if leaf.is_floating_point() else leaf
    return leaf.flatten().view(zeros.shape), through(zeros)


MEMORY = {
    "numpy": from_numpy,
    "frombuffer": from_buffer,
    "DLPack": from_dlpack,
    "shown to numpy": shown_to_numpy,
    "shared": in_shared_memory,
    "refilled": refilled,
    "data": through_data,
    "row of a file": row_of_a_file,
    "views of a leaf": views_of_a_leaf,
}


class Shared(nn.Module):
    """Two weights read one view of the batch, and a third what autograd made of it."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.above = nn.Linear(H, N), nn.Linear(H, N), nn.Linear(N, N)

    def forward(self, x):
        x = x.flatten(0, 0)  # a view
        return self.above(self.one(x).tanh() * self.other(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(H, V, bias=False)

    def forward(self, x, labels):
        return gradfold.linear_cross_entropy(x, self.head.weight, labels)


FLOATS, IDS = ((T, H), "float64"), ((T,), "int64")
READERS = {
    "Linear": (lambda: nn.Linear(H, N), [FLOATS]),
    "shared": (Shared, [FLOATS]),
    "Conv1D": (lambda: Conv1D(N, H), [FLOATS]),
    "Embedding": (lambda: nn.Embedding(V, 32), [IDS]),
    "head": (Head, [FLOATS, IDS]),
    "hooked": (lambda: nn.LayerNorm(H), [FLOATS]),
}
OPTIONS = {
    "accumulate": {"accumulate": 2},
    "accumulating": {},
    "clip": {"clip_norm": 0.1},
    "deferred": {"timing": "deferred"},
    "value": {"accumulate": 2, "clip_value": 0.01},
    "both, on the host": {"accumulate": 2, "clip_norm": 0.1, "tape": "host"},
}


def fresh(kind, seed):
    shape, dtype = kind
    rng = np.random.default_rng(seed)
    return rng.integers(0, V, shape) if dtype == "int64" else rng.normal(size=shape)


def weighted(out):
    """A loss whose gradient differs from element to element."""
    return (out * torch.linspace(0.5, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum()


def plain_and_folded(make):
    torch.manual_seed(0)
    plain = make().double()
    folded = copy.deepcopy(plain)
    return plain, folded


def run(
    model,
    optimizer,
    buffers,
    micro,
    accumulating=contextlib.nullcontext,
    clip=lambda model: None,
    call=lambda model, *xs: model(*xs),
):
    """Two steps; before each, the memory of every micro-batch is overwritten."""
    for step in range(2):
        for index in range(micro):
            for number, (kind, (_, fill)) in enumerate(buffers):
                fill(fresh(kind, 100 * step + 10 * index + number))
            with accumulating() if index < micro - 1 else contextlib.nullcontext():
                weighted(call(model, *(tensor for _, (tensor, _) in buffers))).backward()
            for kind, (_, fill) in buffers:
                fill(fresh(kind, 999))
        clip(model)
        optimizer.step()
        optimizer.zero_grad()


@each_pair(memory=MEMORY, reader=READERS, options=OPTIONS)
def test_exact(memory, reader, options):
    make, kinds = READERS[reader]
    plain, folded = plain_and_folded(make)
    given = OPTIONS[options]
    micro = 1 if options in ("clip", "deferred") else 2

    def clip(model):
        if limit := given.get("clip_norm"):
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        if limit := given.get("clip_value"):
            nn.utils.clip_grad_value_(model.parameters(), limit)

    def buffers():
        return [(kind, MEMORY[memory](np.zeros(*kind))) for kind in kinds]

    run(plain, torch.optim.SGD(plain.parameters(), lr=0.1), buffers(), micro, clip=clip)
    optimizer = gradfold.SGD(folded.parameters(), lr=0.1)
    fold = gradfold.fold(folded, optimizer, **given)
    run(folded, optimizer, buffers(), micro, fold.accumulating if options == "accumulating" else contextlib.nullcontext)
    assert distance(folded, plain) <= 1e-12


@pytest.mark.parametrize("options", [{"accumulate": 2}, {}], ids=["accumulate", "plain"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_in_a_checkpoint(reentrant, options):
    """Which gives its layers a detached input, and saves tensors without their history."""
    plain, folded = plain_and_folded(Shared)

    def call(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    def buffers():
        return [(FLOATS, views_of_a_leaf(np.zeros((T, H))))]

    micro = options.get("accumulate", 1)
    run(plain, torch.optim.SGD(plain.parameters(), lr=0.1), buffers(), micro, call=call)
    optimizer = gradfold.SGD(folded.parameters(), lr=0.1)
    gradfold.fold(folded, optimizer, **options)
    run(folded, optimizer, buffers(), micro, call=call)
    assert distance(folded, plain) <= 1e-12


@pytest.mark.parametrize("memory", [name for name in MEMORY if name != "views of a leaf"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(H, N), lambda: nn.LayerNorm(H)], ids=["folded", "hooked"])
def test_a_gradient_that_backward_was_given(make, memory):
    """Pipelines give ``backward(gradient=...)`` a buffer of their own, and autograd passes it on as it is."""
    plain, folded = plain_and_folded(make)
    optimizer = gradfold.SGD(folded.parameters(), lr=0.1)
    gradfold.fold(folded, optimizer, accumulate=2)
    xs = torch.randn(2, T, H, dtype=torch.float64)
    width = plain(xs[0]).shape[-1]
    for model in (plain, folded):
        grad, fill = MEMORY[memory](np.zeros((T, width)))
        for index, x in enumerate(xs):
            fill(fresh(((T, width), "float64"), index))
            model(x).view_as(grad).backward(grad)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    optimizer.step()
    assert distance(folded, plain) <= 1e-12


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "checkpoint"])
def test_only_the_batch_is_copied_and_only_once(reentrant):
    """Not what autograd has made, also where a checkpoint makes it again."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(V, N)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x) if reentrant is None else checkpoint(block, x, use_reentrant=reentrant)
            return x

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.q, self.k = nn.LayerNorm(N), nn.Linear(N, N), nn.Linear(N, N)

        def forward(self, x):
            x = self.norm(x)
            return self.q(x).tanh() * self.k(x)

    model = Net()
    optimizer = gradfold.SGD(model.parameters(), lr=0.1)
    fold = gradfold.fold(model, optimizer, accumulate=2)
    model(torch.arange(T)).square().sum().backward()
    copies = [made() for _, made in fold._state.step.copies._made.values()]
    assert [tuple(one.shape) for one in copies if one is not None] == [(T,)]


def test_what_a_cuda_graph_returned_is_copied():
    """Each replay overwrites it, though it has a history."""

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad

    Graphed.__module__ = torch.cuda.graphs.__name__
    for function, copies in ((Graphed, 1), (None, 0)):
        model = nn.Linear(H, N)
        optimizer = gradfold.SGD(model.parameters(), lr=0.1)
        fold = gradfold.fold(model, optimizer, timing="deferred")
        x = torch.randn(T, H, requires_grad=True)
        hidden = x * 1 if function is None else function.apply(x)
        model(hidden.view(T, H)).sum().backward()
        assert len(fold._state.step.copies._made) == copies
        optimizer.step()


def test_weights_that_read_one_batch_share_a_copy():
    model = nn.ModuleList(nn.Linear(N, N, bias=False) for _ in range(3))
    optimizer = gradfold.SGD(model.parameters(), lr=0.1)
    fold = gradfold.fold(model, optimizer, accumulate=3)
    x = torch.randn(T, N)
    for _ in range(2):
        torch.stack([one(x).tanh().sum() for one in model]).sum().backward()
    held = fold.tape_tensors()
    storages = {tensor.untyped_storage().data_ptr() for tensor in held}
    assert len(held) == 12 and len(storages) == 2 * (3 + 1)  # per backward three dY, and one copy of x
    assert x.untyped_storage().data_ptr() not in storages
    optimizer.zero_grad()


def test_a_batch_larger_than_the_gradient_is_not_copied():
    """Its product with dY is summed at once."""
    model = nn.Linear(H, 4, bias=False)
    optimizer = gradfold.SGD(model.parameters(), lr=0.1)
    fold = gradfold.fold(model, optimizer, accumulate=2)
    model(torch.randn(50, H)).square().sum().backward()
    assert not fold._state.step.copies._made
    (row,) = fold.report().rows
    assert (row.tape, row.tape_bytes) == ("gradient", 4 * H * 4)
    optimizer.zero_grad()


def test_an_activation_changed_in_place_is_refused():
    """What autograd has made is not copied, and torch knows of the change."""
    model = nn.Sequential(nn.Linear(H, N), nn.Sequential(), nn.Linear(N, N))
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer, accumulate=2)
    kept = []
    model[1].register_forward_hook(lambda module, args, out: kept.append(out.detach()))
    model(torch.randn(2, H)).sum().backward()
    kept[0].zero_()
    with pytest.raises(FoldError, match=r"2\.weight.*changed in place.*clone"):
        model(torch.randn(2, H)).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
