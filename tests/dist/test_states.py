"""States of sharded parameters: bit for bit those of one process, DTensors in every state_dict, resharded by torch's
distributed checkpoints."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed as dist

import gradfold
from tests.dist.states import (
    HYPER,
    KINDS,
    SHAPES,
    Params,
    alone,
    differing,
    everything,
    mesh_of,
    optimizer_of,
    plain_states,
    train,
)
from tests.dist.test_fsdp import sharded
from tests.dist.tiny import batch, loss_of, tiny, whole


def stepped(kind, dim, folded, steps, zero=False):
    model = Params(kind, mesh_of(), dim, zero=zero)
    optimizer = optimizer_of(model, kind)
    fold = gradfold.fold(model, optimizer) if folded else None
    train(model, optimizer, range(steps))
    return model, optimizer, fold


# stepping -------------------------------------------------------------------------------------------------------------


def as_one_process(kinds, dims, folds):
    """Return what differs from one process, and which states are not DTensors."""
    found = {}
    for kind in kinds:
        want = everything(*alone(kind, 3))
        for dim in dims:
            for folded in folds:
                model, optimizer, fold = stepped(kind, dim, folded, 3)
                key = f"{kind} Shard({dim}) {'folded' if folded else 'plain'}"
                found[key] = differing(everything(model, optimizer), want), plain_states(model, optimizer)
                if fold is not None:
                    fold.remove()
    return found


def test_states_are_those_of_one_process(two):
    for found in two.run(as_one_process, list(KINDS), [0, 1], [False, True]):
        assert found == {key: ([], []) for key in found}
        assert len(found) == 16


@pytest.mark.slow
def test_states_are_those_of_one_process_on_four_ranks(four):
    for found in four.run(as_one_process, list(KINDS), [0, 1], [False, True]):
        assert found == {key: ([], []) for key in found}


# distributed checkpoints ----------------------------------------------------------------------------------------------


def packed(model, optimizer, flat=False):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        "torch": optimizer.torch_state_dict() if isinstance(optimizer, gradfold.AdamW) else optimizer.state_dict(),
    }


def save(kind, dim, folded, folder, flat=False):
    import torch.distributed.checkpoint as dcp

    model, optimizer, fold = stepped(kind, dim, folded, 3)
    dcp.save(packed(model, optimizer, flat), checkpoint_id=folder)
    if fold is not None:
        fold.remove()
    return differing(everything(model, optimizer), everything(*alone(kind, 3)))


def resume(kind, dim, folded, folder, flat=False):
    """Return what differs from one process: as loaded, and after one more step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    model = Params(kind, mesh_of() if dist.is_initialized() else None, dim, zero=True)
    optimizer = optimizer_of(model, kind)
    fold = gradfold.fold(model, optimizer) if folded else None
    target = packed(model, optimizer, flat)
    moved = [name for name, param in model.named_parameters() if whole(param.detach()).any()]
    del target["torch"]
    dcp.load(target, checkpoint_id=folder)
    set_model_state_dict(model, target["model"])
    set_optimizer_state_dict(model, optimizer, target["optimizer"])
    loaded = differing(everything(model, optimizer), everything(*alone(kind, 3)))
    train(model, optimizer, [3])
    after = differing(everything(model, optimizer), everything(*alone(kind, 4)))
    if fold is not None:
        fold.remove()
    return moved, loaded, after


def there_and_back(kinds, folder):
    found = {}
    for index, kind in enumerate(kinds):
        folded, flat = bool(index % 2), index < 2
        found[kind, "saved"] = save(kind, index % 2, folded, f"{folder}/{kind}", flat)
        found[kind, "resumed"] = resume(kind, 1 - index % 2, not folded, f"{folder}/{kind}", flat)
    return found


def test_checkpoints_of_two_ranks(two, tmp_path):
    """Saved with one placement, loaded with the other; then on one process, and by torch's own AdamW."""
    for found in two.run(there_and_back, list(KINDS), str(tmp_path)):
        assert found == {key: ([] if key[1] == "saved" else ([], [], [])) for key in found}
    for index, kind in enumerate(KINDS):
        with quiet():
            assert resume(kind, 0, True, f"{tmp_path}/{kind}", index < 2) == ([], [], [])
            assert as_torch(kind, f"{tmp_path}/{kind}") == []


