"""Pipelines of folded stages, against torch's AdamW on one process in fp64."""

import math

import pytest

from tests.dist import pipeline

STAGES = {
    "ScheduleGPipe": 1,
    "Schedule1F1B": 1,
    "ScheduleInterleaved1F1B": 2,
    "ScheduleLoopedBFS": 2,
    "ScheduleInterleavedZeroBubble": 2,
    "ScheduleZBVZeroBubble": 2,
    "ScheduleDualPipeV": 2,
}  # of a rank
SPLITS = ("ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble", "ScheduleDualPipeV")
RARE = ("ScheduleLoopedBFS", "ScheduleDualPipeV")
slow = pytest.mark.slow


def as_alone(world, kind, scale_grads, clip, micro=4):
    for weights, norms, left in world.run(pipeline.train, kind, world.size * STAGES[kind], scale_grads, clip, micro):
        assert weights <= 1e-11
        assert norms <= 1e-12
        assert not left


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=slow if kind in RARE else ()) for kind in STAGES])
def test_as_on_one_process(two, kind):
    one_stage = kind == "Schedule1F1B"
    as_alone(two, kind, not one_stage, 0.05 if one_stage or kind in SPLITS else None)


@slow
@pytest.mark.parametrize("clip", [None, 0.05], ids=str)
@pytest.mark.parametrize("scale_grads", [False, True])
@pytest.mark.parametrize("kind", STAGES)
def test_as_on_one_process_on_four(four, kind, scale_grads, clip):
    as_alone(four, kind, scale_grads, clip, micro=8)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind == SPLITS[1] else slow) for kind in STAGES])
def test_a_weight_is_reached_once_by_each_micro_batch(two, kind):
    for handed, dense in two.run(pipeline.backwards_of_weights, kind, STAGES[kind]):
        assert handed == {pipeline.MICRO}
        assert dense == {0}


REFUSALS = {
    "no group": "gradfold.fold_stage",
    "accumulate": "scale_grads=False",
    "two_pass": "clip='exact'",
    "working_set": "working_set= with a pipeline",
    "joint": "joint=True",
    "alone": "1 of 2 stages",
    "no schedule": "give a schedule",
    "prefix": "prefix=3",
    "a tie that is not there": "embed.wieght, and no stage has it",
    "a tie of different weights": "embed.weight: tied, and its copies on ranks 0 and 1 differ",
    "a tie in host memory": "tape='device'",
    "tied on one rank only": "tied=",
    "one stage only": "none of its parameters is in the optimizer",
    "an optimizer for each": "one",
    "names on two ranks": "stages 0 (rank 0) and 1 (rank 1) each have a parameter of this name",
    "names on one rank": "layers.0.norm1.weight: two parameters of this rank's stages have this name",
}


def test_refusals(two):
    for found in two.run(pipeline.refusals):
        assert found.keys() == REFUSALS.keys()
        for name, (message, moved) in found.items():
            assert REFUSALS[name] in message, name
            assert moved == 0, name


LATE_REFUSALS = {
    "scale_grads": "scale_grads=True (torch's default) divides .grad by 4",
    "micro-batches": "runs 4 backwards (micro-batches), and the fold sums 2",
    "several stages": "fold with gradfold.fold_stage",
    "changed later": "scale_grads=False and 4 micro-batches",
    "dw_builder": "would split backwards",
}


def test_refusals_as_the_schedule_runs(two):
    for found in two.run(pipeline.late_refusals, log=False):
        assert found.keys() == LATE_REFUSALS.keys()
        for name, (message, moved) in found.items():
            assert LATE_REFUSALS[name] in message, name
            assert moved == 0, name


