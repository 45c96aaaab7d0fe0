"""fp16 weights: second moments are kept in a dtype that holds the square of a small gradient."""

import copy
import warnings

import pytest
import torch
from torch import nn

import gradfold
from gradfold.errors import FoldError
from tests.pairs import in_turn

SMALL = 1e-4  # its square is 0 in fp16
SQUARES = {
    "Adam": {},
    "AdamW": {"amsgrad": True},
    "RMSprop": {"momentum": 0.5},
    "RMSprop, centered": {"centered": True},
    "Adagrad": {"initial_accumulator_value": 0.0},
    "NAdam": {},
    "RAdam": {"lr": 0.1},  # its first steps are not divided by anything, and are too small for fp16 weights
}
OTHERS = {"SGD": {"momentum": 0.9}, "Lion": {}}


def small_net(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)).to(torch.float16)
    for param in model.parameters():
        nn.init.zeros_(param)  # where fp16 resolves a step best
    return model.to(dtype)


def gradients(model, step):
    """Return a loss whose gradients are small, of either sign, and the same in every dtype."""
    generator = torch.Generator().manual_seed(step)
    signs = [torch.randint(1, 4, p.shape, generator=generator) * (1 - 2 * (step % 2)) for p in model.parameters()]
    return sum((p * (s * SMALL).half().to(p.dtype)).sum() for p, s in zip(model.parameters(), signs, strict=True))


def train(model, optimizer, steps=8):
    for step in range(steps):
        gradients(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizers_of(name, **more):
    kind = name.partition(",")[0]
    given = {"lr": 1e-3, **(SQUARES | OTHERS)[name]}
    return (lambda p: getattr(gradfold, kind)(p, **given, **more)), lambda p: getattr(torch.optim, kind)(p, **given)


def gap(model, exact):
    """The difference of two models that began at 0, relative to how far the exact one went."""
    mine, wanted = (torch.cat([p.detach().double().flatten() for p in m.parameters()]) for m in (model, exact))
    return float((mine - wanted).norm() / wanted.norm())


@in_turn(
    how=[(n, s) for n in SQUARES for s in (None, "fp32", "bf16") if s != "bf16" or "centered" not in n],  # refused
    folded=[True, False],
)
def test_small_gradients(how, folded):
    """The weights go where torch's in fp64 go."""
    name, states = how
    ours, torchs = optimizers_of(name, **({} if states is None else {"states": states, "small_size": 0}))
    model, exact = small_net(torch.float16), small_net(torch.float64)
    optimizer = ours(model.parameters())
    if folded:
        gradfold.fold(model, optimizer)
    train(model, optimizer)
    train(exact, torchs(exact.parameters()))
    assert gap(model, exact) <= (3e-2 if states == "bf16" else 3e-3)
    kept = {
        s.dtype for state in optimizer.state.values() for key, s in state.items() if key not in ("step", "mu_product")
    }
    assert kept == {torch.bfloat16 if states == "bf16" else torch.float32}


@pytest.mark.parametrize("name", ["Adam", "Adagrad"])
@pytest.mark.parametrize("states", ["int8", "int4"])
def test_quantized_states_have_a_scale(name, states):
    ours, _ = optimizers_of(name, states=states, small_size=0)
    model = small_net(torch.float16)
    optimizer = ours(model.parameters())
    gradfold.fold(model, optimizer)
    before = [p.clone() for p in model.parameters()]
    train(model, optimizer, 1)
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert moved.isfinite().all() and 0 < moved.abs().max() <= 3e-3


def test_large_gradients():
    """Squares beyond 65504, fp16's largest number, would stop the weights."""
    model = nn.Linear(3, 2, bias=False, dtype=torch.float16)
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    gradfold.fold(model, optimizer)
    before = model.weight.detach().clone()
    model(torch.full((1, 3), 2000.0, dtype=torch.float16)).sum().backward()
    optimizer.step()
    assert torch.allclose(before - model.weight, torch.full_like(before, 1e-2), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((n, d) for n in OTHERS for d in (torch.float16, torch.bfloat16)), ("AdamW", torch.bfloat16)]
)
def test_other_states_stay_as_they_are(name, dtype):
    ours, _ = optimizers_of(name)
    model = small_net(dtype)
    optimizer = ours(model.parameters())
    gradfold.fold(model, optimizer)
    train(model, optimizer, 1)
    assert {s.dtype for state in optimizer.state.values() for key, s in state.items() if key != "step"} == {dtype}


