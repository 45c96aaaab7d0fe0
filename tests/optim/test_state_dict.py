"""state_dict: torch's layout, both ways in mid-training, saved and loaded without a bit or a dtype changing."""

import copy
import io

import pytest
import torch
from torch import nn

import gradfold
from tests.cases import (
    BUSY,
    Given,
    Problem,
    both_routes,
    each_rule,
    each_state_set,
    each_torch_rule,
    each_torch_state_set,
    problem,
    train,
    with_states,
)

SHAPES = [(5, 4), (4, 7), (6,), (2, 3, 2, 2), ()]


def groups_of(weights):
    return [{"params": weights[:2]}, {"params": weights[2:], "lr": 0.02}]


def start(make, given, fold=False):
    model = Given(given.weights)
    optimizer = make(groups_of(model.weights()))
    if fold:
        gradfold.fold(model, optimizer)
    return model, optimizer


def from_weights(model, given):
    """The same problem, going on from this model's weights."""
    return Problem([weight.detach().clone() for weight in model.weights()], given.grads)


def tolerance(row):
    """torch's load casts NAdam's mu_product, an fp32 counter, to the weight's dtype (``step`` it spares)."""
    return {"rtol": 1e-7, "atol": 1e-7} if row.name == "NAdam" else {"rtol": 1e-13, "atol": 1e-14}


def assert_same_layout(got, want):
    assert list(got) == list(want)
    for mine, theirs in zip(got["param_groups"], want["param_groups"], strict=True):
        assert mine.keys() == theirs.keys() and mine["params"] == theirs["params"]
    assert got["state"].keys() == want["state"].keys()
    for index, states in want["state"].items():
        assert list(got["state"][index]) == list(states)
        for key, state in states.items():
            mine = got["state"][index][key]
            assert (mine.shape, mine.dtype, mine.device) == (state.shape, state.dtype, state.device), key


@each_torch_state_set
@both_routes
def test_layout_is_torchs(row, route):
    given = problem(SHAPES, steps=2)
    model, optimizer = start(row.ours, given, route == "folded")
    reference, theirs = start(row.torchs, given)
    train(model, optimizer, given.grads)
    train(reference, theirs, given.grads)
    assert_same_layout(optimizer.state_dict(), theirs.state_dict())
    mine, want = optimizer.param_groups, theirs.param_groups
    for key in set(want[0]) - {"params", "foreach"}:
        assert [group[key] for group in mine] == [group[key] for group in want], key


@each_torch_rule
@both_routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_in_low_precision_is_torchs(row, route, dtype):
    given = problem(SHAPES, dtype, steps=2)
    model, optimizer = start(row.ours, given, route == "folded")
    reference, theirs = start(row.torchs, given)
    train(model, optimizer, given.grads)
    train(reference, theirs, given.grads)
    assert_same_layout(optimizer.state_dict(), theirs.state_dict())


@each_torch_state_set
@both_routes
def test_to_torch_in_mid_training(row, route):
    given = problem(SHAPES, steps=10)
    model, optimizer = start(row.ours, given, route == "folded")
    train(model, optimizer, given.grads[:5])
    reference, theirs = start(row.torchs, from_weights(model, given))
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch keeps the tensors it is given
    train(model, optimizer, given.grads[5:])
    train(reference, theirs, given.grads[5:])
    for weight, want in zip(model.weights(), reference.weights(), strict=True):
        torch.testing.assert_close(weight.detach(), want.detach(), **tolerance(row))


@each_torch_state_set
@both_routes
def test_from_torch_in_mid_training(row, route):
    given = problem(SHAPES, steps=10)
    reference, theirs = start(row.torchs, given)
    train(reference, theirs, given.grads[:5])
    model, optimizer = start(row.ours, from_weights(reference, given), route == "folded")
    optimizer.load_state_dict(theirs.state_dict())
    train(model, optimizer, given.grads[5:])
    train(reference, theirs, given.grads[5:])
    for weight, want in zip(model.weights(), reference.weights(), strict=True):
        torch.testing.assert_close(weight.detach(), want.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "lost"), [(torch.float64, 0), (torch.float32, 0), (torch.bfloat16, 2**-8)], ids=["fp64", "fp32", "bf16"]
)
@both_routes
def test_nadams_product_comes_back_from_torch(dtype, lost, route):
    """Torch casts it to the weight's dtype as it loads; it comes back in fp32, exact if fp32 fits in there."""
    given = problem(SHAPES, dtype, steps=4)
    model, optimizer = start(BUSY["NAdam"].ours, given, route == "folded")
    train(model, optimizer, given.grads)
    _, theirs = start(BUSY["NAdam"].torchs, given)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other, back = start(BUSY["NAdam"].ours, given, route == "folded")
    back.load_state_dict(theirs.state_dict())
    for weight, same in zip(model.weights(), other.weights(), strict=True):
        want, product = optimizer.state[weight]["mu_product"], back.state[same]["mu_product"]
        assert product.dtype == torch.float32
        assert abs(product / want - 1) <= lost


