"""Working sets on sharded parameters, against the same elements taking turns on one process, in fp64."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gradfold
from tests.dist.test_fsdp import part, sharded
from tests.dist.test_tensor_parallel import parallel
from tests.dist.tiny import HYPER, batch, furthest, loss_of, tiny

SETS = [["embed.weight", "layers.0"], ["layers.1"], ["norm", "head"]]
SLICES = [
    ["embed.weight", ("layers.0.inner.up.weight", slice(0, 32)), "layers.1"],
    [("layers.0.inner.up.weight", slice(32, 64)), "layers.0.attention", ("head.weight", slice(None, 16))],
    ["layers.0.inner.down", "layers.0.inner.gate", "layers.0.norm1", "layers.0.norm2", "norm"],
    [("head.weight", slice(16, None))],
]


def mesh_of():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def spread(kind, **options):
    """Return a Tiny that is cut over the ranks, a context for its loss, and what a rank takes of a batch."""
    from torch.distributed.tensor.parallel import loss_parallel

    if kind == "fsdp":
        return sharded(tiny(**options), mesh_of()), contextlib.nullcontext, part
    return parallel(tiny(**options), mesh_of(), kind == "sp"), loss_parallel, list


def sets_of(model, cut):
    """Return the elements of a cut of what each rank holds as slices of whole parameters, for one process."""
    made = []
    for chunk in cut:
        made.append([])
        for name, dim, start, stop, *how in chunk:
            param = model.get_parameter(name)
            sliced = any(placement.is_shard(dim) for placement in getattr(param, "placements", ())) and bool(how)
            ranks = dist.get_world_size() if sliced else 1
            size = param.shape[dim]
            each = -(-size // ranks)
            for rank in range(ranks):
                first, last = (min(rank * each + at, (rank + 1) * each, size) for at in (start, stop))
                if first < last:
                    cuts = slice(first, last) if dim == 0 else (slice(None), slice(first, last))
                    made[-1].append((name, cuts))
    return made


def train(kind, how, steps=8, accumulate=1, clip=None, folder=None, **options):
    """Return differences of weights and norms to one process, turns that differ, and how many slices are in tensors."""
    how = {"interval": 2, **how}
    model, context, mine = spread(kind, **options)
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    where = {} if folder is None else {"folder": folder}
    fold = gradfold.fold(
        model,
        optimizer,
        accumulate=accumulate,
        clip_norm=clip,
        working_set=gradfold.WorkingSet(**how, **where),
        head="plain",
    )
    cut = optimizer.state_dict()["working_set"]["cut"]
    reference = tiny(**options)
    its = gradfold.AdamW(reference.named_parameters(), **HYPER)
    kept = {key: how[key] for key in ("interval", "order", "states", "always") if key in how}
    alone = gradfold.fold(
        reference,
        its,
        accumulate=accumulate,
        clip_norm=clip,
        working_set=gradfold.WorkingSet(by=sets_of(model, cut), **kept),
        head="plain",
        group="alone",
    )
    norms, turns = [], []
    for step in range(steps):
        for micro in range(accumulate):
            ids, labels = batch(step, micro)
            alone.backward(loss_of(reference(ids), labels) / accumulate)
            ids, labels = mine((ids, labels))
            with context():
                fold.backward(loss_of(model(ids), labels) / accumulate)
        optimizer.step()
        optimizer.zero_grad()
        its.step()
        its.zero_grad()
        norms.append(abs(fold.grad_norm - alone.grad_norm))
        if fold.working_set != alone.working_set:
            turns.append((step, fold.working_set, alone.working_set))
    trained = sum(fold.trained_per_turn())
    fold.remove()
    alone.remove()
    inside = sum(len(slice_) == 5 for chunk in cut for slice_ in chunk)
    return furthest(model, reference), max(norms), turns, inside, trained


def several(cases):
    return [train(**case) for case in cases]


def check(found):
    for weights, norms, turns, _, _ in found:
        assert weights <= 1e-11
        assert norms <= 1e-12
        assert not turns


QUICK = [
    {"kind": kind, **one}
    for kind in ("sp", "fsdp")
    for one in (
        {"how": {"chunks": 5}, "steps": 12},
        {"how": {"chunks": 5, "order": "importance", "offload": "cpu"}, "steps": 16},
        {"how": {"by": SLICES}, "clip": 0.05, "accumulate": 2},
    )
]


def test_as_on_one_process(two):
    for found in two.run(several, QUICK):
        check(found)
        assert all(inside for _, _, _, inside, _ in found)


MORE = [
    {"kind": kind, **one}
    for kind in ("tp", "sp", "fsdp")
    for one in (
        {"how": {"by": "layer"}},
        {"how": {"by": SETS}, "clip": 0.05},
        {"how": {"chunks": 4, "axis": "in"}, "accumulate": 2},
        {"how": {"chunks": 5, "order": "random", "states": "reset", "prefetch": 0}, "steps": 12},
        {"how": {"chunks": 3, "always": ["norm"]}, "bias": False},
    )
]


@pytest.mark.slow
def test_as_on_one_process_in_other_cuts(two):
    for found in two.run(several, MORE):
        check(found)


@pytest.mark.slow
def test_as_on_one_process_on_four_ranks(four):
    for found in four.run(several, QUICK):
        check(found)
    for found in four.run(several, MORE):
        check(found)


# shards of unequal sizes ----------------------------------------------------------------------------------------------


def uneven(storage, sizes, steps=12):
    """Return what differs from one process, on which the same elements take turns, where some ranks hold less."""
    from tests.dist.states import Uneven, differing, train

    model, plain = Uneven(sizes, mesh_of()), Uneven(sizes)
    optimizers = [gradfold.AdamW(one.named_parameters(), lr=1e-2, small_size=0, **storage) for one in (model, plain)]
    fold = gradfold.fold(model, optimizers[0], working_set=gradfold.WorkingSet(chunks=3, interval=2))
    cut = optimizers[0].state_dict()["working_set"]["cut"]
    by = sets_of(model, cut)
    alone = gradfold.fold(plain, optimizers[1], working_set=gradfold.WorkingSet(by=by, interval=2), group="alone")
    train(model, optimizers[0], range(steps))
    train(plain, optimizers[1], range(steps))
    saved = optimizers[0].state_dict()
    optimizers[0].load_state_dict(saved)
    train(model, optimizers[0], [steps])
    train(plain, optimizers[1], [steps])
    fold.remove()
    alone.remove()
    weights = [{name: everything_of(param) for name, param in one.named_parameters()} for one in (model, plain)]
    return differing(*weights), sum(len(slice_) == 5 for chunk in cut for slice_ in chunk)


def everything_of(param):
    return param.full_tensor() if hasattr(param, "full_tensor") else param.detach()


def uneven_ones(ranks):
    sizes = [ranks * 5 - 1, ranks + 1, 2, 1]
    return [uneven({}, sizes), uneven({"states": "int8", "rounding": "stochastic"}, sizes)]


def test_uneven_and_empty_shards(two):
    for found in two.run(uneven_ones, 2):
        assert [differs for differs, _ in found] == [[], []]
        assert all(inside for _, inside in found)


@pytest.mark.slow
def test_uneven_and_empty_shards_on_four_ranks(four):
    for found in four.run(uneven_ones, 4):
        assert [differs for differs, _ in found] == [[], []]


# going on -------------------------------------------------------------------------------------------------------------


def folded(kind, how, folder=None, **storage):
    model, context, mine = spread(kind)
    if storage:
        model, context, mine = spread_as(kind, torch.float32)
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER, **storage)
    where = {} if folder is None else {"folder": folder}
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(interval=2, **how, **where), head="plain")

    def run(steps):
        for step in steps:
            ids, labels = mine(batch(step))
            with context():
                fold.backward(loss_of(model(ids), labels))
            optimizer.step()
            optimizer.zero_grad()

    return model, optimizer, fold, run


def spread_as(kind, dtype):
    from torch.distributed.tensor.parallel import loss_parallel

    if kind == "fsdp":
        return sharded(tiny(dtype), mesh_of()), contextlib.nullcontext, part
    return parallel(tiny(dtype), mesh_of(), kind == "sp"), loss_parallel, list


def goes_on(kind, how, folder, storage, stop, steps):
    """Return what differs after a run that was saved and loaded anew, from one that went on; and the files."""
    from tests.dist.states import differing, everything

    disk = f"{folder}/states" if how.get("offload") == "disk" else None
    model, optimizer, fold, run = folded(kind, how, disk, **storage)
    run(range(stop))
    mine = f"{folder}/{dist.get_rank()}.pt"
    torch.save((model.state_dict(), optimizer.state_dict()), mine)
    run(range(stop, steps))
    want, turn = everything(model, optimizer), fold.working_set
    files = sorted(str(path.relative_to(disk).parent) for path in Path(disk).rglob("*.safetensors")) if disk else []
    fold.remove()
    model, optimizer, fold, run = folded(kind, how, disk and f"{disk}-again", **storage)
    weights, states = torch.load(mine, weights_only=False)
    model.load_state_dict(weights)
    optimizer.load_state_dict(states)
    run(range(stop, steps))
    found = differing(everything(model, optimizer), want), fold.working_set == turn, sorted(set(files))
    fold.remove()
    return found


def through_dcp(kind, how, folder, stop, steps):
    """Return what differs after a run that a distributed checkpoint has saved and loaded, from one that went on."""
    import torch.distributed.checkpoint as dcp

    from tests.dist.states import differing, everything

    model, optimizer, fold, run = folded(kind, how)
    run(range(stop))
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    run(range(stop, steps))
    want, turn = everything(model, optimizer), fold.working_set
    fold.remove()
    model, optimizer, fold, run = folded(kind, how)
    target = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(target, checkpoint_id=folder)
    model.load_state_dict(target["model"])
    optimizer.load_state_dict(target["optimizer"])
    run(range(stop, steps))
    found = differing(everything(model, optimizer), want), fold.working_set == turn
    states = {0: target["optimizer"]["state"][0]}
    lost = said(lambda: optimizer.load_state_dict({**target["optimizer"], "state": states}))
    fold.remove()
    return *found, lost


def test_goes_on_from_a_distributed_checkpoint(two, tmp_path):
    for differs, same, lost in two.run(through_dcp, "fsdp", {"chunks": 5, "order": "importance"}, str(tmp_path), 5, 10):
        assert not differs
        assert same
        assert "no states of chunk" in lost


CODED = {"states": "int8", "rounding": "stochastic", "small_size": 4096}


def test_goes_on(two, tmp_path):
    how = {"chunks": 5, "order": "importance", "offload": "disk"}
    for found in two.run(goes_on, "fsdp", how, str(tmp_path), {}, 5, 10):
        assert found == ([], True, ["rank-0", "rank-1"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sp", "fsdp"])
@pytest.mark.parametrize("storage", [{}, CODED], ids=["fp64", "int8"])
@pytest.mark.parametrize("offload", ["cpu", "disk", None])
def test_goes_on_in_other_ways(four, tmp_path, kind, storage, offload):
    how = {"chunks": 4, "order": "importance", "offload": offload}
    files = [f"rank-{rank}" for rank in range(4)] if offload == "disk" else []
    for found in four.run(goes_on, kind, how, str(tmp_path), storage, 7, 14):
        assert found == ([], True, files)


# refusals -------------------------------------------------------------------------------------------------------------


def said(call):
    try:
        call()
    except (ValueError, gradfold.FoldError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


DOWN = "layers.0.inner.down.weight"  # cut along dimension 1 by tensor parallelism, along 0 by FSDP2


def refusals(folder):
    found = {}
    rest = ["layers.0.attention", "layers.0.inner.gate", "layers.0.inner.up", "layers.0.norm1", "layers.0.norm2"]
    sets = [["embed", "layers.1", "norm", "head", (DOWN, slice(0, 16))], [*rest, (DOWN, slice(16, 32))]]
    _, optimizer, fold, run = folded("fsdp", {"by": sets})
    run(range(5))
    saved = optimizer.state_dict()
    fold.remove()
    plain = tiny()
    its = gradfold.AdamW(plain.named_parameters(), **HYPER)
    alone = gradfold.fold(plain, its, working_set=gradfold.WorkingSet(by=sets, interval=2), group="alone")
    found["one process"] = said(lambda: its.load_state_dict(saved))
    alone.remove()
    _model, optimizer, fold, run = folded("tp", {"by": sets})
    before = optimizer.state_dict()["working_set"]
    found["another mesh"] = said(lambda: optimizer.load_state_dict(saved))
    bare = {key: value for key, value in saved.items() if key != "working_set"}
    found["another mesh, no turn"] = said(lambda: optimizer.load_state_dict(bare))
    found["changed"] = optimizer.state_dict()["working_set"] != before
    fold.remove()
    sets = [[("head.weight", slice(0, 3)), "embed", "layers"], [("head.weight", slice(3, 64)), "norm"]]
    found["no fraction"] = said(lambda: folded("tp", {"by": sets}))
    interval = 2 + dist.get_rank()
    other = sharded(tiny(), mesh_of())
    differ = gradfold.AdamW(other.named_parameters(), **HYPER)
    found["unlike"] = said(
        lambda: gradfold.fold(other, differ, working_set=gradfold.WorkingSet(chunks=3, interval=interval))
    )
    found["unlike, left"] = sum(len(states) for states in differ.state.values())
    return found


def test_refusals(two, tmp_path):
    for found in two.run(refusals, str(tmp_path)):
        assert f"{DOWN}[0:8] of each rank's part, along dimension 0 over 2 ranks there" in found["one process"]
        assert f"{DOWN}[0:16] here" in found["one process"]
        assert f"{DOWN}[0:8] of each rank's part, along dimension 0 over 2 ranks there" in found["another mesh"]
        assert f"{DOWN}[0:16] of each rank's part, along dimension 1 over 2 ranks here" in found["another mesh"]
        assert "of a slice of what a rank held on another mesh" in found["another mesh, no turn"]
        assert not found["changed"]
        assert "head.weight" in found["no fraction"] and "same fraction" in found["no fraction"]
        assert "interval=2" in found["unlike"] and "interval=3" in found["unlike"]
        assert found["unlike, left"] == 0


def full_disk(folder):
    """Let the disk of rank 1 refuse a chunk; return what each rank's ``step()`` says, and whether training goes on."""
    from gradfold.errors import FoldError
    from gradfold.workset.disk import DiskStore

    _model, optimizer, fold, run = folded("fsdp", {"chunks": 5, "offload": "disk"}, folder)
    put = DiskStore.put
    broken = dist.get_rank() == 1

    def refuse(self, key, tensors):
        if broken:
            raise FoldError("the disk is full")
        put(self, key, tensors)

    DiskStore.put = refuse
    try:
        first = said(lambda: run(range(2)))
        broken = False
        optimizer.zero_grad()
        second = said(lambda: run(range(2, 6)))
        return first, second, fold.working_set
    finally:
        DiskStore.put = put
        fold.remove()


def test_store_that_fails_on_one_rank(two, tmp_path):
    (zero, then, turn), (one, its, other) = two.run(full_disk, str(tmp_path))
    assert "rank 1 has failed" in zero and "the disk is full" in zero
    assert "the disk is full" in one
    assert then == its == "nothing"
    assert turn == other
