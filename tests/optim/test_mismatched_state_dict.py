"""A state_dict of something else is a clear error, and changes nothing."""

import copy

import pytest
import torch

import gradfold
from tests.cases import BUSY, Given, both_routes, problem, train

SHAPES = [(5, 4), (6,)]


def drop_a_parameter(saved):
    saved["param_groups"][0]["params"].pop()


def drop_a_group(saved):
    saved["param_groups"].clear()


def add_a_group(saved):
    saved["param_groups"].append({**saved["param_groups"][0], "params": [2]})


def wrong_shape(saved):
    saved["state"][1]["exp_avg_sq"] = torch.zeros(7)


def other_order(saved):
    saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]


def broadcastable_shape(saved):
    saved["state"][0]["exp_avg"] = torch.zeros(1)


def bad_hyperparameter(saved):
    saved["param_groups"][0]["lr"] = -0.5


def differentiable(saved):
    saved["param_groups"][0]["differentiable"] = True


CHANGES = {
    drop_a_parameter: r"\[1\] parameters, this optimizer of \[2\]",
    drop_a_group: r"\[\] parameters",
    add_a_group: r"\[2, 1\] parameters",
    wrong_shape: r"'exp_avg_sq' has shape \(7,\) for a parameter of shape \(6,\)",
    other_order: r"'exp_avg' has shape \(6,\) for a parameter of shape \(5, 4\)",
    broadcastable_shape: r"'exp_avg' has shape \(1,\)",
    bad_hyperparameter: "lr=-0.5",
    differentiable: "differentiable=True",
}


def trained(name, route):
    given = problem(SHAPES, steps=2)
    model = Given(given.weights)
    optimizer = BUSY[name].ours(model.weights())
    if route == "folded":
        gradfold.fold(model, optimizer)
    train(model, optimizer, given.grads)
    return optimizer


def assert_refused(optimizer, saved, message):
    before = copy.deepcopy(optimizer.state_dict())
    groups, states = optimizer.param_groups[0], [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0] is groups
    assert all(optimizer.state[p] is kept for p, kept in zip(groups["params"], states, strict=True))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, kept in before["state"].items():
        assert all(torch.equal(after["state"][index][key], kept[key]) for key in kept)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@both_routes
def test_refused_and_nothing_changed(change, route):
    optimizer = trained("AdamW", route)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    assert_refused(optimizer, saved, CHANGES[change])


@pytest.mark.parametrize(
    ("saved", "into"),
    [("SGD", "AdamW"), ("AdamW", "SGD"), ("AdamW", "Lion"), ("Lion", "AdamW"), ("RMSprop", "Adam")],
)
def test_another_optimizers_states_are_refused(saved, into):
    assert_refused(
        trained(into, "unfolded"), trained(saved, "unfolded").state_dict(), "exp_avg|momentum_buffer|square_avg"
    )


def test_folded_it_waits_for_a_closed_step():
    given = problem(SHAPES, steps=1)
    model = Given(given.weights)
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    model(given.grads[0]).backward()
    for action in (optimizer.state_dict, lambda: optimizer.load_state_dict(saved)):
        with pytest.raises(gradfold.FoldError, match="in the middle of a step"):
            action()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
