"""A true torch.optim.Optimizer, folded or not: groups, closures, hooks, zero_grad, tensor lr."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gradfold
from tests.cases import BUSY, BUSY_ROWS, Given, both_routes, each_rule, each_torch_rule, problem, train, with_states

SHAPES = [(5, 4), (4, 7), (6,), (3, 3)]
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def start(row, route, groups=lambda weights: weights, steps=8):
    """A model, gradfold's optimizer over ``groups`` of its weights, and gradients for some steps."""
    given = problem(SHAPES, steps=steps)
    model = Given(given.weights)
    optimizer = row.ours(groups(model.weights()))
    if route == "folded":
        gradfold.fold(model, optimizer)
    return model, optimizer, given


def twin(row, groups=lambda weights: weights, steps=8):
    given = problem(SHAPES, steps=steps)
    model = Given(given.weights)
    return model, row.torchs(groups(model.weights())), given


def assert_equal(model, reference):
    for ours, theirs in zip(model.weights(), reference.weights(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), **CLOSE)


@each_rule
def test_it_is_a_torch_optimizer(row):
    model, optimizer, _ = start(row, "unfolded")
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["params"] == model.weights()
    assert optimizer.defaults.keys() <= optimizer.param_groups[0].keys()
    assert row.name in repr(optimizer) and "lr" in repr(optimizer)


# per-group hyper-parameters, and the values they are changed to in mid-training
GROUP_HYPERS = {
    "AdamW": {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.7, "maximize": True},
    "Adam": {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.7, "maximize": True},
    "SGD": {"lr": 0.3, "momentum": 0.4, "dampening": 0.2, "weight_decay": 0.7, "maximize": True},
    "RMSprop": {"lr": 0.3, "alpha": 0.6, "eps": 1e-3, "weight_decay": 0.7, "momentum": 0.4, "maximize": True},
    "Adagrad": {"lr": 0.3, "lr_decay": 0.5, "eps": 1e-3, "weight_decay": 0.7, "maximize": True},
    "NAdam": {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.7, "momentum_decay": 0.1},
    "Adadelta": {"lr": 0.3, "rho": 0.6, "eps": 1e-3, "weight_decay": 0.7, "maximize": True},
    "Adamax": {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.7, "maximize": True},
    "ASGD": {"lr": 0.3, "lambd": 0.3, "alpha": 0.5, "t0": 1.0, "weight_decay": 0.7, "maximize": True},
    "Rprop": {"lr": 0.3, "etas": (0.4, 1.5), "step_sizes": (1e-3, 0.055), "maximize": True},
    "RAdam": {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.7, "decoupled_weight_decay": True},
}


@each_torch_rule
@both_routes
def test_each_groups_hyperparameters_reach_the_update(row, route):
    def groups(weights):
        return [{"params": weights[::2]}, {"params": weights[1::2], **GROUP_HYPERS[row.name]}]

    model, optimizer, given = start(row, route, groups)
    reference, theirs, _ = twin(row, groups)
    train(model, optimizer, given.grads)
    train(reference, theirs, given.grads)
    assert_equal(model, reference)


HYPER_CHANGES = [(name, key) for name, hypers in GROUP_HYPERS.items() for key in hypers]
# what changes no weight any more: the average is beside them, and step sizes start once
HYPER_CHANGES = [change for change in HYPER_CHANGES if change not in (("ASGD", "t0"), ("Rprop", "lr"))]


@pytest.mark.parametrize(("name", "key"), HYPER_CHANGES, ids=lambda value: value)
@both_routes
def test_groups_are_live(name, key, route):
    """Every hyper-parameter, set in param_groups between two steps, counts from the next one on."""
    row, value, steps = BUSY[name], GROUP_HYPERS[name][key], 4
    if name == "RAdam":  # which looks at eps from the sixth step on
        steps = 8
    model, optimizer, given = start(row, route, steps=steps)
    reference, theirs, _ = twin(row, steps=steps)
    unchanged, kept, _ = twin(row, steps=steps)
    for net, each in ((model, optimizer), (reference, theirs), (unchanged, kept)):
        train(net, each, given.grads[:2])
        if each is not kept:
            each.param_groups[0][key] = value
        train(net, each, given.grads[2:])
    assert_equal(model, reference)
    assert not torch.allclose(reference.weights()[0], unchanged.weights()[0], atol=1e-9), "the change changes nothing"


@both_routes
def test_options_that_need_another_state_can_be_switched_on(route):
    """momentum from 0: the new buffer starts as the gradient, as in torch."""
    row = BUSY["SGD"]._replace(hyper={"lr": 0.1})
    model, optimizer, given = start(row, route, steps=5)
    reference, theirs, _ = twin(row, steps=5)
    for net, each in ((model, optimizer), (reference, theirs)):
        train(net, each, given.grads[:2])
        each.param_groups[0].update(momentum=0.9, dampening=0.5)
        train(net, each, given.grads[2:])
    assert_equal(model, reference)


@each_torch_rule
@both_routes
def test_tensor_lr_changed_in_place(row, route):
    row = row._replace(hyper={**row.hyper, "lr": ("tensor", 0.05)})
    model, optimizer, given = start(row, route)
    reference, theirs, _ = twin(row)
    for net, each in ((model, optimizer), (reference, theirs)):
        train(net, each, given.grads[:3])
        each.param_groups[0]["lr"].mul_(0.25)
        train(net, each, given.grads[3:])
    assert_equal(model, reference)


