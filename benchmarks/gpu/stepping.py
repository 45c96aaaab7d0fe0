"""Measuring whole training steps: peak memory and time of a trainer alone, and its ratio to another trainer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradfold.planner.step import measure_step

from . import training
from .context import Context, quartiles
from .graphs import Running, running
from .memory_fit import layers_that_fit, needed_bytes
from .worker import Failed, LeftOut

ROUNDS = 11
HOST_ROUNDS = 5


def layers_for(names: Sequence[str], shape: dict[str, int], context: Context) -> int:
    """Return how many layers fit for these trainers."""
    layers = layers_that_fit(names, shape, shape["layers"], training.tokens_of(context), context.free_bytes())
    if not layers:
        raise LeftOut(f"{' and '.join(names)} fit with no layer at all")
    return layers


def said_of(names: Sequence[str], shape: dict[str, int], layers: int, context: Context) -> dict[str, Any]:
    """Return figures of the model, and why it is not complete, if so."""
    tokens = training.tokens_of(context)
    figures: dict[str, Any] = {"layers": layers, "tokens": tokens}
    if layers < shape["layers"]:
        wanted, free = needed_bytes(names, shape, shape["layers"], tokens), context.free_bytes()
        figures["note"] = (
            f"{shape['layers']} layers would take about {wanted / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )
    return figures


def alone(name: str, shape: dict[str, int], context: Context) -> dict[str, Any]:
    """Measure one trainer's peak memory and step time."""
    training.look_for(name)
    layers = layers_for([name], shape, context)
    figures = said_of([name], shape, layers, context)
    with running(name, shape, layers, context) as one:
        return figures | _of(one) | measure_steps(one, name, context)


def measure_steps(one: Running, name: str, context: Context) -> dict[str, Any]:
    """Measure peak memory and step times."""
    figures: dict[str, Any] = {}
    if context.dry and not name.endswith(training.GRAPH):

        def counted_step() -> None:
            with training.using(None):
                counted = measure_step(one.trainer.model, one.trainer.optimizer, one.batch, warm_up_steps=0)
            figures["peak_bytes"] = counted.peak_bytes

        (times,) = context.step_ms([counted_step], ROUNDS)
    elif context.dry:
        (times,) = context.step_ms([one.step], ROUNDS)
    else:
        for _ in range(2):  # compiles kernels, makes states
            one.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        (times,) = context.step_ms([one.step], ROUNDS, warm_up=1)
        if not name.endswith(training.GRAPH):  # what a graph's tensors take is only reserved
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        figures["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    first, median, third = quartiles(times)
    if "peak_bytes" in figures:
        figures["peak_gib"] = figures["peak_bytes"] / 2**30
    figures |= {"step_ms": median, "step_ms_quartile_1": first, "step_ms_quartile_3": third}
    return figures | {"host_ms": host_ms(one.step, context)} | finite(one.losses)


def host_ms(step: Callable[[], Any], context: Context) -> float:
    """Return how long Python takes to queue a step on a device that is idle; below the step's time nobody waits."""
    if context.dry:
        return 0.0
    taken = []
    for _ in range(HOST_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        taken.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(taken)


def finite(losses: list[torch.Tensor]) -> dict[str, Any]:
    """Return the last loss, which has to be finite."""
    if not losses:  # the planner has taken the step, in a dry run
        return {}
    loss = float(losses[0])
    if not math.isfinite(loss):
        raise Failed(f"the loss is {loss} after a few steps")
    return {"loss": loss}


def beside(name: str, base: str, shape: dict[str, int], context: Context) -> dict[str, Any]:
    """Measure the ratio of step times with two models, one step of each in turn."""
    training.look_for(name)
    layers = layers_for([name, base], shape, context)
    figures = said_of([name, base], shape, layers, context)
    with running(name, shape, layers, context) as one, running(base, shape, layers, context) as other:
        times, base_times = context.step_ms([one.step, other.step], ROUNDS)
        first, median, third = quartiles([a / b for a, b in zip(times, base_times, strict=True)])
        return {
            **figures,
            **_of(one),
            "step_ms": quartiles(times)[1],
            "base_step_ms": quartiles(base_times)[1],
            "host_ms": host_ms(one.step, context),
            "base_host_ms": host_ms(other.step, context),
            "ratio": median,
            "ratio_quartiles": f"{first:.3f} - {third:.3f}",
            "base_loss": float(other.losses[0]),
            **finite(one.losses),
        }


def _of(one: Running) -> dict[str, Any]:
    parameters = sum(param.numel() for param in one.trainer.model.parameters())
    return {"backend": one.trainer.backend, "parameters_b": parameters / 1e9}
