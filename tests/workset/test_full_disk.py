"""A chunk that cannot go to sleep, or not wake: nothing is lost, and what is left to do is done once it can be."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch

import gradfold
from gradfold.errors import FoldError
from gradfold.workset import DiskStore, HostStore
from gradfold.workset import disk as disk_module
from tests.workset.sliced import snapshot, untouched
from tests.workset.test_rotation import folded, reloaded, same, train
from tests.zoo import Net, batches, ours

OPTIONS = {"chunks": 4, "interval": 2, "order": "importance"}  # the order takes the norms of every step


def backward(model, step):
    model.loss(batches(20)[step]).backward()


def fail_at(monkeypatch, name, at):
    """Let the call number ``at`` (from 1) of the disk's ``write`` or ``read``, and all after it, fail."""
    plain, calls = getattr(disk_module, name), []

    def failing(path, *rest):
        calls.append(path)
        if len(calls) >= at:
            raise FoldError(f"{path}: the disk is full")
        return plain(path, *rest)

    monkeypatch.setattr(disk_module, name, failing)


def states(optimizer):
    return {
        (index, name): value.clone()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.fixture
def stuck(tmp_path, monkeypatch):
    """A run that could not change chunks after its tenth step: (model, optimizer, fold), and (model, optimizer) of one
    that could."""

    def make(name, at):
        model, optimizer, fold = folded(**OPTIONS, offload="disk", folder=tmp_path / "a")
        twin, its, _ = folded(**OPTIONS)
        train(model, optimizer, range(9))
        train(twin, its, range(10))
        fail_at(monkeypatch, name, at)
        backward(model, 9)  # reads ahead
        with pytest.raises(FoldError, match="disk is full"):
            optimizer.step()
        return model, optimizer, fold, twin, its

    return make


HOW = [("write", 1), ("write", 3), ("read", 1), ("read", 2)]


@pytest.mark.parametrize(("name", "at"), HOW)
def test_step_can_be_called_again(stuck, name, at, monkeypatch):
    model, optimizer, fold, twin, its = stuck(name, at)
    with pytest.raises(FoldError, match="disk is full"):
        optimizer.step()  # still
    with pytest.raises(FoldError, match="disk is full"):
        backward(model, 10)  # not with less than its states
    assert same(model, twin)
    monkeypatch.undo()
    optimizer.step()
    assert fold.working_set == fold._state.turns.turn() and fold.working_set.step == 0
    assert optimizer.state_dict()["working_set"] == its.state_dict()["working_set"]
    optimizer.zero_grad()
    train(model, optimizer, range(10, 20))
    train(twin, its, range(10, 20))
    assert same(model, twin)
    assert equal(states(optimizer), states(its))


@pytest.mark.parametrize(("name", "at"), HOW)
def test_or_training_goes_on(stuck, name, at, monkeypatch):
    model, optimizer, _, twin, its = stuck(name, at)
    monkeypatch.undo()
    train(model, optimizer, range(10, 20))
    train(twin, its, range(10, 20))
    assert same(model, twin)
    assert equal(states(optimizer), states(its))


@pytest.mark.parametrize(("name", "at"), HOW)
def test_a_checkpoint_of_it_is_that_of_a_run_that_was_not_stuck(stuck, name, at, monkeypatch, tmp_path):
    model, optimizer, _, twin, its = stuck(name, at)
    saved, weights = reloaded(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    assert saved["working_set"] == its.state_dict()["working_set"]
    monkeypatch.undo()
    again, other, _ = folded(**OPTIONS, offload="disk", folder=tmp_path / "b")
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    train(again, other, range(10, 20))
    train(twin, its, range(10, 20))
    assert same(again, twin)
    assert equal(states(other), states(its))


@pytest.mark.parametrize(("name", "at"), HOW)
def test_or_the_fold_is_removed(stuck, name, at):
    model, optimizer, fold, _, its = stuck(name, at)
    before = states(its)
    fold.remove()
    assert all(p.requires_grad for p in model.parameters())
    assert equal(states(optimizer), before)


def test_what_was_written_of_a_chunk_that_stays_awake_is_deleted(stuck, tmp_path):
    _, _, fold, *_ = stuck("write", 3)
    turns = fold._state.turns
    awake = {one.name for param in turns.turning for one in param.slices}
    current = set(turns.store.keys())
    assert len(awake) >= 3 and not awake & current
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == len(current)
    assert not list((tmp_path / "a").glob(".writing-*"))


def test_a_state_dict_that_could_not_be_loaded_to_its_end(tmp_path, monkeypatch):
    model, optimizer, _ = folded(**OPTIONS)
    train(model, optimizer, range(5))
    saved = optimizer.state_dict()
    again, other, _ = folded(**OPTIONS, offload="disk", folder=tmp_path)
    again.load_state_dict(model.state_dict())
    before = snapshot(again)
    with monkeypatch.context() as patch:
        fail_at(patch, "write", 2)
        with pytest.raises(FoldError, match="disk is full"):
            other.load_state_dict(saved)
    with pytest.raises(FoldError, match="call it again"):
        backward(again, 5)
    with pytest.raises(FoldError, match="call it again"):
        other.step()
    assert untouched(before, again, [])
    other.load_state_dict(saved)
    train(model, optimizer, range(5, 12))
    train(again, other, range(5, 12))
    assert same(model, again)


# the folder -----------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_fold_at_a_time(tmp_path):
    model, optimizer, fold = folded(**OPTIONS, offload="disk", folder=tmp_path)
    train(model, optimizer, range(3))
    files = sorted(tmp_path.iterdir())
    (tmp_path / ".writing-x.safetensors").write_bytes(b"half")  # of the fold that is there
    other = Net("untied")
    with pytest.raises(FoldError, match="another working set keeps its states there"):
        gradfold.fold(
            other, ours(other), working_set=gradfold.WorkingSet(interval=1, chunks=2, offload="disk", folder=tmp_path)
        )
    assert sorted(tmp_path.iterdir()) == sorted([*files, tmp_path / ".writing-x.safetensors"])
    assert all(p.requires_grad for p in other.parameters())
    fold.remove()
    gradfold.fold(
        other, ours(other), working_set=gradfold.WorkingSet(interval=1, chunks=2, offload="disk", folder=tmp_path)
    )
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_a_store_of_ones_own_has_one_fold_at_a_time(tmp_path, kind):
    """Slices of two models have the same names: the one's states would be the other's."""
    store = DiskStore(tmp_path) if kind == "disk" else HostStore()
    model, optimizer, fold = folded(**OPTIONS, offload=store)
    train(model, optimizer, range(5))
    twin, its, _ = folded(**OPTIONS)
    train(twin, its, range(5))
    other = Net("untied")
    with pytest.raises(FoldError, match="another fold keeps its states there"):
        gradfold.fold(other, ours(other), working_set=gradfold.WorkingSet(interval=1, chunks=2, offload=store))
    if kind == "disk":
        with pytest.raises(FoldError, match="another working set keeps its states there"):
            folded(**OPTIONS, offload=DiskStore(tmp_path))
    assert all(p.requires_grad for p in other.parameters())
    train(model, optimizer, range(5, 12))
    train(twin, its, range(5, 12))
    assert same(model, twin) and equal(states(optimizer), states(its))
    fold.remove()
    gradfold.fold(other, ours(other), working_set=gradfold.WorkingSet(interval=1, chunks=2, offload=store))


def test_a_store_whose_fold_nobody_refers_to_is_free():
    store = HostStore()
    folded(**OPTIONS, offload=store)
    folded(**OPTIONS, offload=store)


def test_other_keys_of_a_store_of_ones_own_stay():
    store = HostStore()
    store.put("mine", {"x": torch.ones(2)})
    model, optimizer, fold = folded(**OPTIONS, offload=store)
    train(model, optimizer, range(5))
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(5, 9))
    fold.remove()
    assert store.keys() == ["mine"]


HOLDER = """
import sys, torch, gradfold
model = torch.nn.Linear(4, 4)
options = dict(interval=1, chunks=2, offload="disk", folder=sys.argv[1])
gradfold.fold(model, gradfold.SGD(model.parameters(), lr=0.1), working_set=gradfold.WorkingSet(**options))
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_nor_may_two_processes_have_it(tmp_path):
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "there\n"
        with pytest.raises(FoldError, match="another working set"):
            folded(**OPTIONS, offload="disk", folder=tmp_path)
        process.kill()
    folded(**OPTIONS, offload="disk", folder=tmp_path)


def test_a_fold_that_failed_lets_go_of_its_folder(tmp_path):
    model = Net("untied")
    optimizer = ours(model)
    optimizer.state[model.head.weight]["exp_avg[0:3]"] = torch.zeros(3)  # of no slice here
    options = {"interval": 1, "chunks": 2, "offload": "disk", "folder": tmp_path}
    with pytest.raises(FoldError, match="working_set="):
        gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(**options))
    optimizer.state.clear()
    gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(**options))


@pytest.mark.filterwarnings("error")
def test_a_fold_that_nobody_removes_closes_its_lock(tmp_path, recwarn):
    model, optimizer, fold = folded(**OPTIONS, offload="disk", folder=tmp_path)
    train(model, optimizer, range(3))
    gone = weakref.ref(fold._state.turns)
    del model, optimizer, fold
    gc.collect()
    assert gone() is None
    folded(**OPTIONS, offload="disk", folder=tmp_path)
    gc.collect()
    assert not recwarn.list
