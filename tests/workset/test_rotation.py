"""What a working set keeps: states of slices across turns, checkpoints and folds; requires_grad; what it refuses."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.errors import FoldError
from tests.models.test_models import MODELS
from tests.pairs import each_pair
from tests.workset.sliced import active_slices, snapshot, untouched
from tests.workset.test_steps import coded_loss, coded_pair
from tests.zoo import Net, batches, distance, no_gradients, ours, torchs, twins


def folded(scene="untied", storage=None, fold_options=None, **options):
    """A model, its optimizer and its fold; the same every time."""
    (model, _), *_ = [twins(lambda: Net(scene))]
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **(storage or {}))
    fold = gradfold.fold(
        model, optimizer, working_set=gradfold.WorkingSet(**({"interval": 1} | options)), **(fold_options or {})
    )
    return model, optimizer, fold


def train(model, optimizer, steps, fold=None):
    for step in steps:
        (fold.backward if fold else torch.Tensor.backward)(model.loss(batches(20)[step % 20]))
        optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def reloaded(state_dict):
    """As it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# states ---------------------------------------------------------------------------------------------------------------


# in the first turn, in the middle of a turn, in the second round
@each_pair(offload=[None, "cpu", "disk"], order=["forward", "random", "importance"], stop=[1, 5, 13])
def test_resume(offload, order, stop, tmp_path):
    def make(folder):
        place = {"folder": tmp_path / folder} if offload == "disk" else {}
        return folded(chunks=4, interval=3, order=order, offload=offload, **place)

    model, optimizer, _ = make("a")
    train(model, optimizer, range(stop))
    saved, weights = reloaded(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(stop, 30))
    again, other, its_fold = make("b")
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    assert its_fold.working_set.step == stop % 3
    assert its_fold.working_set.chunk == stop // 3 % 4 or order != "forward"
    train(again, other, range(stop, 30))
    assert same(model, again)
    one, two = optimizer.state_dict(), other.state_dict()
    assert one["working_set"] == two["working_set"]
    for index, states in one["state"].items():
        assert states.keys() == two["state"][index].keys()
        assert all(torch.equal(states[key], two["state"][index][key]) for key in states)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(
    "storage", [{"states": "int8", "rounding": "stochastic", "master": "split8"}, {"states": "int4"}]
)
def test_resume_coded(storage, axis):
    (model, optimizer), (again, other) = coded_pair(storage)
    gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(interval=1, chunks=3, axis=axis, offload="cpu"))
    for step in range(4):
        coded_loss(model, step).backward()
        optimizer.step()
    saved, weights = reloaded(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    gradfold.fold(again, other, working_set=gradfold.WorkingSet(interval=1, chunks=3, axis=axis))
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    for step in range(4, 12):
        for m, o in ((model, optimizer), (again, other)):
            coded_loss(m, step).backward()
            o.step()
    assert same(model, again)


def test_states_exist_for_what_has_been_awake():
    model, optimizer, fold = folded(chunks=4, offload="cpu")
    train(model, optimizer, range(2))
    states = optimizer.state_dict()["state"]
    kept = sum(value.numel() for entry in states.values() for key, value in entry.items() if "exp_avg_sq" in key)
    awake = sum(
        value.numel() for entry in optimizer.state.values() for key, value in entry.items() if "exp_avg_sq" in key
    )
    total = sum(p.numel() for p in model.parameters())
    assert 0.6 < kept / total < 0.9  # three of four chunks: two that have stepped, and the one that is awake
    assert 0.15 < awake / total < 0.35
    assert fold.working_set.chunk == 2


def test_removed_and_folded_again():
    model, optimizer, fold = folded(chunks=4, interval=2, offload="cpu")
    train(model, optimizer, range(5))
    other, its, _ = folded(chunks=4, interval=2)
    train(other, its, range(5))
    saved = its.state_dict()["working_set"]
    fold.remove()
    assert all(p.requires_grad for p in model.parameters())
    model.loss(batches(1)[0]).backward()
    before = snapshot(model)
    with pytest.raises(FoldError, match="states of slices"):
        optimizer.step()
    assert untouched(before, model, [])
    optimizer.zero_grad()
    gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=4, interval=2))
    optimizer.load_state_dict({**optimizer.state_dict(), "working_set": saved})  # the turn it was in
    train(model, optimizer, range(5, 15))
    train(other, its, range(5, 15))
    assert same(model, other)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("route", ["loaded", "stepped before"])