@both_routes
def test_nadam_through_torch_in_mid_training(route):
    """As torch, if that loads its own state_dict at the same steps."""
    given = problem(SHAPES, steps=9)
    runs = []
    for first, second in ((BUSY["NAdam"].ours, BUSY["NAdam"].torchs), (BUSY["NAdam"].torchs, BUSY["NAdam"].torchs)):
        model, optimizer = start(first, given, route == "folded" and first == BUSY["NAdam"].ours)
        for index in range(0, 9, 3):
            if index:
                kept = copy.deepcopy(optimizer.state_dict())
                ours = first == BUSY["NAdam"].ours and index == 6
                model, optimizer = start(
                    first if ours else second, from_weights(model, given), ours and route == "folded"
                )
                optimizer.load_state_dict(kept)
            train(model, optimizer, given.grads[index : index + 3])
        runs.append(model.weights())
    for weight, want in zip(*runs, strict=True):
        torch.testing.assert_close(weight.detach(), want.detach(), rtol=1e-8, atol=1e-8)


@each_torch_rule
@both_routes
def test_to_torch_and_from_torch_before_the_first_step(row, route):
    """Folded, states exist already; loaded anywhere, training starts as if nothing had happened."""
    given = problem(SHAPES, steps=3)
    expected, optimizer = start(row.torchs, given)
    train(expected, optimizer, given.grads)
    model, ours = start(row.ours, given, route == "folded")
    reference, theirs = start(row.torchs, given)
    mine, fresh = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
    theirs.load_state_dict(mine)
    ours.load_state_dict(fresh)
    train(model, ours, given.grads)
    train(reference, with_states(theirs), given.grads)
    for weight, other, want in zip(model.weights(), reference.weights(), expected.weights(), strict=True):
        torch.testing.assert_close(weight.detach(), want.detach(), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(other.detach(), want.detach(), **tolerance(row))


@each_state_set
@both_routes
def test_saved_and_loaded_it_continues_bit_for_bit(row, route):
    given = problem(SHAPES, steps=6)
    model, optimizer = start(row.ours, given, route == "folded")
    train(model, optimizer, given.grads[:3])
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, states = torch.load(file, weights_only=True)
    again, other = start(row.ours, given, route == "folded")
    again.load_state_dict(weights)
    other.load_state_dict(states)
    train(model, optimizer, given.grads[3:])
    train(again, other, given.grads[3:])
    assert_equal_dicts(model.state_dict(), again.state_dict())
    for index, kept in optimizer.state_dict()["state"].items():
        assert_equal_dicts(kept, other.state_dict()["state"][index])


def assert_equal_dicts(one, other):
    assert one.keys() == other.keys()
    assert all(one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one)


@each_rule
@pytest.mark.parametrize("load", ["before folding", "after folding", "folded to unfolded"])
def test_folding_and_loading_in_any_order(row, load):
    given = problem(SHAPES, steps=6)
    model, optimizer = start(row.ours, given, fold=True)
    train(model, optimizer, given.grads[:3])
    again, other = start(row.ours, from_weights(model, given), fold=load == "after folding")
    other.load_state_dict(optimizer.state_dict())
    if load == "before folding":
        gradfold.fold(again, other)
    train(model, optimizer, given.grads[3:])
    train(again, other, given.grads[3:])
    for weight, resumed in zip(model.weights(), again.weights(), strict=True):
        assert torch.equal(weight, resumed)


@each_rule
@both_routes
def test_load_keeps_the_saved_dtype(row, route):
    """fp32 states of a bf16 model: torch would cast them to bf16, where a second moment cannot decay."""
    given = problem(SHAPES, torch.bfloat16, steps=4)
    model, optimizer = start(row.ours, given, route == "folded")
    train(model, optimizer, given.grads[:2])
    saved = copy.deepcopy(optimizer.state_dict())
    for states in saved["state"].values():
        for key in states:
            if key not in optimizer.rule.counters:
                states[key] = states[key].float() * 1.001  # no longer a bf16 number
    optimizer.load_state_dict(saved)
    for index, states in optimizer.state_dict()["state"].items():
        assert_equal_dicts(states, saved["state"][index])
    train(model, optimizer, given.grads[2:])
    for states in optimizer.state_dict()["state"].values():
        wide = [state for key, state in states.items() if key not in optimizer.rule.counters]
        assert wide and all(state.dtype == torch.float32 and state.isfinite().all() for state in wide)
        assert any((state != state.bfloat16().float()).any() for state in wide), "rounded to bf16 on the way"


def test_loading_copies():
    given = problem(SHAPES, steps=2)
    model, optimizer = start(BUSY["AdamW"].ours, given)
    train(model, optimizer, given.grads[:1])
    saved = optimizer.state_dict()
    again, other = start(BUSY["AdamW"].ours, given)
    other.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    train(again, other, given.grads[1:])
    other.param_groups[0]["lr"] = 7
    for index, states in kept["state"].items():
        assert_equal_dicts(saved["state"][index], states)
    assert saved["param_groups"] == kept["param_groups"]


def test_states_take_their_parameters_memory_format():
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    param = nn.Parameter(weight)
    optimizer = gradfold.AdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = {"state": {0: {k: v.contiguous() for k, v in optimizer.state[param].items()}}}
    optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})
    assert optimizer.state[param]["exp_avg"].stride() == param.stride()


