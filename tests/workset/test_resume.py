"""A rotation that is saved and gone on with: what ``states="reset"`` keeps, random bits, state_dicts loaded early."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

import gradfold
from gradfold.errors import FoldError
from gradfold.workset import Schedule
from tests.pairs import each_pair
from tests.workset.test_rotation import reloaded, same

RULES = {
    "AdamW": {"lr": 1e-2},
    "SGD": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-3, "momentum": 0.5},
}
BY_HAND = [["0.weight", "0.bias", "3"], ["1"]]
CUTS = {
    "layer": {"by": "layer"},
    "hand": {"by": BY_HAND},
    "rows": {"chunks": 3},
    "columns": {"chunks": 3, "axis": "in"},
    "one": {"chunks": 1},
}


def made(seed=0, rule="AdamW", dtype=torch.float32, **storage):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 8)).to(dtype)
    return model, getattr(gradfold, rule)(model.parameters(), **RULES[rule], small_size=0, **storage)


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors(optimizer):
    return {
        (index, name): value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def alike(one, other, more=False):
    """Two (model, optimizer, fold): the same bits in weights and states, and the same turn.

    `more`: the other has states of slices that have not been awake, too.
    """
    assert same(one[0], other[0])
    a, b = tensors(one[1]), tensors(other[1])
    assert a.keys() <= b.keys() if more else a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert one[2].working_set == other[2].working_set
    assert one[1].state_dict()["working_set"] == other[1].state_dict()["working_set"]


def goes_on_alike(make, working_set, stop, steps=10):
    """Stop, load into a new fold, go on; beside the run that did not stop."""
    model, optimizer = make()
    fold = gradfold.fold(model, optimizer, working_set=working_set("a"))
    train(model, optimizer, range(stop))
    weights, saved = reloaded((model.state_dict(), optimizer.state_dict()))
    again, other = make(9)
    its = gradfold.fold(again, other, working_set=working_set("b"))
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    alike((model, optimizer, fold), (again, other, its))
    train(model, optimizer, range(stop, steps))
    train(again, other, range(stop, steps))
    alike((model, optimizer, fold), (again, other, its))


# states="reset" -------------------------------------------------------------------------------------------------------


@each_pair(
    rule=["AdamW", "SGD", "RMSprop"],
    master=["split8", "split16"],
    cut=["layer", "rows", "columns"],
    offload=[None, "cpu", "disk"],
    stop=[1, 4],
)
def test_masters_of_a_working_set_that_resets(rule, master, cut, offload, stop, tmp_path):
    """A slice that sleeps keeps its master's residual and nothing else."""

    def working_set(name):
        folder = {"folder": tmp_path / name} if offload == "disk" else {}
        return gradfold.WorkingSet(**CUTS[cut], interval=2, states="reset", offload=offload, **folder)

    goes_on_alike(functools.partial(made, rule=rule, dtype=torch.bfloat16, master=master), working_set, stop)


@each_pair(cut=[*CUTS], order=["forward", "random", "importance"], states=["int8", "bf16"], stop=[2, 3])
def test_random_bits_of_a_working_set_that_resets(cut, order, states, stop):
    working_set = gradfold.WorkingSet(**CUTS[cut], order=order, interval=2, states="reset")
    goes_on_alike(functools.partial(made, states=states, rounding="stochastic"), lambda name: working_set, stop)


def test_a_chunk_that_follows_itself_draws_on():
    """It did not sleep: neither states nor random bits begin anew, and a turn is not repeated."""
    schedule = Schedule(1, 2, "forward", 0)
    for _ in range(5):
        schedule.stepped(None)
    assert (schedule.turn, schedule.woke) == (2, 0)
    other = Schedule(3, 2, "forward", 0)
    woken = []
    for _ in range(6):
        woken.append(other.woke)
        other.stepped(None)
    assert woken == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("cut", CUTS)
def test_masters_alone_in_other_folds(cut):
    """Removed and folded again, or loaded by an ordinary optimizer where no slice is cut: residuals are taken over."""
    model, optimizer = made(dtype=torch.bfloat16, master="split8")
    working_set = gradfold.WorkingSet(**CUTS[cut], interval=1, states="reset")
    fold = gradfold.fold(model, optimizer, working_set=working_set)
    train(model, optimizer, range(5))
    masters = gradfold.export_masters(model, optimizer)
    fold.remove()
    gradfold.fold(model, optimizer, working_set=working_set)
    again = gradfold.export_masters(model, optimizer)
    assert all(torch.equal(value, again[name]) for name, value in masters.items())
    if not any("[" in name for _, name in tensors(optimizer)):
        twin, plain = made(1, dtype=torch.bfloat16, master="split8")
        twin.load_state_dict(model.state_dict())
        plain.load_state_dict(optimizer.state_dict())
        again = gradfold.export_masters(twin, plain)
        assert all(torch.equal(value, again[name]) for name, value in masters.items())


def test_states_of_another_optimizer_are_still_refused():
    model, optimizer = made(dtype=torch.bfloat16, master="split8")
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        del entry["exp_avg"]
    with pytest.raises(ValueError, match="saved by another optimizer"):
        made(dtype=torch.bfloat16, master="split8")[1].load_state_dict(saved)


