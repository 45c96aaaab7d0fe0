"""Split masters: fp32 training under bf16 weights, where they begin, out and in again."""

import pytest
import torch
from safetensors.torch import load, save

import gradfold
from tests.optim.coded import (
    Model,
    assert_same,
    everything,
    make,
    train,
)


def test_split16_is_fp32_training():
    """fp32 master weights, bit for bit, seen through their bf16 rounding."""
    options = {"states": "fp32", "master": "split16", "small_size": 0, "rounding": "nearest"}
    model, optimizer = make(options, folded=False)
    twin = Model().float()
    plain = gradfold.AdamW(twin.parameters(), lr=1e-2, states="fp32")
    for step in range(5):
        model.loss(step).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = ours.grad.float()
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
    masters = gradfold.export_masters(model, optimizer)
    for name, theirs in twin.named_parameters():
        torch.testing.assert_close(masters[name], theirs.detach(), rtol=1e-6, atol=2e-8)
        assert torch.equal(dict(model.named_parameters())[name].float(), masters[name].bfloat16().float())


@pytest.mark.parametrize("master", ["split8", "split16"])
def test_new_masters_lie_anywhere_within_the_rounding_of_their_weights(master):
    """So that weights follow them in the mean; and all of a model's weights stay as they are."""
    model, optimizer = make({"master": master})
    before = Model()
    masters = gradfold.export_masters(model, optimizer)
    for name, param in before.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], param), name
        ulp = param.detach().float().abs().log2().floor().exp2() * 2**-7
        place = ((masters[name] - param.detach().float()) / ulp)[param.detach() != 0]
        assert (place.abs() <= 0.5).all()
        if place.numel() > 5_000:
            assert abs(place.mean()) < 0.02 and place.var() == pytest.approx(1 / 12, rel=0.05)
    for rounding, dithered in (("nearest", False), ("stochastic", True)):
        _, optimizer = make({"master": master, "rounding": rounding})
        assert any(state["weight.residual"].any() for state in optimizer.state.values()) == dithered


@pytest.mark.parametrize("master", ["split8", "split16"])
def test_masters_go_out_and_in(master):
    model, optimizer = make({"master": master})
    train(model, optimizer, 3)
    masters = gradfold.export_masters(model, optimizer)
    assert masters.keys() == dict(model.named_parameters()).keys()
    assert all(t.dtype == torch.float32 for t in masters.values())
    other, resumed = make({"master": master})
    gradfold.import_masters(other, resumed, load(save(masters)))
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(optimizer.state[a]["weight.residual"], resumed.state[b]["weight.residual"]), name


def test_masters_that_do_not_fit_change_nothing():
    model, optimizer = make({"master": "split8"})
    before = everything(model, optimizer)
    masters = gradfold.export_masters(model, optimizer)
    for bad, message in (
        ({**masters, "wide.weight": torch.zeros(3, 3)}, "wide.weight.*shape"),
        ({k: v for k, v in masters.items() if k != "norm.bias"}, "norm.bias"),
        ({**masters, "other": torch.zeros(1)}, "other"),
    ):
        with pytest.raises(ValueError, match=message):
            gradfold.import_masters(model, optimizer, bad)
        assert_same(before, everything(model, optimizer))


def test_a_master_is_for_16_bits_alone():
    with pytest.raises(ValueError, match="float16"):
        make({"master": "split8"}, dtype=torch.float16)
    for dtype in (torch.float32, torch.float64):  # such a weight is its own master
        with pytest.raises(ValueError, match=r"master='split8' with float\d\d weights does nothing.*leave master= out"):
            make({"master": "split8"}, dtype=dtype)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4).bfloat16(), torch.nn.LayerNorm(4))  # norms are often wider
    optimizer = gradfold.AdamW(model.parameters(), master="split8", small_size=0)
    gradfold.fold(model, optimizer)
    assert [p.dtype for p, state in optimizer.state.items() if "weight.residual" in state] == [torch.bfloat16] * 2
