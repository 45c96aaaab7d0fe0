"""The reference backend's memory: what it borrows is bounded, held from the start, and never the whole gradient."""

import pytest
import torch
from torch import nn

import gradfold
from gradfold.backends import (
    DEFAULT_SCRATCH_BYTES,
    DenseTerm,
    MatmulTerm,
    Reference,
    Scratch,
    Stored,
    choose,
    row_blocks,
)
from gradfold.backends.scratch import TILE_ALIGNMENT
from gradfold.planner.trace import LiveBytes
from tests.cases import BUSY, each_rule, each_state_set

KIB, MIB = 2**10, 2**20


def steps(row, weight, uses, scratch_bytes):
    """One step straight through the backend; the most scratch memory it held, in bytes."""
    optimizer = row.ours([nn.Parameter(weight)])
    group, rule = optimizer.param_groups[0], optimizer.rule
    backend = Reference(Scratch(scratch_bytes))
    states = [torch.full_like(weight, spec.init) for spec in rule.states(group)]
    counters = {name: torch.tensor(start) for name, start in rule.counters.items()}
    with torch.no_grad():
        backend.step(
            Stored.plain(weight),
            list(map(Stored.plain, states)),
            uses,
            rule,
            group,
            rule.advance(counters, group, True),
        )
    return sum(tensor.numel() for tensor in backend.scratch_tensors())


def tiles_of(row, weight):
    """How many tiles the plain path borrows at most: gradient, temporaries, a copy of the weight and of each state."""
    optimizer = row.ours([nn.Parameter(torch.zeros(1))])
    copied = weight.dtype.itemsize < 4 or not weight.is_contiguous()
    return 1 + optimizer.rule.scratch_tiles(optimizer.param_groups[0]) + copied * (1 + state_count(row))


def state_count(row):
    optimizer = row.ours([nn.Parameter(torch.zeros(1))])
    return len(optimizer.rule.states(optimizer.param_groups[0]))


WEIGHTS = {
    "float64": lambda: torch.randn(41, 21, dtype=torch.float64),
    "float32": lambda: torch.randn(60, 31),
    "bfloat16": lambda: torch.randn(60, 31, dtype=torch.bfloat16),
    "transposed": lambda: torch.randn(31, 60).t(),
    "vector": lambda: torch.randn(301),
    "conv": lambda: torch.randn(12, 4, 3, 3),
    "one row": lambda: torch.randn(1, 300),
}


@each_state_set
@pytest.mark.parametrize("kind", WEIGHTS)
def test_scratch_is_bounded_as_long_as_a_row_fits(row, kind):
    weight = WEIGHTS[kind]()
    tiles, row_bytes = tiles_of(row, weight), weight[0].numel() * max(4, weight.dtype.itemsize)
    use = DenseTerm(torch.randn(weight.shape, dtype=torch.float64))
    for scratch_bytes in (1, tiles * row_bytes, 8 * tiles * row_bytes + 13, 64 * KIB):
        held = steps(row, weight.clone(), [use], scratch_bytes)
        assert held <= max(scratch_bytes, tiles * (row_bytes + TILE_ALIGNMENT))


def test_scratch_is_bounded_to_the_byte():
    """What tiles are rounded up by counts too, at any limit from the first in which two tiles of a row fit."""
    weight, use = torch.randn(12, 25), DenseTerm(torch.randn(12, 25))
    least = steps(BUSY["NAdam"], weight, [use], 1)
    for scratch_bytes in range(least, 12 * least, 7):
        assert steps(BUSY["NAdam"], weight, [use], scratch_bytes) <= scratch_bytes


def test_default_scratch_is_8_mib():
    model = nn.Linear(8, 8)
    gradfold.fold(model, gradfold.AdamW(model.parameters()))
    assert DEFAULT_SCRATCH_BYTES == 8 * MIB
    assert choose("auto", DEFAULT_SCRATCH_BYTES).scratch.limit_bytes == 8 * MIB


def test_blocks_keep_the_gemm_efficient_where_the_limit_allows():
    """At least 64 rows, however wide."""
    scratch = Scratch(DEFAULT_SCRATCH_BYTES)
    for rows, columns in ((4096, 4096), (4096, 16384), (50000, 128), (63, 1000), (1, 10)):
        block = row_blocks.block_rows(scratch, rows, columns, 1, torch.float32)
        assert min(rows, row_blocks.MIN_BLOCK_ROWS) <= block <= rows
        assert block * columns * 4 <= DEFAULT_SCRATCH_BYTES


