"""States and weights of slices where it is easy to lose them: masters, random bits, other cuts, copies, freezing."""

import copy
import functools
import gc
import io
import weakref

import pytest
import torch
from torch import nn

import gradfold
from gradfold.errors import FoldError
from tests.zoo import Net, batches, twins

WS = functools.partial(gradfold.WorkingSet, interval=1)


def linears(count=2, width=8):
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=False) for _ in range(count)]
    return nn.Sequential(*layers).double()


def go(model, optimizer, steps):
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(x).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


STORAGE = [{"master": "split8"}, {"rounding": "stochastic"}, {"master": "split8", "rounding": "nearest"}]


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("states", ["keep", "reset"])
def test_small_steps_add_up_over_turns(storage, states):
    """Turns of a 64th of a unit in the last place: masters stay, and every turn draws bits of its own."""
    model = nn.ModuleDict({name: nn.Linear(64, 64, bias=False).bfloat16() for name in "ab"})
    nn.init.constant_(model["a"].weight, 1.0)
    optimizer = gradfold.SGD(model.parameters(), lr=1.0, small_size=0, **storage)
    gradfold.fold(model, optimizer, working_set=WS(by=[["a"], ["b"]], states=states))
    ulp = 2.0**-7
    for _ in range(128):  # every other turn is a's
        loss = sum((layer.weight.float() * (-ulp / 64)).sum() for layer in model.values())
        loss.backward()
        optimizer.step()
    moved = (gradfold.export_masters(model, optimizer)["a.weight"] - 1.0) / ulp
    assert moved.mean() == pytest.approx(1.0, abs=0.1)
    if "master" in storage:
        assert moved.std() < 0.5  # dithered by half a unit, at the most
    else:
        assert moved.std() < 2.0 and (moved == 0).float().mean() < 0.6  # a binomial, not all or nothing


@pytest.mark.parametrize("shape", [(4, 8, 128), (8, 4, 2, 64), (6, 3, 3, 3), (12, 200), (300,)], ids=str)
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_random_bits_are_those_of_the_place_in_the_whole(shape, order):
    """Row slices of experts and convolutions too, wherever they begin."""
    found = []
    for working_set in (None, WS(chunks=2, order=order)):
        module = nn.Module()
        module.w = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        optimizer = gradfold.SGD(module.parameters(), lr=1.0, small_size=0, rounding="stochastic")
        fold = gradfold.fold(module, optimizer, working_set=working_set)
        (module.w.float() * 0.3 * 2.0**-8).sum().backward()
        optimizer.step()
        found.append(module.w.detach().clone())
    _, dim, start, stop = fold._state.turns.chunks[0 if order == "forward" else 1][0]
    one, other = (w.narrow(dim, start, stop - start) for w in found)
    assert torch.equal(one, other) and 0 < (one != 1).float().mean() < 1


def test_another_cut_is_refused():
    model = linears(1)
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2)
    fold = gradfold.fold(model, optimizer, working_set=WS(chunks=2))
    go(model, optimizer, 4)
    saved = optimizer.state_dict()
    fold.remove()
    before = {key: value.clone() for key, value in optimizer.state[model[0].weight].items()}
    with pytest.raises(FoldError, match="another cut"):
        gradfold.fold(model, optimizer, working_set=WS(chunks=4))
    after = optimizer.state[model[0].weight]
    assert after.keys() == before.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    other = linears(1)
    others = gradfold.AdamW(other.parameters(), lr=1e-2)
    gradfold.fold(other, others, working_set=WS(chunks=4))
    with pytest.raises(ValueError, match="another cut"):
        others.load_state_dict({key: value for key, value in saved.items() if key != "working_set"})
    gradfold.fold(model, optimizer, working_set=WS(chunks=2))
    assert float(optimizer.state_dict()["state"][0]["step[0:4]"]) == 2


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_slices_that_have_not_all_stepped_are_not_joined(order, rule):
    model = linears(1)
    options = {"momentum": 0.9} if rule == "SGD" else {}
    optimizer = getattr(gradfold, rule)(model.parameters(), lr=1e-2, **options)
    gradfold.fold(model, optimizer, working_set=WS(chunks=2, order=order))
    for steps in (1, 2):
        go(model, optimizer, 1)
        if steps == 1:
            with pytest.raises(FoldError, match="have stepped"):
                optimizer.torch_state_dict()
    joined = optimizer.torch_state_dict()["state"][0]
    assert joined["momentum_buffer" if rule == "SGD" else "exp_avg"].shape == (8, 8)


