"""Shards step as the same elements of the whole do: stored codes, random bits, other modules than Linear."""

import pytest
import torch
from torch import nn

import gradfold
from tests.dist.parts import said
from tests.dist.test_tensor_parallel import mesh_of_all

ROWS, COLUMNS = 256, 512
STORED = {"states": "int8", "rounding": "stochastic", "master": "split8", "small_size": 0, "seed": 3}


class Sum(nn.Module):
    """Products of small whole numbers, whose sums are exact in any order: a rank's gradient is the whole one's part."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(ROWS, COLUMNS)
        self.rows = nn.Linear(COLUMNS, ROWS, bias=False)
        self.columns = nn.Linear(COLUMNS, ROWS, bias=False)
        self.to(torch.bfloat16)


def gradients(model, step):
    """Bring whole numbers as gradients to the three weights, through folded modules."""
    random = torch.Generator().manual_seed(step)
    ids = torch.randint(0, ROWS, (8,), generator=random)
    x, y = (torch.randint(-3, 4, (8, n), generator=random).to(torch.bfloat16) for n in (COLUMNS, ROWS))
    z = torch.randint(-3, 4, (8, COLUMNS), generator=random).to(torch.bfloat16)
    outputs = [model.embed(ids), model.rows(x), model.columns(x)]
    return outputs, [z, y, y]


def backward(model, step):
    from torch.distributed.tensor import DTensor, Replicate

    outputs, grads = gradients(model, step)
    for output, grad in zip(outputs, grads, strict=True):
        if isinstance(output, DTensor):
            grad = DTensor.from_local(grad, output.device_mesh, [Replicate()], run_check=False)
        output.backward(grad, retain_graph=True)


def stored():
    """Return which parts of weights and states differ from one process's after three steps."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    everywhere = {"input_layouts": Replicate(), "use_local_output": False}
    plan = {
        "embed": RowwiseParallel(output_layouts=Replicate(), **everywhere),
        "rows": ColwiseParallel(output_layouts=Replicate(), **everywhere),
        "columns": RowwiseParallel(output_layouts=Replicate(), **everywhere),
    }
    models = [Sum(), parallelize_module(Sum(), mesh_of_all(), plan)]
    optimizers = []
    for model, group in zip(models, ("alone", None), strict=True):
        optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, **STORED)
        fold = gradfold.fold(model, optimizer, group=group, accumulate=3)
        for step in range(3):
            outputs, grads = gradients(model, step)
            for output, grad in zip(outputs, grads, strict=True):
                output.backward(spread_as(output, grad))
            optimizer.step()
            optimizer.zero_grad()
        fold.remove()
        optimizers.append(optimizer)
    differ, compared = [], 0
    for (name, whole), (_, part) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        dim = part.placements[0].dim
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        pairs = {"weight": (whole.detach(), part.to_local().detach())}
        theirs = optimizers[1].state[part]
        pairs |= {key: (value, theirs[key]) for key, value in optimizers[0].state[whole].items()}
        for key, (value, mine) in pairs.items():
            expected = value if value.dim() == 0 else value.chunk(size, dim)[rank]
            compared += 1
            if not torch.equal(expected, mine):
                differ.append(f"{name} {key}: {int((expected != mine).sum())} of {mine.numel()}")
    return differ, compared


def spread_as(output, grad):
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(output, DTensor):
        return grad
    return DTensor.from_local(grad, output.device_mesh, [Replicate()], run_check=False)


def test_bits_are_those_of_one_process(two):
    for differ, compared in two.run(stored):
        assert not differ
        assert compared >= 3 * 6


@pytest.mark.slow
def test_bits_on_four_ranks(four):
    for differ, _ in four.run(stored):
        assert not differ


# other modules --------------------------------------------------------------------------------------------------------


def conv1d(dim):
    """transformers' transposed Linear, cut by hand: torch's styles know no Conv1D."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from transformers.pytorch_utils import Conv1D

    mesh = mesh_of_all()
    torch.manual_seed(0)
    whole, spread = Conv1D(8, 12).double(), Conv1D(8, 12).double()
    spread.load_state_dict(whole.state_dict())
    spread.weight = nn.Parameter(distribute_tensor(spread.weight.detach(), mesh, [Shard(dim)]))
    bias = [Shard(0)] if dim == 1 else [Replicate()]
    spread.bias = nn.Parameter(distribute_tensor(spread.bias.detach(), mesh, bias))
    plain = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    optimizer = gradfold.AdamW(spread.named_parameters(), lr=1e-2)
    fold = gradfold.fold(spread, optimizer)
    for step in range(3):
        x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        whole(x).pow(2).sum().backward()
        plain.step()
        plain.zero_grad()
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        if dim == 0:
            x = x.redistribute(placements=[Shard(2)])
        y = spread(x)
        if dim == 0:
            y = y.redistribute(placements=[Replicate()])
        y.pow(2).sum().full_tensor().backward()
        optimizer.step()
        optimizer.zero_grad()
    routes = {row.name: row.route for row in fold.report().rows}
    fold.remove()
    away = max(
        float((a.detach().full_tensor() - b.detach()).abs().max())
        for a, b in zip(spread.parameters(), whole.parameters(), strict=True)
    )
    return away, routes["weight"]


@pytest.mark.parametrize("dim", [0, 1])
def test_conv1d(two, dim):
    for away, route in two.run(conv1d, dim):
        assert away <= 1e-11
        assert route == "folded"


def refused():
    """Shards in several pieces: of a convolution's kernels, and of two weights in one."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, found = mesh_of_all(), []
    conv = nn.Conv2d(3, 4, 6)
    conv.weight = nn.Parameter(distribute_tensor(conv.weight.detach(), mesh, [Shard(2)]))
    packed = nn.Linear(8, 16, bias=False)
    packed.weight = nn.Parameter(distribute_tensor(packed.weight.detach(), mesh, [_StridedShard(0, split_factor=2)]))
    for model in (conv, packed):
        found.append(said(lambda m=model: gradfold.fold(m, gradfold.AdamW(m.named_parameters()))))
    return found


