"""torch's learning-rate schedulers drive gradfold's optimizers, folded or not, as they drive torch's."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler

import gradfold
from tests.cases import BUSY, Given, both_routes, problem

STEPS = 10
METRICS = [1.0, 0.5, 0.6, 0.7, 0.8, 0.4, 0.4, 0.5, 0.6, 0.7]  # plateaus twice
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.8**t, lambda t: 1 / (1 + t)]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.3], total_steps=STEPS + 1),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4), lr_scheduler.ExponentialLR(o, gamma=0.7)],
        milestones=[4],
    ),
}
# OneCycleLR and CyclicLR also move betas or momentum
RULES = {"AdamW": BUSY["AdamW"], "SGD": BUSY["SGD"]._replace(hyper={"lr": 0.05, "momentum": 0.9})}


def run(make, scheduler, fold=False):
    """Final weights, and per step what the first group was set to."""
    given = problem([(5, 4), (6,)], steps=STEPS)
    model = Given(given.weights)
    first, second = model.weights()
    optimizer = make([{"params": [first]}, {"params": [second], "lr": 0.02}])
    if fold:
        gradfold.fold(model, optimizer)
    schedule, seen = scheduler(optimizer), []
    for grads, metric in zip(given.grads, METRICS, strict=True):
        model(grads).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(*([metric] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
        seen.append([(float(g["lr"]), g.get("betas"), g.get("momentum")) for g in optimizer.param_groups])
    return model.weights(), seen


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("row", RULES.values(), ids=RULES)
@pytest.mark.parametrize("lr", [0.05, ("tensor", 0.05)], ids=["float", "tensor"])
@both_routes
def test_schedule_equals_torchs(scheduler, row, lr, route):
    row = row._replace(hyper={**row.hyper, "lr": lr})
    weights, seen = run(row.ours, scheduler, fold=route == "folded")
    want, expected = run(row.torchs, scheduler)
    assert seen == expected
    assert len({group[0] for group, _ in seen}) > 1, "the schedule never changed the learning rate"
    for ours, theirs in zip(weights, want, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-13)


def test_no_warning_about_the_order_of_steps(recwarn):
    """torch warns when scheduler.step() comes before any optimizer.step(), which it counts itself."""
    run(BUSY["AdamW"].ours, SCHEDULERS["StepLR"], fold=True)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@both_routes
def test_a_scheduled_optimizer_resumes(route):
    """Optimizer and scheduler state_dicts, loaded into new ones in mid-schedule, continue bit for bit."""
    given = problem([(5, 4), (6,)], steps=STEPS)

    def make(weights):
        model = Given(weights)
        optimizer = BUSY["AdamW"].ours(model.weights())
        if route == "folded":
            gradfold.fold(model, optimizer)
        return model, optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=STEPS + 1)

    def go(model, optimizer, scheduler, batches):
        for grads in batches:
            model(grads).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    model, optimizer, scheduler = make(given.weights)
    go(model, optimizer, scheduler, given.grads[:5])
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    again, other, schedule = make([weight.detach() for weight in model.weights()])
    other.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    go(model, optimizer, scheduler, given.grads[5:])
    go(again, other, schedule, given.grads[5:])
    for weight, resumed in zip(model.weights(), again.weights(), strict=True):
        assert torch.equal(weight, resumed)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
