"""Whole training steps: peak memory and median time, each trainer alone, then beside torch's fused AdamW.

Alone, the model has all of its layers if they fit, else as many as fit. Beside AdamW it has as many as leave room for
two models; only those times give ratios, step by step with alternating order. The folded step as a CUDA graph comes
last: a failed capture can leave the process unusable.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

import gradfold
from benchmarks.gpu import training
from benchmarks.gpu.context import Context, quartiles
from benchmarks.gpu.memory_fit import layers_that_fit, needed_bytes
from benchmarks.gpu.worker import Case, Failed, LeftOut
from gradfold.planner.step import measure_step

BASE = "torch fused"
ROUNDS = 11

ALONE = ("torch fused", "ours bf16", "ours int8", "torch hooks", "ours int4", "ours fp32", "torch foreach")
BESIDE = ("ours bf16", "ours int8", "ours fp32", "ours int4", "torch hooks", "torch foreach")
PEERS = ("bitsandbytes 8-bit", "flashoptim release", "torchao 8-bit")
GRAPH = "ours bf16 graph"


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    seconds = 0.0 if context.dry else 8.0
    made = []
    groups = ((ALONE[:3], BESIDE[:2]), (ALONE[3:], BESIDE[2:]), (PEERS, PEERS))
    if context.dry:
        groups = ((("torch fused", "ours int8", "torch hooks"), ("ours bf16",)), (PEERS[:1], PEERS[:1]))
    for first, second in groups:
        made += [Case(f"alone: {name}", lambda name=name: alone(name, context), seconds) for name in first]
        made += [Case(f"{name} / {BASE}", lambda name=name: beside(name, context), seconds) for name in second]
    return [*made, Case(f"alone: {GRAPH}", lambda: graph(context), seconds, alone=True)]


def layers_for(names: list[str], context: Context) -> int:
    """Return how many layers fit for these trainers."""
    shape = training.shape_of(context)
    layers = layers_that_fit(names, shape, shape["layers"], training.tokens_of(context), context.free_bytes())
    if not layers:
        raise LeftOut(f"{' and '.join(names)} fit with no layer at all")
    return layers


def said_of(names: list[str], layers: int, context: Context) -> dict[str, Any]:
    """Return figures of the model, and why it is not complete, if so."""
    shape, tokens = training.shape_of(context), training.tokens_of(context)
    figures: dict[str, Any] = {"layers": layers, "tokens": tokens}
    if layers < shape["layers"]:
        wanted, free = needed_bytes(names, shape, shape["layers"], tokens), context.free_bytes()
        figures["note"] = (
            f"{shape['layers']} layers would take about {wanted / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )
    return figures


def alone(name: str, context: Context) -> dict[str, Any]:
    """Measure one trainer's peak memory and step time."""
    with ready_to_step(name, context) as (figures, trainer, batch, losses, step):
        return figures | measure_steps(trainer, step, losses, batch, context)


@contextlib.contextmanager
def ready_to_step(
    name: str, context: Context
) -> Iterator[tuple[dict[str, Any], training.Trainer, Any, list[torch.Tensor], Callable[[], Any]]]:
    """Give the figures of the model, a trainer of it, its batch, a list that losses go to, and one step."""
    layers = layers_for([name], context)
    figures = said_of([name], layers, context)
    shape = training.shape_of(context)
    batch = training.batch_of(shape, training.tokens_of(context), context.device)
    with training.training(name, shape, layers, context) as trainer:
        losses: list[torch.Tensor] = []
        yield figures, trainer, batch, losses, training.step_of(trainer, batch, losses)


def measure_steps(
    trainer: training.Trainer,
    step: Callable[[], Any],
    losses: list[torch.Tensor],
    batch: dict[str, torch.Tensor],
    context: Context,
) -> dict[str, Any]:
    """Measure peak memory and step times."""
    figures: dict[str, Any] = {
        "backend": trainer.backend,
        "parameters_b": sum(p.numel() for p in trainer.model.parameters()) / 1e9,
    }
    if context.dry:
        (times,) = context.step_ms([step], ROUNDS)
        with training.using(None):
            counted = measure_step(trainer.model, trainer.optimizer, batch, warm_up_steps=0)
        figures["peak_bytes"] = counted.peak_bytes
    else:
        for _ in range(2):  # compiles kernels, makes states
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        (times,) = context.step_ms([step], ROUNDS, warm_up=1)
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        figures["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    first, median, third = quartiles(times)
    figures |= {
        "peak_gib": figures["peak_bytes"] / 2**30,
        "step_ms": median,
        "step_ms_quartile_1": first,
        "step_ms_quartile_3": third,
    }
    return figures | finite(losses)


def finite(losses: list[torch.Tensor]) -> dict[str, Any]:
    """Return whether the loss is finite."""
    loss = float(losses[0])
    if not math.isfinite(loss):
        raise Failed(f"the loss is {loss} after a few steps")
    return {"loss": loss}


def beside(name: str, context: Context) -> dict[str, Any]:
    """Measure the ratio of step times with two models, one step of each in turn."""
    if name in PEERS:
        training.TRAINERS[name](torch.nn.Linear(8, 8, device=context.device, dtype=torch.bfloat16))
    layers = layers_for([name, BASE], context)
    figures = said_of([name, BASE], layers, context)
    shape = training.shape_of(context)
    batch = training.batch_of(shape, training.tokens_of(context), context.device)
    with (
        training.training(name, shape, layers, context) as one,
        training.training(BASE, shape, layers, context) as base,
    ):
        losses: list[torch.Tensor] = []
        base_losses: list[torch.Tensor] = []
        steps = [training.step_of(one, batch, losses), training.step_of(base, batch, base_losses)]
        times, base_times = context.step_ms(steps, ROUNDS)
        first, median, third = quartiles([a / b for a, b in zip(times, base_times, strict=True)])
        return {
            **figures,
            "backend": one.backend,
            "parameters_b": sum(p.numel() for p in one.model.parameters()) / 1e9,
            "step_ms": quartiles(times)[1],
            "base_step_ms": quartiles(base_times)[1],
            "ratio": median,
            "ratio_quartiles": f"{first:.3f} - {third:.3f}",
            "base_loss": float(base_losses[0]),
            **finite(losses),
        }


def graph(context: Context) -> dict[str, Any]:
    """Capture a folded step, forward to zero_grad, in a CUDA graph and replay it."""
    if context.dry:
        raise LeftOut("there is nothing to capture on a CPU")
    with ready_to_step(GRAPH, context) as (figures, trainer, batch, losses, step):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        before = [p.detach().clone() for p in list(trainer.model.parameters())[:2]]
        captured.replay()
        torch.cuda.synchronize()
        moved = any(not torch.equal(a, p) for a, p in zip(before, trainer.model.parameters(), strict=False))
        if not moved:
            raise gradfold.FoldError("the graph's replay moved no weight")
        return figures | measure_steps(trainer, captured.replay, losses, batch, context)
