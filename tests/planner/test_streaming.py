"""Plans of weights that stream: against the whole model, sums by hand, and the allocator of a real run."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import gradfold
from benchmarks.common import allocator_bytes
from gradfold import Stream
from gradfold.planner.allocator import CONTEXT_BYTES
from gradfold.planner.errors import NothingFits, PlanError
from gradfold.planner.models import find_subject
from gradfold.planner.predict import predict
from gradfold.planner.search import search
from gradfold.planner.settings import Settings
from gradfold.planner.speed import Rates
from gradfold.planner.step import run_step
from gradfold.planner.trace import LiveBytes
from gradfold.planner.workload import Workload, trainable
from gradfold.streaming import streamed_bytes
from gradfold.workset import WorkingSet
from tests.planner.small import gemma2, llama

slow = pytest.mark.slow
SHORT = Settings(tokens=16, batch=2, dtype="float32", stream=Stream())
SIZES = {"vocab_size": 512}


def planned(layers=4, device="cuda", make=llama, **changes):
    return predict(find_subject(make(layers, **SIZES)), dataclasses.replace(SHORT, **changes), device)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"states": "int8", "clip_norm": 1.0, "accumulate": 2}, marks=slow),
        pytest.param({"clip_norm": 1.0, "clip": "two_pass"}, marks=slow),
        pytest.param({"checkpointing": True}, marks=slow),
        pytest.param({"optimizer": "Muon"}, marks=slow),
        pytest.param({"stream": Stream(blocks=3, tile_bytes=4096)}, marks=slow),
        pytest.param({"stream": Stream(layers=["model.layers.?"])}, marks=slow),
        pytest.param({"make": gemma2}, marks=slow),
    ],
    ids=str,
)
def test_two_depths_tell_the_whole(changes, monkeypatch):
    make = changes.pop("make", llama)
    settings = dataclasses.replace(SHORT, **changes)
    of_two = predict(find_subject(make(9, **SIZES)), settings)
    subject = find_subject(make(9, **SIZES))
    monkeypatch.setitem(vars(subject), "depths", None)
    whole = predict(subject, settings)
    assert of_two.memory.as_dict() == whole.memory.as_dict()
    assert dataclasses.replace(of_two, memory=None) == dataclasses.replace(whole, memory=None)


@pytest.mark.parametrize("blocks", [2, 3])
def test_by_hand(blocks):
    """Only blocks, their states' pages and what is outside of blocks are on the device; all else is at home."""
    found = planned(9, stream=Stream(blocks=blocks))
    subject = find_subject(llama(9, **SIZES))
    model = subject.build(torch.float32, None)
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    outside = 4 * sum(p.numel() for name, p in model.named_parameters() if "layers." not in name)
    streamed = found.streamed
    assert (streamed.blocks, streamed.home_bytes) == (9, 9 * layer + 8 * subject.parameters)
    assert streamed.slot_bytes == pytest.approx(blocks * layer, rel=0.01)
    assert streamed.traffic == streamed_bytes([layer] * 9, 8 * subject.parameters, blocks)
    assert found.host_bytes == streamed.home_bytes and not found.disk_bytes
    assert found.moved_bytes_per_step == streamed.traffic.to_device + streamed.traffic.to_host
    resting = found.memory.timeline.at(next(m.event for m in found.memory.timeline.moments if m.label == "forward") - 1)
    assert resting["weights"] == pytest.approx(outside + streamed.slot_bytes, rel=0.01)
    assert resting["staging"] == streamed.page_bytes <= 2 * (8 * 512 * 64 + 128)  # the embedding's
    assert resting["states"] < 4096  # counters


def test_depth_costs_only_what_enters_a_block():
    """A layer more is its input on the device, and its weights and states at home."""
    (one, more) = (planned(layers) for layers in (12, 13))
    assert more.memory.peak_bytes - one.memory.peak_bytes == pytest.approx(4 * 2 * 16 * 64, abs=128)
    layer = (find_subject(llama(13, **SIZES)).parameters - find_subject(llama(12, **SIZES)).parameters) * 4
    assert more.host_bytes - one.host_bytes == 3 * layer


