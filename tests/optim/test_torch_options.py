"""Arguments that choose among torch's implementations: taken where they change nothing, refused where they do."""

import copy
import inspect

import pytest
import torch
from torch import nn

import gradfold
from tests.cases import NAMES
from tests.zoo import distance

CLOSE = 1e-12
OPTIONS = [
    {"foreach": True},
    {"foreach": False},
    {"foreach": None},
    {"fused": True},
    {"fused": False},
    {"fused": None},
    {"fused": None, "foreach": None},
    {"foreach": False, "fused": False},
    {"differentiable": False},
    {"capturable": False},
    {"maximize": True},
    {"maximize": True, "foreach": True},
    {"maximize": True, "fused": True},
]
THEIRS = [name for name in NAMES if name != "Lion"]


def takes(name, options):
    """Whether torch's optimizer of this name has these arguments."""
    return set(options) <= set(inspect.signature(getattr(torch.optim, name).__init__).parameters)


def train(model, optimizer, steps=3):
    for step in range(steps):
        x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).double()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", THEIRS)
def test_as_torchs_optimizer_takes_them(name, options):
    plain, model = models()
    if not takes(name, options) and "capturable" not in options:
        (key,) = set(options) - set(inspect.signature(getattr(torch.optim, name).__init__).parameters)
        for kind in (getattr(torch.optim, name), getattr(gradfold, name)):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'"):
                kind(plain.parameters(), **options)
        return
    theirs = getattr(torch.optim, name)(plain.parameters(), lr=1e-2, **(options if takes(name, options) else {}))
    ours = getattr(gradfold, name)(model.parameters(), lr=1e-2, **options)
    for key, value in options.items():
        assert ours.param_groups[0][key] is value
    gradfold.fold(model, ours)
    train(plain, theirs)
    train(model, ours)
    # torch's foreach ASGD keeps its learning rate in fp32 where the for-loop does not
    assert distance(model, plain) < (1e-8 if name == "ASGD" and options.get("foreach") else CLOSE)


@pytest.mark.parametrize("options", [one for one in OPTIONS if "capturable" not in one], ids=str)
def test_lion_takes_all_of_them(options):
    _, model = models()
    _, again = models()
    sign = {"maximize": True} if "maximize" in options else {}
    for one, given in ((model, options), (again, sign)):
        optimizer = gradfold.Lion(one.parameters(), **given)
        gradfold.fold(one, optimizer)
        train(one, optimizer)
    assert distance(model, again) == 0


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_torchs_keys_whatever_is_given(name):
    """So that a state_dict goes from torch to here and back."""
    _, model = models()
    usual = set(getattr(gradfold, name)(model.parameters()).param_groups[0])
    assert set(getattr(gradfold, name)(model.parameters(), foreach=True).param_groups[0]) == usual | {"foreach"}


@pytest.mark.parametrize("where", ["argument", "group", "add_param_group", "state_dict"])
@pytest.mark.parametrize("name", NAMES)
def test_differentiable_is_refused(name, where):
    make = getattr(gradfold, name)
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="differentiable=True: the rules run without grad.*differentiable=False"):
        if where == "argument":
            make([first], differentiable=True)
        elif where == "group":
            make([{"params": [first]}, {"params": [second], "differentiable": True}])
        elif where == "add_param_group":
            make([first]).add_param_group({"params": [second], "differentiable": True})
        else:
            saved = make([first]).state_dict()
            saved["param_groups"][0]["differentiable"] = True
            make([second]).load_state_dict(saved)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "Lion"])
def test_fused_and_foreach_together(name):
    with pytest.raises(ValueError, match="fused=True with foreach=True"):
        getattr(gradfold, name)([nn.Parameter(torch.zeros(2))], fused=True, foreach=True)


@pytest.mark.parametrize("name", [name for name in THEIRS if takes(name, {"fused": True})])
def test_a_fused_state_dict_goes_there_and_back(name):
    plain, model = models()
    theirs = getattr(torch.optim, name)(plain.parameters(), lr=1e-2, fused=True)
    ours = getattr(gradfold, name)(model.parameters(), lr=1.0)
    train(plain, theirs)
    model.load_state_dict(plain.state_dict())
    ours.load_state_dict(theirs.state_dict())
    fold = gradfold.fold(model, ours)
    train(plain, theirs)
    train(model, ours)
    assert distance(model, plain) < CLOSE and ours.param_groups[0]["fused"] is True
    fold.remove()
    back = getattr(torch.optim, name)(model.parameters(), lr=1.0)
    back.load_state_dict(ours.state_dict())
    train(plain, theirs)
    train(model, back)
    assert distance(model, plain) < CLOSE
