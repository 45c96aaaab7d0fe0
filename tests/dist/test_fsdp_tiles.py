"""FSDP2 whose large gradients are averaged inside the fold, against torch's AdamW on one process in fp64."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradfold
from gradfold.dist.messages import HEADER, Route
from gradfold.dist.tokens import tiles_bytes, tokens_bytes
from gradfold.errors import FoldError
from tests.dist.test_fsdp import mesh_of, part, sharded
from tests.dist.tiny import HYPER, LAYERS, alone, batch, furthest, loss_of, tiny
from tests.dist.world import collectives

BYTES = 2048  # of a tile: the largest weight of Tiny has 16 KiB
LARGE = 1 << 24


def train(data="tile", accumulate=1, clip=None, summed="fold", scratch=BYTES, model_options=None, mesh=None, **options):
    """Return differences of weights and norms to one process, what keeps a ``.grad``, and what is sent by whom.

    Args:
        data: of ``fold``.
        accumulate: how many micro-batches a step sums.
        clip: the largest norm.
        summed: by ``fold(accumulate=)``, by ``fold.accumulating()`` ("context"), or by FSDP2 ("no_sync").
        scratch: bytes of scratch memory, and of a tile.
        model_options: of the Tiny.
        mesh: a shape.
        **options: of ``fold``, or of ``fully_shard``.
    """
    sharding = {key: options.pop(key) for key in ("reshard_after_forward", "mp_policy") if key in options}
    model_options = model_options or {}
    reference, norms = alone(3, accumulate, clip, **model_options)
    model = sharded(tiny(**model_options), mesh_of(*(mesh or ())), **sharding)
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(
        model,
        optimizer,
        accumulate=accumulate if summed == "fold" else 1,
        clip_norm=clip,
        head="plain",
        data=data,
        scratch_bytes=scratch,
        **options,
    )
    differences = []
    for step in range(3):
        for micro in range(accumulate):
            ids, labels = part(batch(step, micro))
            last = micro == accumulate - 1
            if summed == "no_sync":
                model.set_requires_gradient_sync(last)
            loss = loss_of(model(ids), labels) / accumulate
            if summed == "context" and not last:
                with fold.accumulating():
                    fold.backward(loss)
            else:
                fold.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        differences.append(abs(fold.grad_norm - norms[step]))
    left = [name for name, param in model.named_parameters() if param.grad is not None]
    routes = sum(param.folded for param in fold._state.params.values())
    memory = sum(one.nbytes for one in fold._state.reducer.buffers.tensors()) if fold._state.reducer else 0
    fold.remove()
    return furthest(model, reference), max(differences), left, routes, memory


def several(cases):
    return [train(**case) for case in cases]


def check(cases, found):
    for ranks in found:
        for case, (weights, norms, left, routes, memory) in zip(cases, ranks, strict=True):
            assert weights <= 1e-11, case
            assert norms <= 1e-12, case
            assert not left, case
            tied = (case.get("model_options") or {}).get("tied", False)
            small = case.get("scratch", BYTES) == LARGE  # all go into such a tile often enough to travel together
            assert routes == (0 if small else 2 + 7 * LAYERS - tied), case
            if case.get("scratch", BYTES) == BYTES and case.get("data", "tile") == "tile":
                assert memory <= 2 * BYTES + 1024, case  # what is sent and what comes back, with headers


CASES = [
    {},
    {"clip": 0.05, "accumulate": 2},
    {"model_options": {"tied": True, "bias": False}, "reshard_after_forward": False, "accumulate": 3},
    {"data": "tokens"},
    {"data": "tokens", "clip": 0.05, "accumulate": 2},
]
MORE = [
    {"data": data, "accumulate": accumulate, "clip": clip, "scratch": scratch, **options}
    for data in ("tile", "tokens", "auto")
    for scratch in (256, BYTES, LARGE)
    for accumulate, clip in ((1, None), (3, None), (1, 0.05), (3, 0.05))
    for options in (
        {},
        {"reshard_after_forward": False},
        {"model_options": {"tied": True, "bias": False}},
        {"model_options": {"checkpoint": False, "bias": False}},
        {"model_options": {"checkpoint": True}},
        {"summed": "no_sync"},
        {"summed": "context"},
        {"on_nonfinite": "ignore"},
        {"timing": "deferred"},
    )
    if scratch == BYTES or not (options or clip or data != "tile")
]


def test_as_on_one_process(two):
    check(CASES, two.run(several, CASES))


@pytest.mark.slow
@pytest.mark.parametrize("world", ["two", "four"])
@pytest.mark.parametrize("first", range(0, len(MORE), 10))
def test_all_as_on_one_process(request, world, first):
    cases = MORE[first : first + 10]
    check(cases, request.getfixturevalue(world).run(several, cases, timeout_s=600))


@pytest.mark.slow
def test_two_copies_of_two_shards(four):
    cases = [{"mesh": (2, 2)}, {"mesh": (2, 2), "clip": 0.05, "accumulate": 2}]
    check(cases, four.run(several, cases))


# what is sent, and what is kept ---------------------------------------------------------------------------------------


def messages(data):
    """Return the shapes of what is sent in one step, by operation, and what FSDP2 sums by itself."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    model = sharded(tiny(), mesh_of())
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, head="plain", data=data, scratch_bytes=BYTES)
    plain, left = _fsdp_param_group.foreach_reduce, []

    def spy(params, grads, *args, **options):
        left.append(sum(grad.numel() for grad in grads))
        return plain(params, grads, *args, **options)

    _fsdp_param_group.foreach_reduce = spy
    try:
        for step in range(2):
            left.clear()
            ids, labels = part(batch(step))
            with collectives() as seen:
                loss_of(model(ids), labels).backward()
                optimizer.step()
            optimizer.zero_grad()
    finally:
        _fsdp_param_group.foreach_reduce = plain
    sizes = {}
    for name, shapes in seen:
        sizes.setdefault(name, []).append(sum(math.prod(shape) for shape in shapes[1:2]))
    memory = sum(one.numel() for one in fold._state.reducer.buffers.tensors())
    fold.remove()
    return sizes, sum(left), memory, list(ids.shape)


