"""FSDP2, whose hooks step the shards, against torch's AdamW on one process in fp64."""

import pytest
import torch
import torch.distributed as dist

import gradfold
from tests.dist.tiny import HYPER, alone, batch, furthest, loss_of, tiny


def sharded(model, mesh, **options):
    """Shard each layer of a Tiny by itself, and the rest together, as torch's tutorial does."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def mesh_of(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    shape = shape or (dist.get_world_size(),)
    return init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])


def part(tensors, at=None, of=None):
    """Return this rank's share of the rows of each tensor; FSDP2 takes the mean over the ranks."""
    at, of = dist.get_rank() if at is None else at, of or dist.get_world_size()
    return [tensor.chunk(of)[at] for tensor in tensors]


def train(steps=3, accumulate=1, clip=None, summed="fold", model_options=None, mesh=None, **options):
    """Return the largest differences of weights and norms to one process, and which parameters keep a ``.grad``.

    Args:
        steps: how many.
        accumulate: how many micro-batches each sums.
        clip: the largest norm.
        summed: how: "fold" by ``fold(accumulate=)``, "context" by ``fold.accumulating()``, both of which reduce each
            micro-batch; "no_sync" by FSDP2, which reduces the last.
        model_options: of the Tiny.
        mesh: a shape.
        **options: of ``fully_shard``.
    """
    reference, norms = alone(steps, accumulate, clip, **(model_options or {}))
    model = sharded(tiny(**(model_options or {})), mesh_of(*(mesh or ())), **options)
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, accumulate=accumulate if summed == "fold" else 1, clip_norm=clip)
    differences = []
    for step in range(steps):
        for micro in range(accumulate):
            ids, labels = part(batch(step, micro))
            last = micro == accumulate - 1
            if summed == "no_sync":
                model.set_requires_gradient_sync(last)
            if summed == "context" and not last:
                with fold.accumulating():
                    (loss_of(model(ids), labels) / accumulate).backward()
            else:
                (loss_of(model(ids), labels) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        differences.append(abs(fold.grad_norm - norms[step]))
    left = [name for name, param in model.named_parameters() if param.grad is not None]
    fold.remove()
    return furthest(model, reference), max(differences), left


def check(found):
    for weights, norms, left in found:
        assert weights <= 1e-11
        assert norms <= 1e-12
        assert not left


def several(cases):
    return [train(**case) for case in cases]


RESHARD = [
    {"reshard_after_forward": reshard, "accumulate": accumulate, "clip": clip, "summed": summed}
    for reshard in (True, False)
    for accumulate, clip, summed in ((1, None, "fold"), (1, 0.05, "fold"), (2, 0.05, "no_sync"), (3, None, "fold"))
]


def test_as_on_one_process(two):
    for found in two.run(several, RESHARD):
        check(found)
