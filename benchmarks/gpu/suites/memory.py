"""Peak memory of a training step: predicted by ``gradfold.planner.step_memory`` on fake tensors, and measured.

Predictions run on the CPU; measured peaks are read from the rows of ``step.py``, of this run or an earlier one. Folded
steps are predicted with a backend that computes and holds nothing, because the kernels hold no gradient: stepping fake
tensors block by block takes minutes at this size. Predictions count live bytes exactly, but not what the allocator
rounds up or cannot reuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import fold_plain_head
from benchmarks.gpu import training
from benchmarks.gpu.context import Context
from benchmarks.gpu.result_files import OK, rows_in
from benchmarks.gpu.worker import Case, LeftOut
from benchmarks.peers.hooks import SteppedInHooks
from gradfold.backends import Backend
from gradfold.planner.step import StepMemory, step_memory

NAMES = ("ours int8", "torch fused", "ours split8", "ours bf16", "torch hooks", "ours fp32", "ours int4")


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    names = NAMES[:2] if context.dry else NAMES
    return [Case(name, lambda name=name: compare_peak(name, context)) for name in names]


def compare_peak(name: str, context: Context) -> dict[str, Any]:
    """Compare predicted and measured peak of one trainer."""
    measured = {row["key"]: row for row in rows_in(context.folder, "step") if row["status"] == OK}
    row = measured.get(f"alone: {name}")
    if row is None:
        row = _measure(name, context)
    predicted, device = predict_peak(name, row["layers"], context)
    figures = {
        "layers": row["layers"],
        "predicted_gib": predicted.peak_bytes / 2**30,
        "measured_gib": row["peak_bytes"] / 2**30,
        "ratio": row["peak_bytes"] / predicted.peak_bytes,
        "device": device,
    }
    return figures | {f"predicted_{key}": value for key, value in predicted.as_dict().items() if key != "label"}


def _measure(name: str, context: Context) -> dict[str, Any]:
    """Without rows of whole steps: a short measurement of our own."""
    from benchmarks.gpu.stepping import alone

    return alone(name, training.shape_of(context), context)


class InRegisters(Backend):
    """Steps as far as memory goes: the kernels hold no gradient, and what they take besides is too small to count."""

    name = "in registers"

    def prepare(self, *args: Any) -> Callable[..., float]:
        """Return a step that does nothing."""
        return lambda *args: 0.0

    def finite(self, *args: Any) -> bool:
        """Return that the gradient is finite."""
        return True


def predict_peak(name: str, layers: int, context: Context) -> tuple[StepMemory, str]:
    """Predict a peak on fake tensors of the GPU if torch can make them, else of the CPU."""
    shape, tokens = training.shape_of(context), training.tokens_of(context)
    refused = []
    for device in dict.fromkeys((context.device, torch.device("cpu"))):
        try:
            return _predict(name, layers, shape, tokens, device), device.type
        except Exception as error:
            refused.append(f"{device.type}: {type(error).__name__}: {error}")
    raise LeftOut("; ".join(refused))


def _predict(name: str, layers: int, shape: dict[str, int], tokens: int, device: torch.device) -> StepMemory:
    optimizers: dict[str, Callable[[Any], Any]] = {
        "torch fused": training.fused_adamw,
        "torch hooks": lambda params: SteppedInHooks(params, training.fused_adamw),
    }
    storage = name.removeprefix("ours ")
    make = optimizers.get(name, lambda params: training.our_optimizer(params, storage))
    batch = training.batch_of(shape, tokens, torch.device("cpu"))
    fake_batch = {key: value.to(device) for key, value in batch.items()}

    def fold(model: Any, optimizer: Any) -> Any:
        return fold_plain_head(model, optimizer, backend=InRegisters())

    how = fold if name.startswith("ours") else False
    return step_memory(lambda: training.model_of(shape, layers, device), make, fake_batch, fold=how)
