"""A working set's memory, against sums by hand: what is awake, on its way, asleep, and how much moves."""

import dataclasses

import pytest
import torch

import gradfold.planner.working_set as planned
from gradfold.engine.resting import RestingSlice
from gradfold.planner.fake_host import FakeHost
from gradfold.planner.models import find_subject
from gradfold.planner.predict import predict
from gradfold.planner.settings import Settings
from gradfold.planner.step import record_step
from gradfold.planner.trace import LiveBytes
from gradfold.planner.workload import trainable
from gradfold.workset import WorkingSet
from tests.planner.small import llama

slow = pytest.mark.slow
SHORT = Settings(tokens=8, batch=1, dtype="float32")
MODEL = {"vocab_size": 512}


def played(turns, device="cuda", layers=1, **changes):
    return predict(
        find_subject(llama(layers, **MODEL)), dataclasses.replace(SHORT, working_set=turns, **changes), device
    )


def all_states(each=8, layers=1):
    return each * find_subject(llama(layers, **MODEL)).parameters


def resting(predicted):
    """By category, before the step begins."""
    timeline = predicted.memory.timeline
    return timeline.at(next(m.event for m in timeline.moments if m.label == "forward") - 1)


@pytest.mark.parametrize("chunks", [1, 2, pytest.param(7, marks=slow)])
def test_offloaded(chunks):
    turns = WorkingSet(chunks=chunks, interval=4, offload="cpu")
    predicted, states = played(turns), all_states()
    assert predicted.chunks == chunks
    awake = resting(predicted)
    assert awake["weights"] == pytest.approx(all_states(4), rel=0.01)
    assert awake["states"] == pytest.approx(states / chunks, rel=0.05)
    assert predicted.host_bytes == pytest.approx(states * (chunks - 1) / chunks, rel=0.02)
    assert predicted.disk_bytes == 0
    moved = 2 * states / chunks / 4 if chunks > 1 else 0
    assert predicted.moved_bytes_per_step == pytest.approx(moved, rel=0.02)
    memory = predicted.memory
    # With prefetch the next chunk's states come while this one's are still there.
    assert memory.most_bytes("staging") == pytest.approx(states / chunks if chunks > 1 else 0, rel=0.05)
    assert memory.most_bytes("states") <= 1.1 * states / chunks
    # One step, and no more: what is there at its end is what a change of chunks leaves.
    assert memory.timeline.at(-1)["states"] == pytest.approx(states / chunks, rel=0.05)
    assert memory.timeline.at(-1)["staging"] == 0


def test_without_prefetch_nothing_comes_before_the_last_has_left():
    predicted = played(WorkingSet(interval=1, chunks=2, offload="cpu", prefetch=0))
    memory = predicted.memory
    both = memory.timeline.live_bytes[:, [2, 3]].sum(axis=1)  # states, staging
    assert both.max() == pytest.approx(all_states() / 2, rel=0.05)


@pytest.mark.slow
def test_on_the_device_all_states_count():
    predicted = played(WorkingSet(chunks=2, interval=4))
    assert resting(predicted)["states"] == pytest.approx(all_states(), rel=0.01)
    assert (predicted.host_bytes, predicted.disk_bytes, predicted.moved_bytes_per_step) == (0, 0, 0)


@pytest.mark.parametrize("device", ["cuda", pytest.param("cpu", marks=slow)])
def test_on_disk(device, tmp_path):
    predicted = played(WorkingSet(interval=1, chunks=2, offload="disk", folder=tmp_path), device)
    assert resting(predicted)["states"] == pytest.approx(all_states() / 2, rel=0.05)
    assert predicted.disk_bytes == pytest.approx(all_states() / 2, rel=0.02)
    assert predicted.moved_bytes_per_step == pytest.approx(all_states(), rel=0.02)
    assert predicted.host_bytes == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_states_that_begin_anew_are_kept_nowhere():
    predicted = played(WorkingSet(interval=1, chunks=2, offload="cpu", states="reset"))
    assert resting(predicted)["states"] == pytest.approx(all_states() / 2, rel=0.05)
    assert predicted.host_bytes == predicted.moved_bytes_per_step == 0
    assert predicted.memory.most_bytes("staging") == 0


@pytest.mark.slow
def test_masters_outlive_a_turn():
    kept = played(
        WorkingSet(interval=1, chunks=2, offload="cpu", states="reset"), dtype="bfloat16", master="split8", small_size=0
    ).host_bytes
    assert kept == pytest.approx(all_states(1) / 2, rel=0.05)


@pytest.mark.slow
def test_by_layer():
    predicted = played(WorkingSet(by="layer", offload="cpu", interval=2), layers=2)
    assert predicted.chunks == 5  # embeddings, two layers, norm, head
    assert predicted.host_bytes == pytest.approx(all_states(layers=2) * 4 / 5, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"clip_norm": 1.0}, {"states": "int8", "checkpointing": True}])
