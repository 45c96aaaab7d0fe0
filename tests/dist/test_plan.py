"""A plan of one rank is made without the others, and agrees with what the ranks then take."""

import pytest
import torch

pytest.importorskip("transformers")

import gradfold
from gradfold.dist import spread
from gradfold.planner.errors import PlanError
from gradfold.planner.models import find_subject
from gradfold.planner.predict import predict
from gradfold.planner.settings import Settings
from gradfold.planner.step import measure_step
from gradfold.planner.workload import Workload, trainable
from tests.llama import small_llama


def llama():
    return small_llama(vocab_size=1024, hidden_size=128, num_hidden_layers=3, tie_word_embeddings=False)


def settings_of(kind, options):
    return Settings(tokens=48, batch=2, dtype="float32", parallel=kind, ranks=2, **options)


def taken(kind, options):
    """Return the peak of a real step on this rank, in bytes."""
    from torch.distributed.device_mesh import init_device_mesh

    settings = settings_of(kind, options)
    workload = Workload(find_subject(llama()), settings, "cpu")
    torch.manual_seed(0)
    model = workload.subject.build(torch.float32, None)
    spread(model, init_device_mesh("cpu", (2,)), kind)
    optimizer = settings.make_optimizer(trainable(model))

    def fold(model, optimizer):
        return gradfold.fold(model, optimizer, backend="reference", **settings.gradient_options())

    parts = settings.accumulate
    made = measure_step(model, optimizer, workload.batch(), fold=fold, loss=workload.loss, micro_batches=parts)
    return made.peak_bytes


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("tp", {}, id="tp"),
        pytest.param("fsdp", {}, id="fsdp"),
        pytest.param("tp", {"clip_norm": 1.0, "accumulate": 2}, id="tp-clip", marks=pytest.mark.slow),
        pytest.param("fsdp", {"clip_norm": 1.0, "accumulate": 2}, id="fsdp-clip", marks=pytest.mark.slow),
        pytest.param("fsdp", {"clip_value": 0.1}, id="fsdp-value", marks=pytest.mark.slow),
        pytest.param("replicas", {}, id="replicas", marks=pytest.mark.slow),
    ],
)
def test_a_plan_and_what_is_taken(two, kind, options):
    predicted = predict(find_subject(llama()), settings_of(kind, options), "cpu").memory.peak_bytes
    for measured in two.run(taken, kind, options, log=False):
        assert predicted == pytest.approx(measured, rel=0.001)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ranks": 2}, "say how they share"),
        ({"ranks": 0, "parallel": "tp"}, "from 1 to"),
        ({"ranks": 2, "parallel": "ddp"}, "parallel='ddp'"),
        ({"ranks": 2, "parallel": "fsdp", "batch": 3}, "multiple of 2"),
    ],
)
def test_refused(fields, said):
    with pytest.raises(PlanError, match=said):
        Settings(**fields)


def test_a_working_set_of_a_rank():
    """Its chunks are cut from the rank's own parts: half the states, and of a chunk only."""
    whole = predict(find_subject(llama()), settings_of("tp", {}), "cpu")
    turning = predict(find_subject(llama()), settings_of("tp", {"working_set": gradfold.WorkingSet(chunks=4)}), "cpu")
    assert turning.chunks == 4
    assert turning.memory.peak_bytes < whole.memory.peak_bytes
    alone = predict(find_subject(llama()), Settings(tokens=48, batch=2, dtype="float32"), "cpu")
    assert whole.memory.resting_bytes == pytest.approx(alone.memory.resting_bytes / 2, rel=0.1)