# loaded before the model is folded ------------------------------------------------------------------------------------

HOLDERS = [["0"], ["1", "3"]]


def through_state_dict(model, optimizer, rule):
    again, other = made(9, rule)
    weights, saved = reloaded((model.state_dict(), optimizer.state_dict()))
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    return again, other


def through_two_state_dicts(model, optimizer, rule):
    """Saved again by the optimizer that has only loaded it."""
    return through_state_dict(*through_state_dict(model, optimizer, rule), rule)


def through_a_plain_fold(model, optimizer, rule):
    again, other = made(9, rule)
    fold = gradfold.fold(again, other)
    weights, saved = reloaded((model.state_dict(), optimizer.state_dict()))
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    fold.remove()
    return again, other


def through_deepcopy(model, optimizer, rule):
    return thawed(copy.deepcopy((model, optimizer)))


def through_torch_save(model, optimizer, rule):
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    return thawed(torch.load(file, weights_only=False))


def thawed(pair):
    pair[0].requires_grad_(True)
    return pair


WAYS = {
    "state_dict": through_state_dict,
    "two state_dicts": through_two_state_dicts,
    "a plain fold": through_a_plain_fold,
    "deepcopy": through_deepcopy,
    "torch.save": through_torch_save,
}


@each_pair(way=[*WAYS], rule=["AdamW", "SGD"], order=["forward", "random", "importance"], stop=[1, 3])
def test_a_rotation_loaded_before_folding_goes_on(way, rule, order, stop):
    """SGD without momentum has no states at all, only the rotation."""
    working_set = gradfold.WorkingSet(by=HOLDERS, interval=2, order=order)
    model, optimizer = made(rule=rule)
    fold = gradfold.fold(model, optimizer, working_set=working_set)
    train(model, optimizer, range(stop))
    again, other = WAYS[way](model, optimizer, rule)
    its = gradfold.fold(again, other, working_set=working_set)
    alike((model, optimizer, fold), (again, other, its), more=way == "a plain fold")
    train(model, optimizer, range(stop, 10))
    train(again, other, range(stop, 10))
    alike((model, optimizer, fold), (again, other, its), more=way == "a plain fold")


OTHERS = {
    "cut": ({"by": [["0", "1"], ["3"]]}, r"chunk 0 has nothing there, 1.weight\[0:16\] here"),
    "slices": ({"chunks": 2}, "cut otherwise"),
    "more chunks": ({"by": "layer"}, "of 2 chunks cut otherwise than the 3 of this"),
    "always": ({"by": [["0"], ["1", "3.weight"]], "always": ["3.bias"]}, "chunk 1 has 3.bias"),
    "order": ({"by": HOLDERS, "order": "backward"}, "order='backward': the saved schedule has order='forward'"),
}


@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_rotation_of_another_cut_is_refused_by_name(other, rule):
    options, says = OTHERS[other]
    model, optimizer = made(rule=rule)
    gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(by=HOLDERS, interval=2))
    train(model, optimizer, range(3))
    again, loaded = through_state_dict(model, optimizer, rule)
    before, weights = reloaded(loaded.state_dict()), copy.deepcopy(again.state_dict())
    with pytest.raises(FoldError, match=says):
        gradfold.fold(again, loaded, working_set=gradfold.WorkingSet(interval=2, **options))
    after = loaded.state_dict()
    assert after["working_set"] == before["working_set"] and after["state"].keys() == before["state"].keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights.items())
    fold = gradfold.fold(again, loaded, working_set=gradfold.WorkingSet(by=HOLDERS, interval=2))  # nothing was lost
    assert (fold.working_set.chunk, fold.working_set.step) == (1, 1)
    fold.remove()
    saved = {key: value for key, value in before.items() if key != "working_set"}
    loaded.load_state_dict(saved)  # the way out
    fold = gradfold.fold(again, loaded, working_set=gradfold.WorkingSet(interval=2, **options))
    assert fold.working_set.step == 0


@pytest.mark.parametrize("damaged", [[], "x", 3, {"cut": []}, {"cut": [[["a", 0]], 3], "schedule": {}}], ids=repr)
def test_a_damaged_rotation_is_refused(damaged):
    model, optimizer = made()
    optimizer.load_state_dict({**optimizer.state_dict(), "working_set": damaged})
    with pytest.raises(FoldError, match="working_set="):
        gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(by=HOLDERS))
    gradfold.fold(model, optimizer)


def test_a_rotation_is_that_of_the_last_state_dict():
    model, optimizer = made()
    gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(by=HOLDERS, interval=1))
    train(model, optimizer, range(1))
    again, other = made()
    other.load_state_dict(optimizer.state_dict())
    other.load_state_dict(made()[1].state_dict())  # of an optimizer that never had one
    assert "working_set" not in other.state_dict()
    fold = gradfold.fold(again, other, working_set=gradfold.WorkingSet(by=HOLDERS, interval=1))
    assert fold.working_set.chunk == 0
    fold.remove()
    assert "working_set" not in other.state_dict()
