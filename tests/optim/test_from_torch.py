"""An optimizer of torch becomes gradfold's, in place: whoever holds it, a scheduler for instance, holds gradfold's."""

import copy

import pytest
import torch
from torch import nn

import gradfold
from gradfold.optim import from_torch
from tests.zoo import RULES, TORCH_RULES, distance, same_bits, torchs, twins

BATCHES = torch.randn(6, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def mlp():
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False)).double()


def train(model, optimizer, scheduler, batches):
    for batch in batches:
        model(batch).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


@pytest.mark.parametrize("stepped", [0, 3])
@pytest.mark.parametrize("rule", TORCH_RULES)
def test_it_goes_on_where_torch_was(rule, stepped, recwarn):
    """With a scheduler that was made before, groups and hooks; folded from then on."""
    plain, model = twins(mlp)
    kept = [torchs(plain, rule), torchs(model, rule)]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5) for optimizer in kept]
    calls = []
    kept[1].register_step_post_hook(lambda *_: calls.append(1))
    train(plain, kept[0], schedulers[0], BATCHES)
    groups = kept[1].param_groups
    train(model, kept[1], schedulers[1], BATCHES[:stepped])
    found = from_torch(kept[1])
    assert found is kept[1] and type(found) is getattr(gradfold, rule)
    assert found.param_groups is groups and schedulers[1].optimizer is found
    gradfold.fold(model, found)
    train(model, found, schedulers[1], BATCHES[stepped:])
    assert distance(model, plain) < 1e-12 and len(calls) == len(BATCHES)
    assert found.param_groups[0]["lr"] == kept[0].param_groups[0]["lr"]
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
    kept[0].load_state_dict(found.state_dict())
    assert repr(found) and copy.deepcopy(found).state_dict().keys() == found.state_dict().keys()


def test_its_states_are_stored_as_asked():
    model = nn.Linear(128, 64)
    optimizer = torchs(model)
    model(torch.ones(2, 128)).sum().backward()
    optimizer.step()
    from_torch(optimizer, states="int8", small_size=0)
    assert {"exp_avg.codes", "exp_avg.scales"} <= optimizer.state[model.weight].keys()
    assert optimizer.param_groups[0]["states"] == "int8"


def test_lion_from_adamw():
    plain, model = twins(mlp)
    optimizers = (
        gradfold.Lion(plain.parameters(), **RULES["Lion"]),
        from_torch(torch.optim.AdamW(model.parameters(), **RULES["Lion"]), name="Lion"),
    )
    assert type(optimizers[1]) is gradfold.Lion
    optimizers[0].param_groups[0]["betas"] = optimizers[1].param_groups[0]["betas"]
    for one, optimizer in zip((plain, model), optimizers, strict=True):
        one(BATCHES[0]).sum().backward()
        optimizer.step()
    assert same_bits(model, plain)


def test_ours_is_returned_as_it_is():
    optimizer = gradfold.AdamW(mlp().float().parameters(), states="int8")
    assert from_torch(optimizer) is optimizer and from_torch(optimizer, states="int8") is optimizer


class Mine(torch.optim.AdamW):
    """Its steps may be others."""


def replaced(params):
    optimizer = torch.optim.AdamW(params)
    optimizer.step = lambda closure=None: None
    return optimizer


REFUSED = {
    "SparseAdam": (torch.optim.SparseAdam, {}, gradfold.FoldError, "SparseAdam cannot be folded"),
    "subclass": (Mine, {}, gradfold.FoldError, "Mine is not one of gradfold's"),
    "replaced": (replaced, {}, gradfold.FoldError, r"AdamW's step\(\) was replaced by other code"),
    "storage": (torch.optim.AdamW, {"states": "int3"}, ValueError, "states='int3'"),
    "option": (lambda p: torch.optim.AdamW(p, differentiable=True), {}, ValueError, "differentiable=True"),
    "ours": (
        gradfold.AdamW,
        {"states": "int8"},
        gradfold.FoldError,
        "states='int8': the optimizer is grad",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, storage, error, message = REFUSED[name]
    optimizer = make(mlp().parameters())
    kind, before = type(optimizer), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        from_torch(optimizer, **storage)
    assert type(optimizer) is kind and str(optimizer.state_dict()) == str(before)


def test_another_rule_has_no_use_for_states():
    model = mlp()
    optimizer = torchs(model)
    model(BATCHES[0]).sum().backward()
    optimizer.step()
    with pytest.raises(gradfold.FoldError, match="name='Lion': this AdamW has stepped"):
        from_torch(optimizer, name="Lion")