@pytest.mark.parametrize("options", [{"timing": "deferred"}, {"timing": "auto"}, {"clip_norm": 1.0}], ids=str)
def test_a_gradient_that_is_not_finite_on_one_stage(two, options):
    there, here = two.run(pipeline.not_finite, options)
    for message, _, _, norm in (there, here):
        assert "norm.weight" in message and "not finite" in message
        assert math.isnan(norm)
    if options.get("timing") == "auto":
        assert [of - moved for _, moved, of, _ in (there, here)] == [0, 1]  # all but the one
    else:
        assert there[1] == here[1] == 0


def test_it_is_skipped_on_all_stages(two):
    for message, moved, _, norm in two.run(pipeline.not_finite, {"on_nonfinite": "skip", "timing": "deferred"}):
        assert message == ""
        assert moved == 0
        assert math.isnan(norm)


def test_names_are_those_of_the_whole_model(two):
    (same, names, stream), (others, theirs, other) = two.run(pipeline.sequential, {1: 2}, "", True)
    assert same and others  # random bits, too
    assert names + theirs == [f"{layer}.{kind}" for layer in range(4) for kind in ("weight", "bias")]
    assert (stream, other) == ("0.weight", "2.weight")


def test_names_by_prefix_for_an_optimizer_without_names(two):
    (_, names, stream), (_, theirs, other) = two.run(pipeline.sequential, 0, {0: "low.", 1: "high."}, False)
    assert names[0] == stream == "low.0.weight"
    assert theirs[0] == other == "high.0.weight"


@pytest.mark.parametrize(
    ("kind", "clip", "timing"),
    [
        pytest.param("Schedule1F1B", 0.05, "auto", id="two ranks, clipped"),
        pytest.param("Schedule1F1B", None, "auto", id="two ranks", marks=slow),
        pytest.param("ScheduleZBVZeroBubble", None, "auto", id="one rank"),
        pytest.param("ScheduleZBVZeroBubble", 0.05, "deferred", id="one rank, clipped", marks=slow),
        pytest.param("ScheduleInterleaved1F1B", None, "deferred", id="interleaved", marks=slow),
    ],
)
def test_tied_weights(two, kind, clip, timing):
    found = two.run(pipeline.tie, kind, clip, timing)
    for weights, norms, _ in found:
        assert weights <= 1e-11
        assert norms <= 1e-12
    copies = [copy for *_, copy in found if copy is not None]
    assert len(set(copies)) == 1 and len(copies) == (1 if kind in pipeline.V_SHAPED else 2)


@slow
def test_tied_weights_on_four(four):
    found = four.run(pipeline.tie, "Schedule1F1B", 0.05, log=False)  # the ranks between them sum nothing
    for weights, norms, _ in found:
        assert weights <= 1e-11
        assert norms <= 1e-12
    assert found[0][2] == found[3][2] is not None


@slow
@pytest.mark.parametrize("kind", ["Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleZBVZeroBubble"])
def test_checkpointed_layers(two, kind):
    """Not reentrant ones: a schedule's first step calls ``autograd.grad``, which these do not take, folded or not."""
    for weights in two.run(pipeline.checkpointed, kind, 2 * STAGES[kind]):
        assert weights <= 1e-11


@slow
@pytest.mark.parametrize("kind", ["Schedule1F1B", "ScheduleInterleavedZeroBubble"])
def test_several_runs_of_a_schedule_in_a_step(two, kind):
    for weights, summed in two.run(pipeline.accumulated, kind, 2 * STAGES[kind]):
        assert weights <= 1e-11
        assert summed == 2 * pipeline.MICRO


@slow
@pytest.mark.parametrize("clip", [None, 0.05])
def test_beside_tensor_parallelism(four, clip):
    # the first stage looks words up, and the second does not
    for weights, norms in four.run(pipeline.beside_tensor_parallelism, clip, alike=((0, 1), (2, 3))):
        assert weights <= 1e-11
        assert norms <= 1e-12


@slow
def test_equal_names_beside_tensor_parallelism(four):
    for message in four.run(pipeline.names_beside_tensor_parallelism):
        assert "weight: stages 0 (rank 0) and 1 (rank 2) each have a parameter of this name" in message
