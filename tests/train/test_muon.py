"""``optimizer.name: Muon`` in a recipe: hidden matrices, and the rest by AdamW."""

import pytest
import torch

import gradfold
from gradfold.planner.settings import Settings
from gradfold.planner.workload import trainable
from gradfold.train.errors import RecipeError
from gradfold.train.optimizer import groups_of, make_optimizer, make_plain_optimizer
from gradfold.train.recipe_groups import OptimizerRecipe
from gradfold.train.state import pack_optimizer, unpack_optimizer
from tests.llama import small_llama


def llama():
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(small_llama(vocab_size=64, hidden_size=16))


RECIPE = OptimizerRecipe(name="Muon", lr=0.02, adamw_lr=1e-3, weight_decay=0.1, momentum=0.9, ns_steps=3)


def test_groups():
    model = llama()
    optimizer = make_optimizer(RECIPE, groups_of(model, RECIPE))
    assert [(g.get("rule"), g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (None, 0.02, 0.1),
        ("adamw", 1e-3, 0.1),
        ("adamw", 1e-3, 0.0),
    ]
    assert optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.param_groups[0]["ns_steps"] == 3
    assert {p.dim() for p in optimizer.param_groups[2]["params"]} == {1}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    plain = make_plain_optimizer(RECIPE, trainable(model))
    assert [len(g["params"]) for g in plain.param_groups] == [len(g["params"]) for g in optimizer.param_groups]


def test_a_checkpoint_goes_on():
    ids = torch.arange(12).view(1, 12)
    runs = []
    for _ in range(2):
        model = llama()
        optimizer = make_optimizer(RECIPE, groups_of(model, RECIPE))
        gradfold.fold(model, optimizer, clip_norm=1.0)
        runs.append((model, optimizer))
    (model, optimizer), (other, again) = runs

    def step(one, stepper):
        one(input_ids=ids, labels=ids).loss.backward()
        stepper.step()
        stepper.zero_grad()

    step(model, optimizer)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(unpack_optimizer(*pack_optimizer(optimizer, model), again, other))
    step(model, optimizer)
    step(other, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_planned():
    model = llama()
    optimizer = Settings(optimizer="Muon", options={"momentum": 0.9}).make_optimizer(trainable(model))
    assert [group.get("rule") for group in optimizer.param_groups] == [None, "adamw"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "AdamW", "adamw_lr": 1e-3}, "optimizer.adamw_lr = 0.001: AdamW has no such setting"),
        ({"name": "Muon", "betas": (0.9, 0.99)}, "optimizer.betas = .*: Muon has no such setting"),
        ({"name": "Muon", "ns_steps": 100}, "ns_steps"),
        ({"name": "Muon", "adamw_lr": 0.0}, "adamw_lr"),
        ({"name": "Muon", "adjust_lr_fn": "rms"}, "adjust_lr_fn"),
    ],
)
def test_refused(changes, said):
    with pytest.raises(RecipeError, match=said):
        OptimizerRecipe(**changes)