def test_on_disk():
    found = planned(stream=Stream(offload="disk", folder="never-made"))
    assert (found.host_bytes, found.disk_bytes) == (0, found.streamed.home_bytes)


def test_gradients_that_wait_are_in_host_memory():
    without, waiting = planned(), planned(clip_norm=1.0)
    assert waiting.memory.most_bytes("tape") == 0
    assert waiting.streamed.waiting_bytes > 100_000
    assert waiting.host_bytes == waiting.streamed.home_bytes + waiting.streamed.waiting_bytes
    assert waiting.memory.peak_bytes < 1.05 * without.memory.peak_bytes


def test_in_a_call():
    config = llama(4, **SIZES)
    streamed = gradfold.plan(config, stream=Stream(), tokens=16, batch=2, dtype="float32", baselines=False)
    plain = gradfold.plan(config, tokens=16, batch=2, dtype="float32", baselines=False)
    assert streamed.peak_bytes < plain.peak_bytes / 1.5
    said = streamed.as_dict()
    assert said["settings"]["stream"]["offload"] == "cpu"
    assert said["streamed"]["to_device_bytes"] == streamed.predicted.streamed.traffic.to_device
    assert "streamed from host memory, 2 blocks on the device" in str(streamed)


@pytest.mark.parametrize(
    ("changes", "said"), [({"fold": False}, "stream=.*fold=False"), ({"ranks": 2, "parallel": "tp"}, "ranks=2")]
)
def test_refused(changes, said):
    with pytest.raises(PlanError, match=said):
        dataclasses.replace(SHORT, **changes)


# against real runs ----------------------------------------------------------------------------------------------------


def allocator_peak_bytes(subject, settings, steps=2):
    """The most bytes that the processor's allocator has handed out in a step, weights outside of blocks included."""
    workload = Workload(subject, settings, "cpu")
    batch = {name: torch.randint(0, 500, ids.shape) for name, ids in workload.batch().items()}
    turns = settings.working_set
    steps = steps if turns is None else turns.chunks
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        model = subject.build(torch.float32, None)
        optimizer = settings.make_optimizer(trainable(model))
        fold = settings.make_fold(model, optimizer, turns)
        for number in range(2 * steps):
            if number == steps:
                with torch.profiler.record_function("measured steps"):
                    pass
            run_step(model, optimizer, batch, fold, micro_batches=settings.accumulate)
    return allocator_bytes(profiled, "measured steps").peak, fold.traffic


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"states": "int8", "tile_bytes": 40_000}, marks=slow),
        pytest.param({"blocks": 3, "accumulate": 2}, marks=slow),
        pytest.param({"clip_norm": 1.0}, marks=slow),
        pytest.param({"clip_norm": 1.0, "clip": "two_pass"}, marks=slow),
        pytest.param({"working_set": WorkingSet(chunks=3, interval=1)}, marks=slow),
        pytest.param({"optimizer": "SGD", "options": {"momentum": 0.9}}, marks=slow),
    ],
    ids=str,
)
def test_off_by_two_hundredths_at_most(changes, tmp_path):
    stream = {name: changes.pop(name) for name in ("blocks", "tile_bytes") if name in changes}
    settings = dataclasses.replace(SHORT, stream=Stream(offload="disk", folder=tmp_path, **stream), **changes)
    subject = find_subject(llama(6, hidden_size=128, intermediate_size=320, **SIZES))
    found = predict(subject, dataclasses.replace(settings, tokens=64), "cpu")
    peak, traffic = allocator_peak_bytes(subject, dataclasses.replace(settings, tokens=64))
    assert found.memory.peak_bytes == pytest.approx(peak, rel=0.02)
    if settings.working_set is None:
        assert found.streamed.traffic == dataclasses.replace(traffic, seconds_waited=0.0)