def test_shards_in_several_pieces(two):
    for conv, packed in two.run(refused):
        assert "weight: of shape (4, 3, 6, 6), cut along dimension 2" in conv
        assert "weight: 2 weights packed in one" in packed


# tokens that are spread, shards of unequal size -----------------------------------------------------------------------


class Words(nn.Module):
    """Word vectors and a Linear, with sizes that two and four ranks cut unequally, or not at all."""

    def __init__(self, words=7, outputs=5):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(words, 6, padding_idx=2)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.head = nn.Linear(6, outputs)
        self.double()

    def forward(self, ids):
        return self.head(self.embed(ids) * self.scale)


def words(kind, outputs=5):
    """Return the distance from one process, and the routes of the weights.

    Args:
        kind: "tokens": parameters are whole on all ranks, and each rank has some of the batch, as DTensors. "rows":
            the Linear and the vocabulary are cut. "columns": word vectors are cut.
        outputs: of the Linear; fewer than ranks leave some with nothing.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of_all()
    whole, model = Words(outputs=outputs), Words(outputs=outputs)
    if kind == "tokens":
        distribute_module(model, mesh)
    else:
        embed = RowwiseParallel if kind == "rows" else ColwiseParallel
        plan = {
            "embed": embed(input_layouts=Replicate(), output_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
        }
        parallelize_module(model, mesh, plan)
    plain = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-2)
    fold = gradfold.fold(model, optimizer, clip_norm=0.5)
    apart = []
    for step in range(3):
        ids = torch.randint(0, 7, (8, 3), generator=torch.Generator().manual_seed(step))
        whole(ids).pow(2).sum().backward()
        norm = float(nn.utils.clip_grad_norm_(whole.parameters(), 0.5))
        plain.step()
        plain.zero_grad()
        if kind == "tokens":
            ids = distribute_tensor(ids, mesh, [Shard(0)])
        loss = model(ids).pow(2).sum()
        (loss.full_tensor() if isinstance(loss, DTensor) else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        apart.append(abs(fold.grad_norm - norm) / norm)
    routes = {row.name: row.route for row in fold.report().rows}
    fold.remove()
    theirs = dict(whole.named_parameters())
    away = max(
        float(((p.full_tensor() if isinstance(p, DTensor) else p).detach() - theirs[name].detach()).abs().max())
        for name, p in model.named_parameters()
    )
    return away, max(apart), routes["embed.weight"], routes["head.weight"]


def all_words():
    return {(kind, outputs): words(kind, outputs) for kind in ("tokens", "rows", "columns") for outputs in (5, 1)}


def check_words(found):
    for case, (away, norms, *routes) in found.items():
        assert away <= 1e-11, case
        assert norms <= 1e-12, case
        assert routes == ["folded", "folded"], case


def test_tokens_and_unequal_shards(two):
    for found in two.run(all_words):
        check_words(found)


@pytest.mark.slow
def test_unequal_shards_on_four_ranks(four):
    for found in four.run(all_words):
        check_words(found)


def misplaced():
    """Return how many elements of slices of shards do not lie where their place says, and how many there are."""
    from torch.distributed.tensor import Shard as Cut
    from torch.distributed.tensor import distribute_tensor

    from gradfold.engine import Region, Shard

    wrong = seen = 0
    for shape in ((8, 6), (7, 5), (4, 6, 3)):
        numbers = torch.arange(torch.Size(shape).numel()).view(shape)  # each element holds its own place
        for dim in (0, 1):
            shard = Shard("w", distribute_tensor(numbers, mesh_of_all(), [Cut(dim)]))
            here = shard.held
            # columns are only cut of matrices, as in ``workset/chunks.py``
            for along, start, stop in ((0, 1, 3), (1, 1, 2))[: 1 if len(shape) > 2 else 2]:
                region = Region(along, start, stop)
                place = shard.place_of(region.place(here.shape))
                rows = region.of(here).flatten(1)  # [rows, columns]
                expected = place.offset + torch.arange(len(rows))[:, None] * place.stride + torch.arange(rows.shape[1])
                wrong += int((rows != expected).sum())
                seen += rows.numel()
    return wrong, seen


def test_places_of_slices(two):
    """A slice of a working set is cut from a shard: its random bits are those of its place in the whole."""
    for wrong, seen in two.run(misplaced):
        assert wrong == 0
        assert seen > 50