@both_routes
def test_load_hooks_run_and_may_replace_the_state_dict(route):
    given = problem(SHAPES, steps=2)
    model, optimizer = start(BUSY["AdamW"].ours, given, route == "folded")
    train(model, optimizer, given.grads)
    saved, calls = copy.deepcopy(optimizer.state_dict()), []

    def replace(which, state_dict):
        assert which is optimizer
        calls.append("pre")
        return {**state_dict, "param_groups": [{**group, "lr": 0.75} for group in state_dict["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.register_load_state_dict_post_hook(lambda which: calls.append("post"))
    optimizer.register_state_dict_pre_hook(lambda which: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda which, state_dict: {**state_dict, "extra": 1})
    optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [0.75, 0.75]
    assert saved["param_groups"][0]["lr"] != 0.75
    assert optimizer.state_dict()["extra"] == 1
    assert calls == ["pre", "post", "save"]


def test_adamw_stays_decoupled():
    """As torch.optim.AdamW, which takes Adam's state_dict and keeps its own kind of weight decay."""
    param = nn.Parameter(torch.ones(2))
    optimizer = gradfold.AdamW([param])
    optimizer.load_state_dict(gradfold.Adam([param], lr=0.5).state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] and optimizer.param_groups[0]["lr"] == 0.5


def test_param_names_survive():
    given = problem(SHAPES, steps=1)
    model = Given(given.weights)
    optimizer = gradfold.AdamW(model.named_parameters())
    names = optimizer.param_groups[0]["param_names"]
    unnamed = gradfold.AdamW(model.parameters()).state_dict()
    optimizer.load_state_dict(unnamed)
    assert optimizer.param_groups[0]["param_names"] == names


def test_checkpoints_of_older_torch_versions():
    """``step`` was a plain number once, an empty momentum_buffer None, and groups knew fewer keys."""
    param = nn.Parameter(torch.ones(2))
    group = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "params": [17]}
    states = {"step": 3, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    adam = gradfold.Adam([param])
    adam.load_state_dict({"state": {17: states}, "param_groups": [group]})
    param.grad = torch.ones(2)
    adam.step()
    assert torch.equal(adam.state[param]["step"], torch.tensor(4.0))
    assert not adam.param_groups[0]["maximize"] and adam.param_groups[0]["lr"] == 0.5
    sgd = gradfold.SGD([param], momentum=0.9)
    sgd.load_state_dict({"state": {0: {"momentum_buffer": None}}, "param_groups": [{"lr": 0.1, "params": [0]}]})
    sgd.step()
    assert torch.equal(sgd.state[param]["momentum_buffer"], torch.ones(2))


@both_routes
def test_lions_layout(route):
    """Its own, as torch has no Lion: a step count and one average."""
    given = problem(SHAPES, steps=1)
    model, optimizer = start(BUSY["Lion"].ours, given, route == "folded")
    train(model, optimizer, given.grads)
    saved = optimizer.state_dict()
    assert saved["state"].keys() == set(range(len(SHAPES)))
    for index, states in saved["state"].items():
        assert list(states) == ["step", "exp_avg"] and states["exp_avg"].shape == SHAPES[index]
    assert saved["param_groups"][0].keys() == {"lr", "betas", "weight_decay", "maximize", "params"}


SWITCHED = {
    "momentum off": ("SGD", {"momentum": 0}),
    "amsgrad off": ("Adam", {"amsgrad": False}),
    "centered off": ("RMSprop", {"centered": False}),
    "amsgrad on": ("AdamW", {"amsgrad": True}),
}


@pytest.mark.parametrize(("name", "change"), SWITCHED.values(), ids=SWITCHED)
@both_routes
def test_an_option_switched_in_mid_training_does_not_spoil_the_checkpoint(name, change, route):
    """Its state stays behind, or comes with the next step; what was saved must load again."""
    given = problem(SHAPES, steps=2)
    model, optimizer = start(BUSY[name].ours, given, route == "folded")
    train(model, optimizer, given.grads[:1])
    for group in optimizer.param_groups:
        group.update(change)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, given.grads[1:])
