"""Coded states to and from torch, files and other forms; what does not fit changes nothing."""

import contextlib
import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from tests.optim.coded import (
    assert_same,
    each_combination,
    each_states,
    everything,
    make,
    train,
)


@each_states
def test_to_torch_and_back(states):
    model, optimizer = make({"states": states, "rounding": "stochastic"})
    train(model, optimizer, 3)
    exported = optimizer.torch_state_dict()
    theirs = torch.optim.AdamW([nn.Parameter(p.detach().float()) for p in model.parameters()])
    assert exported["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    theirs.load_state_dict(exported)
    for ours, param in zip(model.parameters(), theirs.param_groups[0]["params"], strict=True):
        state = theirs.state[param]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(
            state[key].shape == ours.shape and state[key].dtype == torch.float32 for key in state.keys() - {"step"}
        )
        assert state["exp_avg"].any() and state["step"] == 3

    other, back = make({"states": states, "rounding": "stochastic"})
    before = everything(model, optimizer)
    other.load_state_dict(model.state_dict())
    back.load_state_dict(theirs.state_dict())
    after = everything(other, back)
    if states is None:  # as documented: plain states keep the dtype they come in
        after = {key: value.to(before[key].dtype) for key, value in after.items()}
    if states in ("int8", "int4"):
        # as it was, but where the block's largest was rounded down to a power of two: its scale is half of what it was,
        # and int8's levels are a last bit beside those of twice the scale
        assert_same_values(exported, back.torch_state_dict())
        before, after = ({k: v for k, v in of.items() if "exp_avg_sq" not in k} for of in (before, after))
    assert_same(before, after)  # a decoded state is encoded again as it was
    train(other, back, 1)


def assert_same_values(one, other):
    for index, states in one["state"].items():
        for key, value in states.items():
            assert torch.allclose(other["state"][index][key], value, rtol=2e-7, atol=0), (index, key)


def test_loading_fp32_states_into_int8_is_close():
    theirs_model, theirs = make({"states": "fp32"})
    train(theirs_model, theirs, 4)
    _, optimizer = make({"states": "int8"})
    optimizer.load_state_dict(theirs.torch_state_dict())
    decoded = optimizer.torch_state_dict()["state"]
    exact = theirs.torch_state_dict()["state"]
    for index in exact:
        m, v = (exact[index][key] for key in ("exp_avg", "exp_avg_sq"))
        dm, dv = (decoded[index][key] for key in ("exp_avg", "exp_avg_sq"))
        assert (dm - m).norm() <= 0.05 * m.norm()
        assert (dv[v > 0].rsqrt() - v[v > 0].rsqrt()).abs().div(v[v > 0].rsqrt()).max() < 0.09


@each_combination
def test_state_dict_survives_safetensors(states, rounding, master):
    model, optimizer = make({"states": states, "rounding": rounding, "master": master})
    train(model, optimizer, 2)
    packed = optimizer.state_dict()
    flat = {f"{index}/{key}": value for index, state in packed["state"].items() for key, value in state.items()}
    loaded = load(save(flat))
    packed["state"] = {
        index: {key: loaded[f"{index}/{key}"] for key in state} for index, state in packed["state"].items()
    }
    other, resumed = make({})
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(packed)
    assert_same(everything(model, optimizer), everything(other, resumed))


@pytest.mark.parametrize("numbered", [True, False], ids=["format 2", "format 1"])
def test_state_dict_survives_distributed_checkpoint(tmp_path, numbered):
    """One of format 1 has no number, which a target must not ask for then."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    options = {"states": "int8", "rounding": "stochastic", "master": "split8"}
    model, optimizer = make(options)
    train(model, optimizer, 2)
    before = everything(model, optimizer)

    def packed(model, optimizer):
        made = get_optimizer_state_dict(model, optimizer)
        for group in made["param_groups"] if not numbered else ():
            del group["format"], group["gradfold"]
        return {"optimizer": made}

    dcp.save(packed(model, optimizer), checkpoint_id=tmp_path)
    assert_same(before, everything(model, optimizer))

    other, resumed = make(options)
    other.load_state_dict(model.state_dict())
    train(other, resumed, 1)
    target = packed(other, resumed)
    dcp.load(target, checkpoint_id=tmp_path)
    with contextlib.nullcontext() if numbered else pytest.warns(UserWarning, match="format 1.*draws other bits"):
        set_optimizer_state_dict(other, resumed, target["optimizer"])
    other.load_state_dict(model.state_dict())
    assert_same(before, everything(other, resumed))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("exp_avg.scales"), "exp_avg"),
        (lambda s: s.update({"exp_avg.codes": s["exp_avg.codes"].float()}), "exp_avg.codes.*float32"),
        (lambda s: s.update({"exp_avg.codes": s["exp_avg.codes"][:, :-1]}), "exp_avg.codes.*shape"),
        (lambda s: s.update({"weight.residual": s["weight.residual"].short()}), "weight.residual.*int16"),
        (lambda s: s.update({"stranger": torch.zeros(1)}), "stranger"),
    ],
    ids=["a part missing", "dtype", "shape", "residual", "stranger"],
)
def test_spoilt_states_are_refused_and_nothing_changes(spoil, message):
    options = {"states": "int8", "master": "split8"}
    model, optimizer = make(options)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved["state"][0])
    other, target = make(options)
    before = everything(other, target)
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(saved)
    assert_same(before, everything(other, target))
