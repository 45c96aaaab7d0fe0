"""deepcopy and pickle of optimizers: ordinary optimizers over their own copies of the weights, which go on alike."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

import gradfold
from tests.cases import BUSY, Given, both_routes, each_rule, problem, train

SHAPES = [(5, 4), (6,)]


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def through_torch_save(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize(
    "copied", [copy.deepcopy, through_pickle, through_torch_save], ids=lambda f: f.__name__
)


def trained(row, route):
    given = problem(SHAPES, steps=6)
    model = Given(given.weights)
    optimizer = row.ours(model.weights())
    if route == "folded":
        gradfold.fold(model, optimizer)
    train(model, optimizer, given.grads[:3])
    return model, optimizer, given.grads[3:]


@each_rule
@both_routes
@COPIES
def test_a_copy_goes_on_alike_and_apart(row, route, copied):
    model, optimizer, grads = trained(row, route)
    frozen_in_time = [weight.detach().clone() for weight in model.weights()]
    twin, other = copied((model, optimizer))
    assert other.param_groups[0]["params"] == twin.weights(), "the copies belong together"
    assert type(other) is type(optimizer)
    assert {key: other.defaults[key] for key in optimizer.defaults} == optimizer.defaults
    train(twin, other, grads)
    assert all(torch.equal(weight, kept) for weight, kept in zip(model.weights(), frozen_in_time, strict=True))
    train(model, optimizer, grads)
    for weight, copy_of in zip(model.weights(), twin.weights(), strict=True):
        assert torch.equal(weight, copy_of)


@COPIES
def test_a_copy_of_a_folded_optimizer_is_not_folded(copied):
    model, optimizer, grads = trained(BUSY["AdamW"], "folded")
    twin, other = copied((model, optimizer))
    twin(grads[0]).backward()
    assert all(weight.grad is not None for weight in twin.weights())
    assert all(type(module).__mro__[1].__name__ != "Folded" for module in twin.modules())
    fold = gradfold.fold(twin, other)  # and can be
    assert {row.route for row in fold.report().rows} == {"folded", "hooked"}


@COPIES
def test_a_copy_of_the_optimizer_alone(copied):
    """Its parameters are copied along, as torch's are."""
    model, optimizer, _ = trained(BUSY["AdamW"], "folded")
    other = copied(optimizer)
    mine, theirs = optimizer.state_dict(), other.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for index, states in mine["state"].items():
        assert all(torch.equal(states[key], theirs["state"][index][key]) for key in states)
    for weight, copy_of in zip(model.weights(), other.param_groups[0]["params"], strict=True):
        assert copy_of is not weight and torch.equal(weight, copy_of)


@both_routes
def test_a_copy_with_a_scheduler_attached(route):
    """A scheduler wraps the optimizer's step in place; the copy must not step the original."""
    model, optimizer, grads = trained(BUSY["AdamW"], route)
    lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    before = [weight.detach().clone() for weight in model.weights()]
    twin, other = copy.deepcopy((model, optimizer))
    train(twin, other, grads)
    assert all(torch.equal(weight, kept) for weight, kept in zip(model.weights(), before, strict=True))
    assert not torch.equal(twin.weights()[0], before[0])


@both_routes
def test_a_copied_optimizer_keeps_its_tensor_lr_apart(route):
    row = BUSY["AdamW"]._replace(hyper={"lr": ("tensor", 0.1)})
    _, optimizer, _ = trained(row, route)
    other = copy.deepcopy(optimizer)
    other.param_groups[0]["lr"].mul_(2)
    assert optimizer.param_groups[0]["lr"] == 0.1