# while a folded model trains ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Embedding and head share a weight; a norm and a convolution take the hooked route."""

    def __init__(self, rows, width, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(rows, width, dtype=dtype)
        self.conv = nn.Conv1d(width, width, 3, padding=1, dtype=dtype)
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.head = nn.Linear(width, rows, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = self.norm(x + self.conv(x.transpose(-1, -2)).transpose(-1, -2))
        return self.head(x).logsumexp(-1).mean()


def scratch_of(fold):
    return sum(tensor.numel() * tensor.element_size() for tensor in fold.scratch_tensors())


def train_and_watch(model, optimizer, scratch_bytes):
    """Bytes of scratch memory before the first step and after two."""
    fold = gradfold.fold(model, optimizer, scratch_bytes=scratch_bytes)
    before = scratch_of(fold)
    for _ in range(2):
        model(torch.randint(0, 9, (2, 5))).sum().backward()
        optimizer.step()
    return before, scratch_of(fold)


@each_state_set
@pytest.mark.parametrize("scratch_bytes", [3 * KIB, DEFAULT_SCRATCH_BYTES])
def test_scratch_is_held_from_the_start(row, scratch_bytes):
    """What fits is known before the first step: backward borrows, it does not allocate."""
    model = Tied(40, 24)
    before, after = train_and_watch(model, row.ours(model.parameters()), scratch_bytes)
    assert 0 < before == after


@each_state_set
@pytest.mark.parametrize("scratch_bytes", [3 * KIB, DEFAULT_SCRATCH_BYTES])
def test_scratch_is_held_from_the_start_in_low_precision(row, scratch_bytes):
    model = Tied(40, 24, torch.bfloat16)
    before, after = train_and_watch(model, row.ours(model.parameters()), scratch_bytes)
    assert 0 < before == after


def test_scratch_is_held_from_the_start_for_a_strided_weight():
    model = nn.Embedding(40, 24)
    model.weight = nn.Parameter(torch.randn(24, 40).t())
    before, after = train_and_watch(model, gradfold.AdamW(model.parameters()), DEFAULT_SCRATCH_BYTES)
    assert before == after


def test_scratch_is_held_from_the_start_at_an_awkward_limit():
    model = nn.Embedding(9, 32)
    before, after = train_and_watch(model, gradfold.AdamW(model.parameters()), 9 * 32 * 4)
    assert before == after


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_embeddings_gradient_never_exists_whole(row, dtype):
    """One row block at a time, while the rule still reaches every row."""
    rows, width, limit = 3000, 64, 64 * KIB
    model = nn.Embedding(rows, width, dtype=dtype)
    optimizer = row.ours(model.parameters())
    gradfold.fold(model, optimizer, scratch_bytes=limit)
    model(torch.randint(0, rows, (50,))).square().sum().backward()
    optimizer.step()  # SGD's buffer is an optimizer state from now on
    before = model.weight.detach().clone()
    loss = model(torch.randint(0, rows, (50,))).square().sum()
    with LiveBytes() as live:
        live.track(model, optimizer)
        standing = live.now_bytes
        loss.backward()
    optimizer.step()
    tokens = 5 * 50 * width * 4  # dY and what it is made of
    assert live.peak_bytes - standing <= limit + tokens + 8 * KIB < rows * width * dtype.itemsize
    moved = (model.weight.detach() != before).any(1).float().mean()
    assert moved > 0.99 or row.name == "Rprop", "the rule must reach rows not looked up"  # Rprop: sign(0) moves nothing


@each_rule
def test_a_product_never_exists_whole(row):
    T, N, K, limit = 8, 600, 128, 64 * KIB
    weight = torch.randn(N, K)
    optimizer = row.ours([nn.Parameter(weight)])
    group, rule = optimizer.param_groups[0], optimizer.rule
    states = [torch.full_like(weight, spec.init) for spec in rule.states(group)]
    numbers = rule.advance({name: torch.tensor(v) for name, v in rule.counters.items()}, group, True)
    backend, dY, X = Reference(Scratch(limit)), torch.randn(T, N), torch.randn(T, K)
    with torch.no_grad(), LiveBytes() as live:
        live.track(weight, states, dY, X)
        standing = live.now_bytes
        backend.step(Stored.plain(weight), list(map(Stored.plain, states)), [MatmulTerm(dY, X)], rule, group, numbers)
    assert live.peak_bytes - standing <= limit + KIB < N * K * 4


def test_scratch_is_shared_by_all_parameters():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
    fold = gradfold.fold(model, gradfold.AdamW(model.parameters()))
    assert len(fold.scratch_tensors()) == 1
    assert scratch_of(fold) <= 2 * 64 * 64 * 4 + 2 * TILE_ALIGNMENT
