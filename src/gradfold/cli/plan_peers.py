"""What a plan is compared with, traced by a second process meanwhile."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING

from gradfold.cli.flags import quiet_environment
from gradfold.cli.plan_target import device_of, subject_of
from gradfold.train.recipe import Recipe

if TYPE_CHECKING:
    from gradfold.planner.step import StepMemory

COUNT = 3  # of `gradfold.planner.peers.PEERS`, which is not loaded here
Peers = Callable[[], tuple["StepMemory", ...]]


@contextlib.contextmanager
def tracing_beside(recipe: Recipe, measured: bool) -> Iterator[Peers]:
    """Begin to trace the peers; what is yielded waits for them, and meanwhile traces those that nobody has begun."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    arguments = (recipe, measured)
    coming: list[Future] = [pool.submit(trace_peer, index, *arguments) for index in range(COUNT)]

    def result() -> tuple[StepMemory, ...]:
        last = trace_peer(COUNT - 1, *arguments) if coming[-1].cancel() else coming[-1].result()
        found = [*(future.result() for future in coming[:-1]), last]
        return tuple(step for step in found if step is not None)

    try:
        yield result
    finally:
        for process in list(pool._processes.values()):
            process.terminate()  # whatever it still does, nobody waits for it
        pool.shutdown(wait=False, cancel_futures=True)


def trace_peer(index: int, recipe: Recipe, measured: bool) -> StepMemory | None:
    """A step of the same batches with one of the peers; None if it cannot do what is asked. Runs in either process."""
    quiet_environment()

    from gradfold.planner.fake import frozen_objects
    from gradfold.planner.peers import PEERS, peers_of
    from gradfold.planner.predict import predict_peer

    name = list(PEERS)[index]
    settings, device = recipe.plan_settings(), device_of(recipe, measured)
    if name not in peers_of(settings):
        return None
    with frozen_objects(collect=False):
        return predict_peer(subject_of(recipe.model), settings, PEERS[name], name, device)