def test_messages_are_as_large_as_the_formulas_say(two):
    ranks, header = 2, HEADER
    named = list(tiny().named_parameters())
    others = sum(p.numel() for _, p in named if p.dim() < 2)
    weights = [p.shape for _, p in named if p.dim() == 2]
    most = BYTES // 8
    height = {shape: min(shape[0] // ranks, most // (shape[1] * ranks)) for shape in weights}
    tiles = {shape: shape[0] // ranks // height[shape] for shape in weights}
    for sizes, left, memory, _ in two.run(messages, "tile"):
        assert left == others  # FSDP2 sums norms and biases only
        expected = sum(math.prod(shape) + tiles[shape] * ranks * header for shape in weights)
        assert sum(sizes["c10d._reduce_scatter_base_.default"]) == expected + others
        assert memory <= 2 * most + 3 * header  # two tiles, and no gradient that is larger
        assert "c10d.alltoall_base_.default" not in sizes
    embedding = named[0][1].shape
    for sizes, left, _, (rows, length) in two.run(messages, "tokens"):
        tokens = rows * length + 1
        assert left == others
        expected = math.prod(embedding) + tiles[embedding] * ranks * header  # which has no product
        assert sum(sizes["c10d._reduce_scatter_base_.default"]) == expected + others
        assert sum(sizes["c10d.alltoall_base_.default"]) == sum(tokens * n for n, _ in weights[1:])
        assert sum(size for size in sizes["c10d._allgather_base_.default"] if size % tokens == 0) == sum(
            tokens * k for _, k in weights[1:]
        )


@pytest.mark.parametrize(
    ("shape", "tokens", "better"),
    [
        pytest.param((14336, 4096), 2480, "tokens", id="gate"),
        pytest.param((14336, 4096), 2500, "tiles", id="gate-many"),
        pytest.param((1024, 4096), 230, "tokens", id="k"),
        pytest.param((1024, 4096), 260, "tiles", id="k-many"),
        pytest.param((128256, 4096), 6500, "tokens", id="head"),
        pytest.param((128256, 4096), 6600, "tiles", id="head-many"),
    ],
)
def test_which_of_the_two_sends_less(shape, tokens, better):
    route = Route(None, 0, 8, 8.0, True)
    found = tokens_bytes(route, *shape, tokens, 2) < tiles_bytes(route, *shape, 4)
    assert found == (better == "tokens")


# shards that are not alike --------------------------------------------------------------------------------------------


def narrow():
    """Return a model whose weights have 5, 3 and 1 rows: of two ranks one has fewer, or none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def uneven(options):
    from torch.distributed.fsdp import fully_shard

    rank, size = dist.get_rank(), dist.get_world_size()
    plain, model = narrow(), fully_shard(narrow(), mesh=mesh_of())
    optimizer, torchs = gradfold.AdamW(model.parameters(), **HYPER), torch.optim.AdamW(plain.parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, data="tile", scratch_bytes=256, **options)
    folded = [name for name, param in model.named_parameters() if fold._state.params[id(param)].folded]
    for step in range(3):
        # ranks have other numbers of tokens
        ids = [torch.arange(2 + 3 * at) * (step + 3) % 5 for at in range(size)]
        model(ids[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        (sum(plain(one).square().mean() for one in ids) / size).backward()
        norm = float(nn.utils.clip_grad_norm_(plain.parameters(), options.get("clip_norm") or float("inf")))
        torchs.step()
        torchs.zero_grad()
        assert abs(fold.grad_norm - norm) <= 1e-12
    fold.remove()
    return furthest(model, plain), folded


def unevens(cases):
    return [uneven(options) for options in cases]


@pytest.mark.parametrize("world", ["two", pytest.param("four", marks=pytest.mark.slow)])
def test_uneven_and_empty_shards(request, world):
    cases = [{}, {"clip_norm": 0.1}, {"on_nonfinite": "skip"}]
    for ranks in request.getfixturevalue(world).run(unevens, cases):
        for difference, folded in ranks:
            assert difference <= 1e-11
            assert folded == ["0.weight", "1.weight", "3.weight"]


# refusals -------------------------------------------------------------------------------------------------------------


def say(call):
    try:
        call()
    except FoldError as error:
        return str(error)
    return None


def refusals():
    from torch.distributed.fsdp import fully_shard

    plain = nn.Linear(2, 2)
    said = {"plain": say(lambda: gradfold.fold(plain, gradfold.AdamW(plain.parameters()), data="tile", group="alone"))}
    model = fully_shard(nn.Linear(4, 4), mesh=mesh_of())
    optimizer = gradfold.AdamW(model.parameters())
    said["other"] = say(lambda: gradfold.fold(model, optimizer, data="rows"))
    chunks = gradfold.WorkingSet(chunks=2)
    said["sliced"] = say(lambda: gradfold.fold(model, optimizer, data="tile", working_set=chunks))
    return said


WORDS = {"plain": "under fully_shard", "other": "data='rows': one of 'hook'", "sliced": "with working_set="}


def test_refusals(two):
    for said in two.run(refusals):
        assert said.keys() == WORDS.keys()
        for kind, words in WORDS.items():
            assert words in (said[kind] or ""), kind