def test_whole_states_are_cut(axis, route):
    """Those of torch's AdamW, or of this optimizer before it was folded."""
    plain, model = twins(lambda: Net("untied"))
    theirs = torchs(plain)
    train(plain, theirs, range(3))
    options = {"working_set": gradfold.WorkingSet(interval=1, chunks=5, axis=axis)}
    if route == "loaded":
        model.load_state_dict(plain.state_dict())
        optimizer = ours(model)
        gradfold.fold(model, optimizer, **options)
        optimizer.load_state_dict(reloaded(theirs.state_dict()))
    else:
        optimizer = ours(model)
        train(model, optimizer, range(3))
        gradfold.fold(model, optimizer, **options)
    whole = optimizer.torch_state_dict()["state"]
    for index, entry in theirs.state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.allclose(whole[index][key].double(), value.double(), rtol=1e-12, atol=0)
    train(model, optimizer, range(3, 4))
    with pytest.raises(FoldError, match="have stepped 3 to 4 times"):
        optimizer.torch_state_dict()
    train(model, optimizer, range(4, 8))
    assert {float(entry["step"]) for entry in optimizer.torch_state_dict()["state"].values()} == {4.0}


@pytest.mark.parametrize("axis", ["out", "in"])
def test_whole_int8_states_are_cut(axis):
    (model, optimizer), _ = coded_pair({"states": "int8", "master": "split8"})
    for step in range(2):
        coded_loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = optimizer.torch_state_dict()["state"]
    masters = gradfold.export_masters(model, optimizer)
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(interval=1, chunks=3, axis=axis))
    assert any(len(slices) > 1 for slices in fold._state.turns.slices.values())
    for _ in range(2):
        after, exported = optimizer.torch_state_dict()["state"], gradfold.export_masters(model, optimizer)
        for index, entry in before.items():
            assert all(torch.equal(value, after[index][key]) for key, value in entry.items())
        assert all(torch.equal(value, exported[name]) for name, value in masters.items())
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="import_masters"):
        gradfold.import_masters(model, optimizer, masters)


def test_state_dicts_that_do_not_fit():
    model, optimizer, _ = folded(chunks=4)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    plain = ours(Net("untied").double())
    with pytest.raises(ValueError, match=r"states of slices .*working_set="):
        plain.load_state_dict(saved)
    for options in ({"chunks": 5}, {"chunks": 4, "axis": "in"}):
        _, other, fold = folded(**options)
        before = other.state_dict()
        with pytest.raises(ValueError, match="cut otherwise|another model|slice"):
            other.load_state_dict(saved)
        after = other.state_dict()
        assert after["working_set"] == before["working_set"] and after["state"].keys() == before["state"].keys()
        assert fold.working_set.chunk == 0
    with pytest.raises(ValueError, match="order"):
        folded(chunks=4, order="backward")[1].load_state_dict(saved)
    train(model, optimizer, range(3, 6))  # as if nothing had been


def test_paused():
    """Plain PyTorch, but what sleeps does not step."""
    model, optimizer, fold = folded(chunks=3)
    twin, its, _ = folded(chunks=3)
    active, before = active_slices(fold), snapshot(model)
    with fold.paused():
        train(model, optimizer, range(1))
    assert untouched(before, model, active)
    train(twin, its, range(1))
    assert distance(model, twin) <= 1e-14
    assert no_gradients(model)


# requires_grad --------------------------------------------------------------------------------------------------------


def test_requires_grad_is_given_back():
    model, optimizer, fold = folded(chunks=3)
    assert not all(p.requires_grad for p in model.parameters())
    train(model, optimizer, range(2))
    fold.remove()
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_before():
    model = Net("untied").double()
    model.embed.requires_grad_(False)
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(interval=1, chunks=3))
    before = model.embed.weight.detach().clone()
    train(model, optimizer, range(6))
    assert torch.equal(model.embed.weight, before) and not model.embed.weight.requires_grad
    assert "embed.weight" not in {name for chunk in fold._state.turns.chunks for name, *_ in chunk}
    fold.remove()
    assert not model.embed.weight.requires_grad and model.head.weight.requires_grad


@pytest.mark.parametrize("scene", ["untied", "tied"])
def test_frozen_by_the_user_in_between(scene):
    model, optimizer, fold = folded(scene, chunks=3)
    assert active_slices(fold)[0][0] == "embed.weight"
    model.embed.weight.requires_grad_(False)
    before = model.embed.weight.detach().clone()
    train(model, optimizer, range(7), fold)  # more than a round
    assert torch.equal(model.embed.weight, before) and not model.embed.weight.requires_grad
    model.embed.weight.requires_grad_(True)  # while its chunk sleeps, or not: it takes its turns again
    train(model, optimizer, range(7, 11), fold)
    assert not torch.equal(model.embed.weight, before)
    model.embed.weight.requires_grad_(False) if model.embed.weight.requires_grad else None
    fold.remove()


def test_unfreezing_all_wakes_nobody():
    model, optimizer, fold = folded(chunks=3)
    twin, its, _ = folded(chunks=3)
    for step in range(6):
        if step % 2 == 0:
            model.requires_grad_(True)
        active, before = active_slices(fold), snapshot(model)
        train(model, optimizer, [step])
        assert untouched(before, model, active)
        train(twin, its, [step])
    assert distance(model, twin) == 0
    assert no_gradients(model)


