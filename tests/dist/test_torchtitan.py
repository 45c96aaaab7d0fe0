"""The container of optimizers, driven by a loop of torchtitan's shape that is written here."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.optim.lr_scheduler import LambdaLR

import gradfold
from tests.dist import pipeline
from tests.dist.tiny import HYPER, batch, furthest, loss_of, tiny

STAGES = 2  # of a rank


def decay(step):
    return 0.5**step


class Loop:
    """What torchtitan's trainer does with the container: schedulers of learning rates, steps, checkpoints."""

    def __init__(self, container, forward_backward):
        self.optimizers = container
        self.schedulers = [LambdaLR(optimizer, decay) for optimizer in container]
        self.forward_backward = forward_backward
        self.counted = 0
        container.register_step_post_hook(self.count)  # torchtitan's float8 and MoE do so

    def count(self, *_):
        self.counted += 1

    def step(self, number):
        self.optimizers.zero_grad()
        self.forward_backward(number)
        self.optimizers.step()
        for scheduler in self.schedulers:
            scheduler.step()


def reference(steps, clip):
    """Train on one process with torch's AdamW."""
    model = tiny(layers=2 * STAGES)
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
    scheduler = LambdaLR(optimizer, decay)
    for step in range(steps):
        for micro in range(pipeline.MICRO):
            ids, labels = batch(step, micro)
            (loss_of(model(ids), labels) / pipeline.MICRO).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model


def train(folder, states):
    """Train in a pipeline, save, and go on on one rank; return differences from one process, and from each other."""
    make = functools.partial(gradfold.AdamW, **HYPER, states=states, small_size=0)
    dtype = torch.float64 if states is None else torch.float32  # codecs compute in fp32
    modules, schedule = pipeline.pipeline("ScheduleInterleaved1F1B", STAGES * dist.get_world_size(), dtype=dtype)
    parts = list(modules.values())
    container = gradfold.torchtitan.FoldedOptimizers(parts, make, schedule=schedule, clip_norm=0.05)
    loop = Loop(container, lambda step: pipeline.run_step(schedule, modules, step))
    for step in range(2):
        loop.step(step)
    dcp.save({"optimizer": container.state_dict(), "model": weights(container.fold.model)}, checkpoint_id=folder)
    rates = [group["lr"] for group in container.param_groups]
    loop.step(2)

    alone = tiny(dtype, layers=2 * STAGES)
    others = gradfold.torchtitan.FoldedOptimizers(
        [alone], make, accumulate=pipeline.MICRO, group="alone", clip_norm=0.05
    )
    saved = {"optimizer": others.state_dict(), "model": weights(alone)}
    dcp.load(saved, checkpoint_id=folder, no_dist=True)
    others.load_state_dict(saved["optimizer"])

    def run(step):
        for micro in range(pipeline.MICRO):
            ids, labels = batch(step, micro)
            (loss_of(alone(ids), labels) / pipeline.MICRO).backward()

    resumed = Loop.__new__(Loop)
    resumed.optimizers, resumed.schedulers, resumed.forward_backward = others, [], run
    resumed.step(2)
    mine = dict(container.fold.model.named_parameters())
    apart = max(float((p - mine[n]).detach().abs().max()) for n, p in alone.named_parameters() if n in mine)
    return (
        furthest(container.fold.model, reference(3, 0.05)),
        apart,
        rates,
        loop.counted,
        sorted(container.state_dict()),
    )


def weights(model):
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("states", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_it_trains_and_resumes_on_other_ranks(two, tmp_path, states):
    found = two.run(train, str(tmp_path / "saved"), states)
    for away, apart, rates, counted, keys in found:
        if states is None:
            assert away <= 1e-11
        assert apart <= (1e-11 if states is None else 1e-6)
        assert rates == [HYPER["lr"] / 4]
        assert counted == 3
        assert all(key.startswith(("state.", "param_groups.")) for key in keys)
    assert "state.layers.1.attention.q.weight.exp_avg" + (".codes" if states else "") in found[1][-1]
    assert not set(found[0][-1]) & set(found[1][-1])


def test_refusals():
    model, others = tiny(), tiny()
    make = functools.partial(gradfold.AdamW, **HYPER)
    with pytest.raises(gradfold.FoldError, match="2 model_parts without a schedule"):
        gradfold.torchtitan.FoldedOptimizers([model, others], make)
    container = gradfold.torchtitan.FoldedOptimizers([model], make)
    saved = container.state_dict()
    with pytest.raises(ValueError, match="norm.weight: is not in the state_dict"):
        container.load_state_dict({key: value for key, value in saved.items() if ".norm.weight." not in key})
    with pytest.raises(ValueError, match="other options"):
        container.load_state_dict({**saved, "param_groups.norm.weight.lr": 1.0})
    ids, labels = batch(0)
    loss_of(model(ids), labels).backward()
    with pytest.raises(gradfold.FoldError, match="get_total_norm of no gradients"):  # torchtitan's own clipping
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    container.step()


def test_it_clips_by_a_call():
    model, other = tiny(), tiny()
    make = functools.partial(gradfold.AdamW, **HYPER)
    container = gradfold.torchtitan.FoldedOptimizers([model], make, timing="deferred")
    optimizer = torch.optim.AdamW(other.parameters(), **HYPER)
    ids, labels = batch(0)
    loss_of(model(ids), labels).backward()
    loss_of(other(ids), labels).backward()
    norm = container.clip_grad_norm_(0.05)
    assert abs(norm - torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)) <= 1e-12
    container.step()
    optimizer.step()
    assert furthest(model, other) <= 1e-11
