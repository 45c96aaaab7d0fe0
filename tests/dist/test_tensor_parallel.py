"""Tensor and sequence parallelism, against torch's AdamW on one process in fp64."""

import pytest
import torch

import gradfold
from tests.dist.tiny import HYPER, alone, batch, furthest, loss_of, tiny


def parallel(model, mesh, sequence):
    """Cut a Tiny over a mesh, as torch's own tutorials do."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    tokens = Shard(1)
    between = {"output_layouts": tokens} if sequence else {}
    plan: dict = {
        "embed": RowwiseParallel(input_layouts=Replicate(), **between),
        "head": ColwiseParallel(
            **({"input_layouts": tokens} if sequence else {}), output_layouts=Shard(-1), use_local_output=False
        ),
    }
    inside: dict = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    inside |= {"inner.gate": ColwiseParallel(), "inner.up": ColwiseParallel()}
    inside |= {"attention.o": RowwiseParallel(**between), "inner.down": RowwiseParallel(**between)}
    if sequence:
        plan["norm"] = SequenceParallel()
        inside |= {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
        gather = {"input_layouts": (tokens,), "desired_input_layouts": (Replicate(),)}
        inside |= {"attention": PrepareModuleInput(**gather), "inner": PrepareModuleInput(**gather)}
    parallelize_module(model, mesh, plan)
    for layer in model.layers.values():
        parallelize_module(layer, mesh, inside)
    return model


def train(sequence, accumulate, clip, options=None, size=None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    options = options or {}
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    reference, norms = alone(3, accumulate, clip, **options)
    model = parallel(tiny(**options), mesh, sequence)
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, accumulate=accumulate, clip_norm=clip, head="plain")
    differences = []
    for step in range(3):
        for micro in range(accumulate):
            ids, labels = batch(step, micro)
            with loss_parallel():
                (loss_of(model(ids), labels) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        differences.append(abs(fold.grad_norm - norms[step]))
    routes = sum(param.folded for param in fold._state.params.values())
    left = [name for name, param in model.named_parameters() if param.grad is not None]
    fold.remove()
    return furthest(model, reference), max(differences), routes, left


CASES = [
    pytest.param(sequence, accumulate, clip, id=f"{'sp' if sequence else 'tp'}-{accumulate}-{clip}")
    for sequence in (False, True)
    for accumulate, clip in ((1, None), (3, None), (1, 0.05), (2, 0.05))
]


@pytest.mark.parametrize(("sequence", "accumulate", "clip"), CASES)
def test_as_on_one_process(two, sequence, accumulate, clip):
    for weights, norms, routes, left in two.run(train, sequence, accumulate, clip):
        assert weights <= 1e-11
        assert norms <= 1e-12
        assert routes == 16
        assert not left
