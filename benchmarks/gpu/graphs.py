"""Whole training steps, forward to ``zero_grad``, as CUDA graphs: what docs/kernels.md describes, in code.

Everything happens on one side stream, from ``fold()`` on: a fold keeps the AccumulateGrad nodes of its weights, which
autograd runs on the stream that was current when they were made, and launches are prepared for each stream anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from gradfold.backends.triton import batched, launch, scalars
from gradfold.engine import finish_step

from . import training
from .context import Context

# Steps before the capture: the first compiles kernels, the second makes what is kept for later ones
WARM_UP, DRY_WARM_UP = 3, 1


class Running(NamedTuple):
    """A trainer, the batch it trains on, its last loss, and a function that takes one step."""

    trainer: training.Trainer
    batch: dict[str, torch.Tensor]
    losses: list[torch.Tensor]
    step: Callable[[], Any]


@contextlib.contextmanager
def running(name: str, shape: dict[str, int], layers: int, context: Context) -> Iterator[Running]:
    """Make a trainer with a model of its own that is ready to step; of a graph, the step is its replay."""
    batch = training.batch_of(shape, training.tokens_of(context), context.device)
    if not name.endswith(training.GRAPH):
        with training.training(name, shape, layers, context) as trainer:
            losses: list[torch.Tensor] = []
            yield Running(trainer, batch, losses, training.step_of(trainer, batch, losses))
        return
    stream = None if context.dry else torch.cuda.Stream()
    context.synchronize()  # the batch was made on another stream
    with torch.cuda.stream(stream), training.training(name, shape, layers, context) as trainer:
        losses = []
        replay = captured(trainer, training.step_of(trainer, batch, losses), stream)
        yield Running(trainer, batch, losses, replay)


def captured(
    trainer: training.Trainer, step: Callable[[], None], stream: torch.cuda.Stream | None
) -> Callable[[], None]:
    """Warm up and capture a step on the stream, which is the current one and has been since before ``fold()``.

    Returns:
        A function that replays the graph. Without a stream, in a dry run, it takes a step as a capture would.
    """
    for _ in range(DRY_WARM_UP if stream is None else WARM_UP):
        step()
    if stream is None:
        return lambda: as_captured(trainer, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def as_captured(trainer: training.Trainer, step: Callable[[], None]) -> None:
    """Take a step that is told that it is captured: numbers of the host, and waits for the device, are errors."""
    if not trainer.backend:
        return step()

    def refuse(*_: Any) -> Any:
        raise AssertionError("a step needs numbers of the host, or waits for the device, while it is captured")

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(batched, "capturing", lambda device: True))
        stack.enter_context(mock.patch.object(finish_step, "capturing", lambda: True))
        stack.enter_context(mock.patch.object(finish_step, "resolve", refuse))
        for module in (batched, launch, scalars):
            stack.enter_context(mock.patch.object(module, "to_device", refuse))
        step()