# the meter ------------------------------------------------------------------------------------------------------------


def test_what_is_elsewhere_stays_there_whatever_meets_it():
    home, here = torch.zeros(64), torch.zeros(16)
    with LiveBytes() as live:
        live.leave(home)
        live.track(here, category="weights")
        assert (live.now_bytes, live.elsewhere_bytes) == (64, 256)
        here.copy_(home[:16])
        live.track(home, category="states")
        live.move("staging", home)
        live.label(home, "masters")
        assert (live.now_bytes, live.elsewhere_bytes) == (64, 256)
        live.leave(here)
        assert (live.now_bytes, live.elsewhere_bytes) == (0, 320)
        with live.elsewhere():
            waiting = torch.zeros(8)
        assert (live.now_bytes, live.elsewhere_bytes) == (0, 352)
        del waiting, home
        assert (live.now_bytes, live.elsewhere_bytes, live.peak_elsewhere_bytes) == (0, 64, 352)
    assert not live.timeline().live_bytes[-1].any()


# how long it takes, and what fits -------------------------------------------------------------------------------------


def test_when_the_link_hides():
    """By hand: 8 operations per weight and token beside what crosses the link."""
    plan = gradfold.plan(llama(9, **SIZES), SHORT, baselines=False, rates=Rates(flops=1e12, link_bytes=1e9))
    times, moved = plan.stream_times, plan.predicted.streamed.traffic
    assert times.link_s == moved.to_device / 1e9 and times.by == "link" and not times.hides
    assert times.compute_s == pytest.approx(8 * plan.predicted.parameters * 32 / 1e12, rel=0.05)
    assert times.tokens == pytest.approx(times.link_s * 1e12 / (8 * plan.predicted.parameters), rel=0.05)
    assert times.step_s == times.link_s
    assert f"the link decides, and would hide behind {times.tokens:,} tokens a step (this one has 32)" in str(plan)
    longer = dataclasses.replace(plan, rates=Rates(flops=1e6, link_bytes=1e9))
    assert longer.stream_times.hides and longer.stream_times.step_s == longer.stream_times.compute_s
    settings = dataclasses.replace(SHORT, stream=Stream(offload="disk", folder="x"))
    from_disk = dataclasses.replace(plan, settings=settings, rates=Rates(link_bytes=1e9, disk_bytes=1e8)).stream_times
    assert (from_disk.by, from_disk.link_s) == ("disk", (moved.to_device + moved.to_host) / 1e8)


@pytest.mark.slow
def test_a_budget_below_the_weights_is_met_by_streaming():
    subject = find_subject(llama(12, hidden_size=128, intermediate_size=320, vocab_size=64, dtype="float32"))
    settings = Settings(tokens=8, batch=1, dtype="float32")
    budget = CONTEXT_BYTES + int(0.6 * 4 * subject.parameters)
    found = search(subject, settings, budget)
    assert [choice.why for choice in found.choices] == ["streamed"] * 2
    assert [choice.settings.states for choice in found.choices] == [None, "int8"]
    assert all(choice.device_bytes <= budget for choice in found.choices)
    host = found.choices[1].predicted.host_bytes
    assert host == found.choices[1].predicted.streamed.home_bytes
    # less host memory: fewer bytes of states first, then the disk
    least = search(subject, settings, budget, host_budget_bytes=int(1.01 * host))
    assert least.choices[0].settings.states == "int8" and least.choices[0].predicted.host_bytes <= 1.01 * host
    disk = search(subject, settings, budget, host_budget_bytes=1000, fixed=("states",))
    assert disk.choices[0].settings.stream.offload == "disk" and not disk.choices[0].predicted.host_bytes
    with pytest.raises(PlanError, match="the weights of llama alone are"):
        search(subject, settings, budget, fixed=("stream",))
    with pytest.raises(NothingFits, match="nothing fits; of all that was tried the least is"):
        search(subject, settings, CONTEXT_BYTES + 4 * subject.parameters // 20)