def test_copies_of_an_optimizer_have_the_states_that_sleep():
    model = linears(3)
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2)
    gradfold.fold(model, optimizer, working_set=WS(by="layer", offload="cpu"))
    go(model, optimizer, 5)
    wanted = [float(entry["step"]) for entry in optimizer.state_dict()["state"].values()]
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(optimizer), torch.load(buffer, weights_only=False)):
        assert [float(entry["step"]) for entry in other.state_dict()["state"].values()] == wanted == [2, 2, 1]


def test_coded_vectors_cut_within_a_block():
    model = nn.Sequential(nn.LayerNorm(1000))
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2, states="int8", small_size=0)
    x = torch.randn(4, 1000)
    for _ in range(2):
        model(x).pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = optimizer.torch_state_dict()["state"]
    gradfold.fold(model, optimizer, working_set=WS(chunks=3))
    for index, entry in optimizer.torch_state_dict()["state"].items():
        right = whole[index]["exp_avg"]
        assert torch.allclose(entry["exp_avg"], right, rtol=0.05, atol=0.02 * right.abs().max())
        assert float(entry["step"]) == 2


def test_frozen_just_before_the_fold_is_removed():
    model = linears(2)
    fold = gradfold.fold(model, gradfold.AdamW(model.parameters()), working_set=WS(chunks=2))
    model[0].weight.requires_grad_(False)
    fold.remove()
    assert [p.requires_grad for p in model.parameters()] == [False, True]


def test_assigned_weights_train_after_folding_again():
    model = linears(2)
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2)
    fold = gradfold.fold(model, optimizer, working_set=WS(chunks=2))
    model.load_state_dict(linears(2).state_dict(), assign=True)
    optimizer.zero_grad()
    fold.remove()
    assert all(p.requires_grad for p in model.parameters())


def test_tied_parameters_answer_to_both_names():
    (model, _) = twins(lambda: Net("tied"))
    fold = gradfold.fold(model, gradfold.AdamW(model.parameters()), working_set=WS(chunks=2, always=["head"]))
    assert [param.name for param in fold._state.turns.always] == ["embed.weight"]
    fold.remove()
    gradfold.fold(model, gradfold.AdamW(model.parameters()), working_set=WS(by=[["blocks"], ["head"]]))


def test_lazy_states_of_slices_that_never_stepped_are_let_go():
    model = linears(2)
    optimizer = gradfold.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fold = gradfold.fold(model, optimizer, working_set=WS(chunks=2))
    first = fold._state.params[id(model[0].weight)].slices[0]
    assert sum(row.state_bytes for row in fold.report().rows) == 8 * 8 * 8
    for _ in range(2):
        optimizer.step()  # without a backward: the turn ends
    assert not first.lazy


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_importance_goes_by_the_unscaled_norm(norm_type):
    (model, _) = twins(lambda: Net("untied"))
    optimizer = gradfold.SGD(model.parameters(), lr=0.0)
    working_set = WS(chunks=3, order="importance")
    fold = gradfold.fold(
        model, optimizer, working_set=working_set, timing="deferred", clip_norm=1e9, norm_type=norm_type
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model.loss(batches(1)[0])).backward()
    scaler.step(optimizer)
    assert fold._state.turns.schedule.norms[0] == pytest.approx(fold.grad_norm, rel=1e-12)
    assert fold.grad_norm < 100


def test_nothing_holds_states_that_sleep():
    """Neither what was prepared for them nor a cycle that waits for the collector."""
    model = linears(2)
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer, working_set=WS(chunks=2, states="reset"))
    gc.collect()
    gc.disable()
    try:
        model(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
        held = [weakref.ref(t) for states in optimizer.state.values() for t in states.values() if t.dim()]
        assert held
        optimizer.step()
        assert not any(one() is not None for one in held)
    finally:
        gc.enable()