def test_with_other_settings(changes):
    predicted = played(WorkingSet(interval=1, chunks=2, offload="cpu"), **changes)
    each = 2 if changes.get("states") == "int8" else 8
    assert resting(predicted)["states"] == pytest.approx(all_states(each) / 2, rel=0.15)
    assert predicted.memory.peak_bytes > predicted.memory.resting_bytes
    assert sum(m.label == "forward" for m in predicted.memory.timeline.moments) == changes.get("accumulate", 1)


@pytest.mark.parametrize("rest", ["sgd", pytest.param("sign", marks=slow)])
def test_at_rest_the_inputs_above_are_kept_and_no_state(rest):
    """Of the last chunk's turn nothing changes; in the first one's all weights want their inputs."""
    without, with_rest = (
        played(WorkingSet(chunks=4, interval=1, offload="cpu", rest=kind), layers=2) for kind in (None, rest)
    )
    assert resting(with_rest) == pytest.approx(resting(without), rel=0.01)
    assert with_rest.host_bytes == without.host_bytes
    most = [one.memory.most_bytes("activations") for one in (without, with_rest)]
    assert most[1] > most[0]
    most = [one.memory.most_bytes("states") for one in (without, with_rest)]
    assert most[1] == pytest.approx(most[0], rel=0.01)
    # norms are no folded modules: autograd writes the gradient of one of them at a time
    assert with_rest.memory.most_bytes("gradients") <= without.memory.most_bytes("gradients") + 4096


def test_only_the_steps_that_are_traced_move_weights_at_rest(monkeypatch):
    """The steps that change chunks do not: on a large model they took most of a plan's time."""
    stepped, tracing = [], []
    record, take = planned.record_step, RestingSlice.take_step
    monkeypatch.setattr(RestingSlice, "take_step", lambda one, *args: stepped.append(bool(tracing)) or take(one, *args))

    def recorded(*args, **options):
        tracing.append(True)
        made = record(*args, **options)
        tracing.clear()
        return made

    monkeypatch.setattr(planned, "record_step", recorded)
    played(WorkingSet(by="layer", interval=1, offload="cpu", rest="sgd"), layers=2)
    assert stepped and all(stepped)


@slow
@pytest.mark.parametrize("rest", [None, "sgd", "sign"])
@pytest.mark.parametrize(("chunks", "offload"), [(2, None), (2, "cpu"), (5, None)])
def test_on_a_processor_it_is_the_real_round(chunks, offload, rest):
    turns = WorkingSet(interval=1, chunks=chunks, offload=offload, rest=rest)
    subject, settings = find_subject(llama(1, **MODEL)), dataclasses.replace(SHORT, working_set=turns)
    model = subject.build(torch.float32, None)
    optimizer = settings.make_optimizer(trainable(model))
    fold = settings.make_fold(model, optimizer, turns)
    rotation = fold._state.turns
    ids = torch.zeros(1, SHORT.tokens, dtype=torch.int64)

    def asleep(live):
        live.track([t for slot in rotation.turning for _, held in rotation._sleeping(slot) for t in held.values()])

    steps = [
        record_step(model, optimizer, {"input_ids": ids, "labels": ids}, fold, meet=asleep) for _ in range(2 * chunks)
    ][chunks:]
    predicted = predict(subject, settings, "cpu").memory
    counters = 4 * 12 * chunks  # of chunks that a plan does not wake
    assert abs(predicted.resting_bytes - steps[0].resting_bytes) <= counters
    assert abs(predicted.peak_bytes - max(step.peak_bytes for step in steps)) <= counters


def test_a_played_host():
    host = FakeHost()
    with LiveBytes() as live:
        tensors = {"exp_avg": torch.zeros(256), "exp_avg_sq": torch.zeros(256)}
        live.track(tensors, category="states")
        host.meter = live
        host.put("w", tensors)
        assert (live.now_bytes, host.left_bytes) == (0, 2048)
        del tensors
        host.prefetch(["w", "x"], "cpu")
        host.prefetch(["w"], "cpu")  # is on its way
        assert live.now_bytes == 2048
        assert torch.ones(1).numel()  # an event at which it is on its way
        taken = host.take("w", "cpu")
        assert live.now_bytes == 2048 and set(taken) == {"exp_avg", "exp_avg_sq"}
        assert host.take("w", "cpu") is None
        del taken
        assert live.now_bytes == 0
    staged = [live.timeline().at(event) for event in range(len(live.timeline().ops))]
    assert max(at["staging"] for at in staged) == 2048
    assert max(at["states"] for at in staged) == 2048