@contextlib.contextmanager
def quiet():
    """A context without what torch says of checkpoints that one process loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        yield


def as_torch(kind, folder):
    """Return what differs after torch's AdamW has loaded a checkpoint and stepped, from one that never saw a rank."""
    import torch.distributed.checkpoint as dcp

    made = []
    for source in (None, alone(kind, 3)):
        model = Params(kind, zero=True)
        optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
        if source is None:
            train(model, optimizer, [0])
            target = {"model": model.state_dict(), "torch": optimizer.state_dict()}
            if KINDS[kind][0] == torch.bfloat16:  # torch keeps states in the weight's dtype, the checkpoint in fp32
                for states in target["torch"]["state"].values():
                    states.update({key: value.float() for key, value in states.items()})
            dcp.load(target, checkpoint_id=folder)
            model.load_state_dict(target["model"])
            optimizer.load_state_dict(target["torch"])
        else:
            model.load_state_dict(source[0].state_dict())
            optimizer.load_state_dict(source[1].torch_state_dict())
        train(model, optimizer, [3])
        made.append(everything(model, optimizer))
    return differing(*made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_checkpoints_of_four_ranks(four, two, tmp_path, kind, dim):
    """Saved on four, loaded on four, two and one, with both placements."""
    assert four.run(save, kind, dim, True, f"{tmp_path}") == [[]] * 4
    for other in (0, 1):
        assert four.run(resume, kind, other, True, f"{tmp_path}") == [([], [], [])] * 4
        assert two.run(resume, kind, other, bool(other), f"{tmp_path}") == [([], [], [])] * 2
    with quiet():
        assert resume(kind, 0, True, f"{tmp_path}") == ([], [], [])
        assert resume(kind, 0, False, f"{tmp_path}") == ([], [], [])
        assert as_torch(kind, f"{tmp_path}") == []


# whole state_dicts ----------------------------------------------------------------------------------------------------


def whole_ones(kinds):
    """Return what differs where state_dicts are whole: taken from ranks, and given to them, in both ways of torch."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    full = StateDictOptions(full_state_dict=True)
    found = {}
    for index, kind in enumerate(kinds):
        source, its = alone(kind, 3)
        want = everything(source, its)
        folded = bool(index % 2)
        model, optimizer, fold = stepped(kind, index % 2, folded, 1)
        load_weights(model, source)
        optimizer.load_state_dict(its.state_dict())
        found[kind, "given"] = differing(everything(model, optimizer), want)
        taken = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=full))
        other, theirs = alone(kind, 1)
        other.load_state_dict(source.state_dict())
        set_optimizer_state_dict(other, theirs, taken)
        found[kind, "taken"] = differing(everything(other, theirs), want)
        train(model, optimizer, [3])
        found[kind, "gone on"] = differing(everything(model, optimizer), everything(*alone(kind, 4)))
        for how in (full, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)):
            sent = copy.deepcopy(taken) if dist.get_rank() == 0 or not how.broadcast_from_rank0 else {}
            load_weights(model, source)
            set_optimizer_state_dict(model, optimizer, sent, options=how)
            found[kind, f"sent {how.broadcast_from_rank0}"] = differing(everything(model, optimizer), want)
        if fold is not None:
            fold.remove()
    return found


def load_weights(model, source):
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(model.cut(name, source.get_parameter(name).detach()))


def test_whole_state_dicts(two):
    for found in two.run(whole_ones, list(KINDS)):
        assert found == {key: [] for key in found}


def redistributed(kind):
    """Return what differs where a state_dict's DTensors are placed otherwise than the parameters."""
    _source, its, fold = stepped(kind, 0, True, 3)
    model, optimizer, other = stepped(kind, 1, True, 1)
    load_weights(model, alone(kind, 3)[0])
    optimizer.load_state_dict(its.state_dict())
    fold.remove()
    other.remove()
    return differing(everything(model, optimizer), everything(*alone(kind, 3)))


def masters(dim):
    """Return whether masters of shards are those of one process, taken out and put in."""
    model, optimizer, fold = stepped("split8", dim, True, 3)
    source, its = alone("split8", 3)
    want = gradfold.export_masters(source, its)
    taken = {name: whole(value) for name, value in gradfold.export_masters(model, optimizer).items()}
    fold.remove()
    again, resumed, _ = stepped("split8", dim, False, 1)
    gradfold.import_masters(again, resumed, want if dim else gradfold.export_masters(model, optimizer))
    back = {name: whole(value) for name, value in gradfold.export_masters(again, resumed).items()}
    return differing(taken, want), differing(back, want)


def several(dim):
    return redistributed("int8"), redistributed("fp32"), masters(dim)


def test_other_placements_and_masters(two):
    for dim in (0, 1):
        assert two.run(several, dim) == [([], [], ([], []))] * 2


# torch's own first step -----------------------------------------------------------------------------------------------


CODED = {"states": "int8", "rounding": "stochastic", "small_size": 0}


def first_steps():
    """Return what torch's ``get_optimizer_state_dict`` moves where the optimizer has no states yet, or never any."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    found = {}
    for kind in KINDS:
        model = Params(kind, mesh_of())
        before = {name: whole(param.detach()).clone() for name, param in model.named_parameters()}
        get_optimizer_state_dict(model, optimizer_of(model, kind))
        found[kind] = differing(before, {name: whole(param.detach()) for name, param in model.named_parameters()})
    for folded, momentum in ((False, 0), (True, 0), (True, 0.9)):
        model = Params("fp32", mesh_of())
        optimizer = gradfold.SGD(model.named_parameters(), lr=0.1, momentum=momentum, weight_decay=0.1)
        if folded:
            gradfold.fold(model, optimizer)
        before = {name: whole(param.detach()).clone() for name, param in model.named_parameters()}
        optimizer.state_dict()
        states = get_optimizer_state_dict(model, optimizer)["state"]
        left = [name for name, param in model.named_parameters() if param.grad is not None]
        after = {name: whole(param.detach()) for name, param in model.named_parameters()}
        if folded and momentum:  # stochastic rounding counts steps, so that torch takes the states for complete
            coded = Params("int8", mesh_of())
            counted = gradfold.SGD(coded.named_parameters(), lr=0.1, momentum=0.9, dampening=0.5, **CODED)
            gradfold.fold(coded, counted)
            brought = get_optimizer_state_dict(coded, counted)["state"]
            found["lazy, there"] = [name for name in SHAPES if "momentum_buffer.codes" not in brought[name]]
            counted.load_state_dict(counted.state_dict())
            train(coded, counted, [0])
            plain = Params("int8")
            its = gradfold.SGD(plain.named_parameters(), lr=0.1, momentum=0.9, dampening=0.5, **CODED)
            train(plain, its, [0])
            found["lazy, begun"] = differing(everything(coded, counted), everything(plain, its))
        missing = [name for name in SHAPES if momentum and "momentum_buffer" not in states[name]]
        found[f"SGD {folded} {momentum}"] = differing(before, after) + left + missing
    return found


def test_first_step_of_torch_is_harmless(two):
    for found in two.run(first_steps):
        assert found == {key: [] for key in found}


# FSDP2 ----------------------------------------------------------------------------------------------------------------


def under_fsdp(folder):
    """Return what differs after a checkpoint of a folded FSDP2 model, from that model going on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    made = []
    for index in range(2):
        model = sharded(tiny(torch.float32), mesh_of())
        optimizer = gradfold.AdamW(model.named_parameters(), **HYPER, states="int8", rounding="stochastic", seed=1)
        fold = gradfold.fold(model, optimizer, clip_norm=0.1)
        for step in range(1 + index, 3) if index else range(3):
            ids, labels = (tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in batch(step))
            loss_of(model(ids), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights, states = get_state_dict(model, optimizer)
        target = {"model": weights, "optimizer": states}
        if index:
            dcp.load(target, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
        else:
            dcp.save(target, checkpoint_id=folder)
        before = everything(model, optimizer)
        ids, labels = (tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in batch(3))
        loss_of(model(ids), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        made.append((before, everything(model, optimizer), plain_states(model, optimizer)))
        fold.remove()
    return differing(made[0][0], made[1][0]), differing(made[0][1], made[1][1]), made[0][2]


def test_checkpoint_under_fsdp(two, tmp_path):
    assert two.run(under_fsdp, str(tmp_path)) == [([], [], [])] * 2


assert SHAPES["rows"][0] % 4  # shards of unequal sizes are among them
