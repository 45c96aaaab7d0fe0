"""Steps of many small parameters in few launches of ``kernels/batched.py``, one for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradfold.backends.contract import Job
from gradfold.backends.terms import DenseTerm, GradTerm

from .kernels import codecs
from .kernels.batched import fold_batched
from .launch import Tensors, math_of
from .launch_cache import TritonStepper
from .scalars import Twin, as_tensor, flags_of, twin_of
from .transfer import capturing, to_device

BLOCK_ELEMENTS = 1024  # elements per program
MAX_ELEMENTS = 1 << 16  # larger parameters do not wait for the others, since their gradients would be kept
PLAIN_FORMATS = {codecs.FP32.value, codecs.BF16.value, codecs.FP16.value, codecs.SPLIT8.value, codecs.SPLIT16.value}


def small(weight: Tensor, terms: Sequence[GradTerm]) -> bool:
    """Return whether a parameter steps in a batched launch; its table cannot be captured in a CUDA graph."""
    if capturing(weight.device):
        return False
    dense = len(terms) == 1 and isinstance(terms[0], DenseTerm)
    return dense and 0 < weight.numel() <= MAX_ELEMENTS and weight.is_contiguous() and _grad(terms).is_contiguous()


def _grad(terms: Sequence[GradTerm]) -> Tensor:
    assert isinstance(terms[0], DenseTerm)
    return terms[0].grad


def _numel(job: Job) -> int:
    assert isinstance(job.stepper, TritonStepper)
    return job.stepper.weight.values.numel()


class BatchKind(NamedTuple):
    """What the parameters of one launch have in common; everything but the device is a constant of the kernel."""

    twin: Twin
    flags: tuple[int, ...]
    formats: tuple[int, ...]
    random: tuple[int, ...]
    dtype: torch.dtype  # dtype of the gradients
    limited: bool
    guarded: bool
    device: torch.device


def kind_of(job: Job) -> tuple[BatchKind, Tensors] | None:
    """Return the kind and the tensors of a parameter; None if the batched kernel does not take it."""
    stepper = job.stepper
    assert isinstance(stepper, TritonStepper)
    if stepper.capturable:  # steps before a capture must launch what the captured one will: none is compiled there
        return None
    twin = twin_of(stepper.rule)
    tensors = stepper.tensors if twin is not None and small(stepper.weight.values, job.terms) else None
    if twin is None or tensors is None or not PLAIN_FORMATS.issuperset(tensors.formats) or tensors.large:
        return None
    if not all(first.is_contiguous() for first in (*tensors.firsts, *tensors.seconds)):
        return None
    grad = _grad(job.terms)
    if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    flags = flags_of(twin, job.numbers.rule)
    limited, guarded = job.change.clip_value is not None, job.change.guarded
    return BatchKind(twin, flags, tensors.formats, tensors.random, grad.dtype, limited, guarded, grad.device), tensors


def step_batched(
    kind: BatchKind, jobs: Sequence[Job], tensors: Sequence[Tensors], where: str, interpreted: bool
) -> list[Tensor]:
    """Step parameters of one kind; returns the norms of each parameter's blocks."""
    rows, blocks, lengths = [], [], []
    for index, (job, one) in enumerate(zip(jobs, tensors, strict=True)):
        count = -(-_numel(job) // BLOCK_ELEMENTS)
        row = [_grad(job.terms).data_ptr(), _numel(job), one.offset]
        for first, second in zip(one.firsts, one.seconds, strict=True):
            row += [first.data_ptr(), second.data_ptr()]
        rows.append(row)
        blocks += [(index, block) for block in range(count)]
        lengths.append(count)
    norms = torch.empty(len(blocks), dtype=torch.float32, device=kind.device)
    limits = {job.change.clip_value for job in jobs}
    assert len(limits) == 1  # the same for all of one kind, see ``by_kind``
    limit = limits.pop()
    kernel: Any = fold_batched
    kernel[(len(blocks),)](
        _grad(jobs[0].terms),
        to_device(np.asarray(rows, np.int64), kind.device),
        to_device(np.asarray(blocks, np.int64), kind.device),
        _scalars(kind, jobs),
        torch.stack([one.words for one in tensors]),
        0.0 if limit is None else limit,
        norms,
        RULE=kind.twin.kernel,
        FLAGS=kind.flags,
        SCALARS=kind.twin.count,
        FORMATS=kind.formats,
        RANDOM=kind.random,
        LIMITED=int(kind.limited),
        GUARDED=int(kind.guarded),
        LARGE=0,
        MATH=math_of(kind.formats[0], where, interpreted),
        BLOCK=BLOCK_ELEMENTS,
        enable_fp_fusion=False,
        num_warps=4,
    )
    return list(norms.split(lengths))


def _scalars(kind: BatchKind, jobs: Sequence[Job]) -> Tensor:
    """Return fp32 ``[P, count + 2]``: the rule's scalars, the step number as int32 bits, and the gradient's factor."""
    values, steps, scales = [], [], []
    for job in jobs:
        values.append(kind.twin.scalars(job.numbers.rule))
        steps.append(job.numbers.count)
        scales.append(job.change.scale)
    numbers = [[*row, scale] for row, scale in zip(values, scales, strict=True)]
    if not any(isinstance(x, Tensor) for row in [*numbers, steps] for x in row):
        host = np.empty((len(jobs), kind.twin.count + 2), np.float32)
        host[:, :-2] = np.asarray(values, np.float64)
        host[:, -2] = np.asarray(steps, np.int64).astype(np.int32).view(np.float32)
        host[:, -1] = np.asarray(scales, np.float64)
        return to_device(host, kind.device)
    made = []
    for row, step in zip(numbers, steps, strict=True):
        floats = torch.stack([as_tensor(x, torch.float64, kind.device) for x in row]).to(torch.float32)
        bits = as_tensor(step, torch.int32, kind.device).reshape(1).view(torch.float32)
        made.append(torch.cat([floats[:-1], bits, floats[-1:]]))
    return torch.stack(made)


def by_kind(jobs: Sequence[Job]) -> tuple[dict[Any, list[tuple[int, Tensors]]], list[int]]:
    """Group the jobs that share a launch, as indices with their tensors; also return the indices of the other jobs."""
    groups: dict[Any, list[tuple[int, Tensors]]] = {}
    others = []
    for index, job in enumerate(jobs):
        found = kind_of(job)
        if found is None:
            others.append(index)
        else:
            groups.setdefault((found[0], job.change.clip_value), []).append((index, found[1]))
    return groups, others