@pytest.mark.parametrize("states", ["fp16", "float16", "half", torch.float16])
def test_fp16_states_are_refused(states):
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match=r"states=.*one of 'fp32'.*fp16 cannot hold the squares"):
            gradfold.AdamW(small_net(dtype).parameters(), states=states)
    with pytest.raises(ValueError, match="splits bfloat16 weights"):
        gradfold.AdamW(small_net(torch.float16).parameters(), master="split8")


# checkpoints ----------------------------------------------------------------------------------------------------------


def saved_by_torch(name, scale):
    """A state_dict of torch's optimizer of fp16 weights, of gradients of this size."""
    kind = name.partition(",")[0]
    model = small_net(torch.float16)
    optimizer = getattr(torch.optim, kind)(model.parameters(), foreach=False, **{"lr": 1e-3, **SQUARES[name]})
    for param in model.parameters():
        param.grad = torch.full_like(param, scale)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SQUARES)
def test_torchs_states_are_widened(name, dtype):
    saved = saved_by_torch(name, 1.0)
    model = small_net(dtype)
    optimizer = optimizers_of(name)[0](model.parameters())
    gradfold.fold(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    for index, param in enumerate(model.parameters()):
        for key, value in saved["state"][index].items():
            mine = optimizer.state[param][key]
            if key not in ("step", "mu_product"):
                assert mine.dtype == (torch.float32 if dtype == torch.float16 else dtype)
            assert torch.allclose(mine.double(), torch.as_tensor(value).double(), rtol=1e-2)
    train(model, optimizer, 1)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam"])
def test_what_has_underflowed_is_said(name):
    saved = saved_by_torch(name, SMALL)
    model = small_net(torch.float16)
    count = sum(p.numel() for p in model.parameters()) * (2 if name == "AdamW" else 1)  # with max_exp_avg_sq
    optimizer = optimizers_of(name)[0](model.parameters())
    gradfold.fold(model, optimizer)
    with pytest.warns(UserWarning, match=rf"{count} second moments are 0 because they were kept in float16.*'state': "):
        optimizer.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict({**saved, "state": {}})  # the way out
    train(model, optimizer, 2)
    assert max(float(p.detach().abs().max()) for p in model.parameters()) <= 2.1e-3 * (10 if name == "RMSprop" else 1)


def test_masters_take_fp16_states_wider():
    model = small_net(torch.bfloat16)
    optimizer = gradfold.AdamW(model.parameters(), amsgrad=True, master="split8")
    optimizer.load_state_dict(saved_by_torch("AdamW", 1.0))
    kept = {s.dtype for state in optimizer.state.values() for key, s in state.items() if key.startswith("exp_avg")}
    assert kept == {torch.bfloat16}


def test_states_that_were_put_there_are_refused():
    """By torch's own load_state_dict, which casts to the weight's dtype, or by hand. Before a weight moves."""
    saved = saved_by_torch("Adam", 1.0)
    for dtype, put in (
        (torch.float16, lambda optimizer: torch.optim.Optimizer.load_state_dict(optimizer, copy.deepcopy(saved))),
        (torch.float32, halve),
    ):
        model = small_net(dtype)
        optimizer = gradfold.Adam(model.parameters(), lr=1e-3)
        train(model, optimizer, 1)
        before = [p.detach().clone() for p in model.parameters()]
        put(optimizer)
        with pytest.raises(FoldError, match="exp_avg_sq"):
            train(model, optimizer, 1)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def halve(optimizer):
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].half()
