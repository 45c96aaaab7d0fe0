"""What a plan is compared with, traced by a second process meanwhile."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from gradfold.train.recipe import Recipe

from .flags import quiet_environment
from .plan_target import device_of, subject_of, with_batches

if TYPE_CHECKING:
    from gradfold.planner.step import StepMemory

COUNT = 4  # of `gradfold.planner.baselines.BASELINES`, which is not loaded here
Baselines = Callable[[], tuple["StepMemory", ...]]


@contextlib.contextmanager
def tracing_beside(recipe: Recipe, measured: bool, given: Any = None) -> Iterator[Baselines]:
    """Trace the baselines in a second process meanwhile.

    Args:
        recipe: what is planned.
        measured: whether it is measured, too.
        given: the batches of the steps that may take most, if they are known.

    Yields:
        A function that waits for them, and traces the last one itself if nobody has begun it.
    """
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    arguments = (recipe, measured, given)
    coming: list[Future] = [pool.submit(trace_baseline, index, *arguments) for index in range(COUNT)]

    def result() -> tuple[StepMemory, ...]:
        last = trace_baseline(COUNT - 1, *arguments) if coming[-1].cancel() else coming[-1].result()
        found = [*(future.result() for future in coming[:-1]), last]
        return tuple(step for step in found if step is not None)

    try:
        yield result
    finally:
        for process in list(pool._processes.values()):
            process.terminate()  # whatever it still does, nobody waits for it
        pool.shutdown(wait=False, cancel_futures=True)


def trace_baseline(index: int, recipe: Recipe, measured: bool, given: Any = None) -> StepMemory | None:
    """Predict a step of the same batches with one of the baselines. Runs in either process.

    Arguments are those of `tracing_beside`, and which of the baselines.

    Returns:
        None where the baseline cannot do what is asked, such as exact clipping in hooks.
    """
    quiet_environment()

    from gradfold.planner.baselines import BASELINES, baselines_of
    from gradfold.planner.fake import frozen_objects
    from gradfold.planner.predict import predict_baseline

    name = list(BASELINES)[index]
    settings, device = recipe.plan_settings(), device_of(recipe, measured)
    if name not in baselines_of(settings):
        return None
    with frozen_objects(collect=False):
        subject = with_batches(subject_of(recipe.model), None if given is None else lambda settings: given)
        return predict_baseline(subject, settings, BASELINES[name], name, device)
