"""Pipelines of folded stages, against torch's AdamW on one process in fp64."""

import pytest

from tests.dist.pipeline import train

SCHEDULES = {
    "ScheduleGPipe": 1,
    "Schedule1F1B": 1,
    "ScheduleInterleaved1F1B": 2,
    "ScheduleLoopedBFS": 2,
    "ScheduleInterleavedZeroBubble": 2,
    "ScheduleZBVZeroBubble": 2,
    "ScheduleDualPipeV": 2,
}  # and how many stages a rank has


def as_alone(world, kind, scale_grads, clip, micro=4, **options):
    count = world.size * SCHEDULES[kind]
    for weights, norms, left in world.run(train, kind, count, scale_grads, clip, micro):
        assert weights <= 1e-11
        assert norms <= 1e-12
        assert not left


@pytest.mark.parametrize("kind", SCHEDULES)
def test_as_on_one_process(two, kind):
    as_alone(two, kind, kind != "Schedule1F1B", 0.05 if kind == "Schedule1F1B" else None)