@both_routes
def test_step_with_a_closure(route):
    model, optimizer, given = start(BUSY["AdamW"], route)
    reference, theirs, _ = twin(BUSY["AdamW"])
    for grads in given.grads:
        losses = []
        for net, each in ((model, optimizer), (reference, theirs)):

            def closure(net=net, each=each, grads=grads):
                assert torch.is_grad_enabled()
                each.zero_grad()
                loss = net(grads)
                loss.backward()
                return loss

            with torch.no_grad():
                losses.append(each.step(closure).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert_equal(model, reference)


@both_routes
def test_step_hooks_run_once_per_step_around_it(route):
    model, optimizer, given = start(BUSY["AdamW"], route, steps=3)
    calls = []

    def hook(name):
        def called(which, args, kwargs):
            assert which is optimizer
            calls.append(name)

        return called

    handles = [
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        train(model, optimizer, given.grads)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"] * 3
    train(model, optimizer, given.grads)
    assert len(calls) == 12


@each_torch_rule
@both_routes
def test_add_param_group_before_folding(row, route):
    def groups(weights):
        return weights[:2]

    results = []
    for make in (lambda: start(row, "unfolded", groups), lambda: twin(row, groups)):
        model, optimizer, given = make()
        optimizer.add_param_group({"params": model.weights()[2:], "lr": 0.2})
        with_states(optimizer)
        if route == "folded" and isinstance(optimizer, gradfold.optim.RuleOptimizer):
            gradfold.fold(model, optimizer)
        train(model, optimizer, given.grads)
        results.append(model)
    assert_equal(*results)


@each_torch_rule
def test_add_param_group_after_folding(row):
    """Frozen at first, so that the fold may leave it out; then unfrozen and added, as gradual unfreezing does."""
    results = []
    for folded in (True, False):
        given = problem(SHAPES)
        model = Given(given.weights)
        late = model.weights()[2:]  # one that is hooked, one whose Linear was not folded
        for weight in late:
            weight.requires_grad_(False)
        optimizer = (row.ours if folded else row.torchs)(model.weights()[:2])
        if folded:
            gradfold.fold(model, optimizer)
        train(model, optimizer, given.grads[:4])
        for weight in late:
            weight.requires_grad_(True)
        optimizer.add_param_group({"params": late, "lr": 0.2})
        train(model, with_states(optimizer), given.grads[4:])
        assert all(weight.grad is None for weight in late)
        results.append(model)
    assert_equal(*results)


def test_add_param_group_of_a_stranger_to_the_fold_changes_nothing():
    _, optimizer, _ = start(BUSY["AdamW"], "folded")
    with pytest.raises(gradfold.FoldError, match="add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1


@both_routes
def test_add_param_group_with_a_bad_value_changes_nothing(route):
    _, optimizer, _ = start(BUSY["AdamW"], route)
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": -1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_unfolded(set_to_none):
    model, optimizer, given = start(BUSY["AdamW"], "unfolded")
    model(given.grads[0]).backward()
    optimizer.zero_grad(set_to_none)
    for weight in model.weights():
        assert weight.grad is None if set_to_none else not weight.grad.any()


def test_folded_there_is_no_grad_at_any_time():
    model, optimizer, given = start(BUSY["AdamW"], "folded")
    for grads in given.grads:
        model(grads).backward()
        assert all(weight.grad is None for weight in model.weights())
        optimizer.step()
        optimizer.zero_grad()


@each_rule
def test_a_parameter_without_a_gradient_does_not_step(row):
    model, optimizer, given = start(row, "unfolded")
    before = [weight.detach().clone() for weight in model.weights()]
    optimizer.step()
    model.weights()[0].grad = given.grads[0][0]
    optimizer.step()
    changed = [not torch.equal(weight, old) for weight, old in zip(model.weights(), before)]
    assert changed == [True, False, False, False]
    assert set(optimizer.state_dict()["state"]) <= {0}


@pytest.mark.parametrize("row", BUSY_ROWS, ids=lambda row: row.name)
@both_routes
def test_named_parameters_in_groups(row, route):
    given = problem(SHAPES)
    named, plain = Given(given.weights), Given(given.weights)
    optimizer = row.ours(named.named_parameters())
    if route == "folded":
        gradfold.fold(named, optimizer)
    train(named, optimizer, given.grads)
    train(plain, row.ours(plain.parameters()), given.grads)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in named.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == optimizer.param_groups[0]["param_names"]
    assert_equal(named, plain)
    groups = [{"params": [pair]} for pair in Given(given.weights).named_parameters()]
    assert [group["param_names"] for group in row.ours(groups).param_groups] == [[name] for name in named.state_dict()]


@both_routes
def test_a_parameter_moved_to_another_group_takes_its_hyperparameters(route):
    def groups(weights):
        return [{"params": weights[:3]}, {"params": weights[3:], "lr": 0.3}]

    model, optimizer, given = start(BUSY["AdamW"], route, groups)
    reference, theirs, _ = twin(BUSY["AdamW"], groups)
    for net, each in ((model, optimizer), (reference, theirs)):
        train(net, each, given.grads[:2])
        each.param_groups[1]["params"].append(each.param_groups[0]["params"].pop())
        train(net, each, given.grads[2:])
    assert_equal(model, reference)
