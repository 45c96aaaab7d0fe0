"""Working sets on sharded parameters, against the same elements taking turns on one process, in fp64."""

import contextlib
import itertools
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
        for name, dim, start, stop, *_ in chunk:
            param = model.get_parameter(name)
            ranks = dist.get_world_size() if any(p.is_shard(dim) for p in getattr(param, "placements", ())) else 1
            size = param.shape[dim]
            each = -(-size // ranks) if len(_) else size
            for rank in range(ranks if len(_) else 1):
                first, last = (min(rank * each + at, (rank + 1) * each, size) for at in (start, stop))
                if first < last:
                    cuts = slice(first, last) if dim == 0 else (slice(None), slice(first, last))
                    made[-1].append((name, cuts))
    return made


def rows_of(tensors):
    return tensors


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
    kept = {key: how[key] for key in ("interval", "order", "states") if key in how}
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

if __name__ == "__main__":
    import sys
    from tests.dist.world import World
    w = World(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    try:
        for case in QUICK + [{"kind": k, **o} for k in ("tp", "fsdp") for o in ({"how": {"by": "layer"}}, {"how": {"chunks": 4, "axis": "in"}})]:
            try: print(case, w.run(train, *[case["kind"], case["how"], case.get("steps", 8), case.get("accumulate", 1), case.get("clip")])[:2])
            except Exception as e: print(case, str(e)[-1500:])
    finally:
        w.stop()