# what sleeping saves --------------------------------------------------------------------------------------------------


def saved_bytes(model):
    """Of the tensors autograd keeps between forward and backward, parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.zeros(64, 32)).sum()
    return sum(kept.values()), loss


def test_backward_ends_at_the_lowest_layer_awake():
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
    reached = []
    for index, layer in enumerate(model):
        layer.register_forward_hook(lambda module, args, out, index=index: reached.append((index, out.requires_grad)))
    optimizer = gradfold.SGD(model.parameters(), lr=0.1)
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(interval=1, chunks=8))
    x_bytes = 64 * 32 * 4
    for chunk in range(8):
        reached.clear()
        assert fold.working_set.chunk == chunk
        kept, loss = saved_bytes(model)
        assert reached == [(index, index >= chunk) for index in range(8)]
        assert kept == x_bytes  # the input of the one layer that is awake; the others pass gradients on with weights
        loss.backward()
        optimizer.step()


# refusals -------------------------------------------------------------------------------------------------------------


def test_reentrant_checkpoints_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fold = gradfold.fold(
        model, gradfold.SGD(model.parameters(), lr=0.1), working_set=gradfold.WorkingSet(interval=1, chunks=2)
    )
    before = snapshot(model)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(FoldError, match=r"use_reentrant=False"):
        checkpoint(model, x, use_reentrant=True)
    with torch.no_grad():
        model(x)
    assert untouched(before, model, []) and fold.working_set.chunk == 0


@pytest.mark.parametrize(
    "options, says",
    [
        ({}, "chunks=None"),
        ({"chunks": 0}, "chunks=0"),
        ({"chunks": 2.0}, "chunks=2.0"),
        ({"chunks": 10**6}, "chunks=1000000"),
        ({"chunks": 2, "interval": 0}, "interval=0"),
        ({"chunks": 2, "by": "rows"}, "by='rows'"),
        ({"chunks": 2, "axis": "up"}, "axis='up'"),
        ({"chunks": 2, "order": "up"}, "order='up'"),
        ({"chunks": 2, "states": "drop"}, "states='drop'"),
        ({"chunks": 2, "offload": "tape"}, "offload='tape'"),
        ({"chunks": 2, "offload": "disk"}, "folder"),
        ({"chunks": 2, "folder": "x"}, "folder"),
        ({"chunks": 2, "prefetch": 2}, "prefetch=2"),
        ({"chunks": 2, "always": "norm"}, r"\['norm'\]"),
        ({"chunks": 2, "always": ["norn"]}, "norn"),
        ({"chunks": 2, "always": ["."]}, "always"),
        ({"by": [["embed"], ["head"]]}, "in no chunk"),
        ({"by": [["embed", "blocks", "head"], ["heda"]]}, "heda.*head"),
        ({"chunks": 3, "by": [["embed", "blocks"], ["head"]]}, "chunks=3"),
        ({"by": "layer", "chunks": 99}, "chunks=99"),
    ],
    ids=str,
)
def test_bad_arguments(options, says):
    model = Net("untied")
    optimizer = ours(model)
    with pytest.raises(FoldError, match=says):
        gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(**({"interval": 1} | options)))
    assert all(p.requires_grad for p in model.parameters()) and not optimizer.state
    gradfold.fold(model, optimizer)  # as if nothing had been


def test_a_loss_without_anything_awake():
    model, optimizer, fold = folded("partial", by="layer")
    chunks = fold._state.turns.chunks
    asleep = next(i for i, chunk in enumerate(chunks) if chunk[0][0].startswith("blocks.2"))
    for step in range(len(chunks)):
        before = snapshot(model)
        fold.backward(model.loss(batches(20)[step]))
        optimizer.step()
        assert (fold.grad_norm == 0) == untouched(before, model, []) == (step == asleep)


def test_transformers_checkpointing_does_not_keep_backward_going():
    """gradient_checkpointing_enable makes embeddings' outputs require grad, for reentrant checkpoints."""
    make, loss = MODELS["llama"]
    model = make().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    needs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: needs.append(args[0].requires_grad))
    fold = gradfold.fold(model, ours(model), working_set=gradfold.WorkingSet(interval=1, by="layer"))
    found = {}
    for _ in range(len(fold._state.turns.chunks)):
        needs.clear()
        turn = fold.working_set.chunk
        loss(model, 0).backward()
        found[fold._state.turns.chunks[turn][0].name] = needs[:2]
        fold._state.optimizer.step()
    assert found["model.embed_tokens.weight"] == [True, True]
    assert found["model.layers.0.self_attn.q_proj.weight"] == [False, True]
    assert found["model.layers.1.self_attn.q_proj.weight"] == [False, False]
    fold.remove()
    needs.clear()
    model.model.embed_tokens.requires_grad_(False)
    loss(model, 0)
    assert needs == [True, True]  # as the user had it
