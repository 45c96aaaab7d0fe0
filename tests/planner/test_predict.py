"""A predicted step is the real one: on this processor byte for byte, where both can be run."""

import dataclasses

import pytest
import torch

from gradfold.planner.models import find_subject
from gradfold.planner.predict import predict, predict_baseline, resting_of
from gradfold.planner.settings import Settings
from gradfold.planner.step import measure_step
from gradfold.planner.trace import CATEGORIES
from gradfold.planner.workload import enable_checkpointing, trainable
from tests.planner.small import llama

slow = pytest.mark.slow
SHORT = Settings(tokens=16, batch=2, dtype="float32")


def measured(subject, settings):
    model = subject.build(torch.float32, None)
    assert not settings.checkpointing or enable_checkpointing(model)
    ids = torch.zeros(settings.batch, settings.tokens, dtype=torch.int64)
    return measure_step(
        model,
        settings.make_optimizer(trainable(model)),
        {"input_ids": ids, "labels": ids},
        fold=(lambda model, optimizer: settings.make_fold(model, optimizer, None)) if settings.fold else False,
        micro_batches=settings.accumulate,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fold": False},
        {"states": "int8", "checkpointing": True},
        {"optimizer": "AdamWScheduleFree"},
        pytest.param({"optimizer": "AdamMini"}, marks=slow),
        pytest.param({"optimizer": "LAMB"}, marks=slow),
        pytest.param({"optimizer": "LARS"}, marks=slow),
        pytest.param({"fold": False, "states": "int8"}, marks=slow),
        pytest.param({"head": "plain"}, marks=slow),
        pytest.param({"optimizer": "SGD", "options": {"momentum": 0.9}}, marks=slow),
        pytest.param({"accumulate": 2}, marks=slow),
        pytest.param({"clip_norm": 1.0}, marks=slow),
        pytest.param({"fold": False, "checkpointing": True}, marks=slow),
    ],
    ids=lambda changes: ", ".join(f"{name}={value}" for name, value in changes.items()) or "folded",
)
def test_on_a_processor_it_is_the_real_step(changes):
    subject, settings = find_subject(llama(2)), dataclasses.replace(SHORT, **changes)
    predicted, real = predict(subject, settings, "cpu").memory, measured(subject, settings)
    assert predicted.peak_bytes == real.peak_bytes
    assert predicted.resting_bytes == real.resting_bytes
    assert predicted.at_peak() == real.at_peak()
    assert (predicted.peak_phase, predicted.peak_place) == (real.peak_phase, real.peak_place)


def test_a_module_is_predicted_like_its_config():
    subject = find_subject(llama(2))
    of_config = predict(subject, SHORT, "cpu").memory
    of_module = predict(find_subject(subject.build(torch.float32, None)), SHORT, "cpu").memory
    assert of_module.as_dict() == of_config.as_dict()


@pytest.mark.slow
def test_masters_are_masters_folded_or_not():
    subject = find_subject(llama(1))
    settings = Settings(tokens=8, batch=1, dtype="bfloat16", master="split8")
    for fold in (True, False):
        memory = predict(subject, dataclasses.replace(settings, fold=fold)).memory
        assert memory.most_bytes("masters") == pytest.approx(subject.parameters, rel=0.01)


@pytest.mark.parametrize(("states", "each"), [(None, 8), ("bf16", 4), ("int8", 2)])
def test_resting(states, each):
    subject = find_subject(llama(6, hidden_size=256, intermediate_size=512))
    settings = dataclasses.replace(SHORT, states=states)
    weights, held = resting_of(subject, settings)
    assert weights == pytest.approx(4 * subject.parameters, rel=1e-3)  # and the rotary frequencies
    assert held == pytest.approx(each * subject.parameters, rel=0.05)  # and scales of int8


def test_resting_is_that_of_the_whole_model(monkeypatch):
    subject = find_subject(llama(6))
    settings = dataclasses.replace(SHORT, states="int8", small_size=0)
    of_two = resting_of(subject, settings)
    assert subject.depths == (2, 3, 1)
    monkeypatch.setitem(vars(subject), "depths", None)
    assert resting_of(subject, settings) == of_two


@pytest.mark.slow
def test_a_peer_stores_its_gradients():
    import gradfold.planner.baselines as baselines

    subject = find_subject(llama(2))
    memory = predict_baseline(subject, SHORT, baselines.plain, "AdamW")
    assert memory.label == "AdamW"
    assert memory.most_bytes("gradients") == 4 * subject.parameters
    hooks = predict_baseline(subject, SHORT, baselines.SteppedInHooks, "hooks")
    assert hooks.most_bytes("gradients") < memory.most_bytes("gradients") // 2
    states = CATEGORIES.index("states")
    last = hooks.timeline.live_bytes[-1, states], memory.timeline.live_bytes[-1, states]
    assert last[0] == last[1]


def test_peers_that_cannot_do_what_is_asked_are_left_out():
    from gradfold.planner.baselines import BASELINES, baselines_of

    assert baselines_of(SHORT) == [name for name in BASELINES if name != "plain Muon"]
    assert baselines_of(dataclasses.replace(SHORT, optimizer="Muon")) == list(BASELINES)
    for changes in ({"accumulate": 2}, {"clip_norm": 1.0}):
        assert "AdamW in hooks" not in baselines_of(dataclasses.replace(SHORT, **changes))
