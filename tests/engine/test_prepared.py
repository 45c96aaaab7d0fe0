"""What a step is prepared from is looked up once; whatever changes it is noticed before the next step."""

import sys

import pytest
import torch
from torch import nn

import gradfold
from gradfold.backends import Reference, Scratch

CLOSE = 1e-12
X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Counting(Reference):
    """The reference backend; counts how often something is prepared."""

    def __init__(self):
        super().__init__(Scratch())
        self.prepared = 0

    def prepare(self, *args):
        self.prepared += 1
        return super().prepare(*args)


def build(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4, bias=False)).to(dtype)


def step(model, optimizer):
    model(X.to(model[0].weight.dtype)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


class Twins:
    """A folded model and a plain one, each with an AdamW of the same numbers."""

    def __init__(self, **options):
        self.model, self.plain = build(), build()
        self.backend = Counting()
        self.optimizer = gradfold.AdamW(self.model.parameters(), lr=1e-2, **options)
        self.fold = gradfold.fold(self.model, self.optimizer, backend=self.backend)
        self.torchs = torch.optim.AdamW(self.plain.parameters(), lr=1e-2, **options)

    def step(self, times=1):
        for _ in range(times):
            step(self.model, self.optimizer)
            step(self.plain, self.torchs)

    def states(self, index):
        """Of one parameter, folded and plain."""
        return [
            list(optimizer.state.values())[index] if optimizer.state else {}
            for optimizer in (self.optimizer, self.torchs)
        ]

    def distance(self):
        pairs = zip(self.model.parameters(), self.plain.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_once():
    twins = Twins()
    prepared = twins.backend.prepared
    twins.step(4)
    assert twins.backend.prepared == prepared == 3 and twins.distance() <= CLOSE


def test_the_numbers_of_a_group_are_live():
    twins = Twins()
    for change in ({"lr": 3e-2}, {"betas": (0.8, 0.9)}, {"eps": 1e-3}, {"weight_decay": 0.3}, {"maximize": True}):
        for optimizer in (twins.optimizer, twins.torchs):
            optimizer.param_groups[0].update(change)
        twins.step()
        assert twins.distance() <= CLOSE, change
    assert twins.backend.prepared == 3


def test_numbers_change_between_two_backwards_of_one_step():
    """They reach different parameters, so that both belong to one ``optimizer.step()``."""
    twins = Twins()
    for model, optimizer in ((twins.model, twins.optimizer), (twins.plain, twins.torchs)):
        if optimizer is twins.optimizer:
            model[2](X[:, :6]).square().sum().backward()
            optimizer.param_groups[0]["lr"] = 5e-2
            model[0](X).square().sum().backward()
            optimizer.step()
        else:
            model[2](X[:, :6]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 5e-2
            model[0](X).square().sum().backward()
            optimizer.step()
    assert twins.distance() <= CLOSE


@pytest.mark.parametrize("how", ["replaced", "data", "in place"])
def test_a_state_that_the_user_writes(how):
    twins = Twins()
    twins.step(2)
    for states in twins.states(0):
        fresh = torch.full_like(states["exp_avg"], 0.25)
        if how == "replaced":
            states["exp_avg"] = fresh
        elif how == "data":
            states["exp_avg"].data = fresh
        else:
            states["exp_avg"].copy_(fresh)
        states["step"] = torch.tensor(7.0, dtype=states["step"].dtype)
    twins.step(2)
    assert twins.distance() <= CLOSE
    ours, torchs = twins.states(0)
    assert ours["step"] == torchs["step"] == 9


def test_a_state_that_the_user_deletes_begins_anew():
    twins = Twins()
    twins.step(2)
    twins.optimizer.state[twins.model[0].weight].clear()
    twins.torchs.state[twins.plain[0].weight].clear()
    twins.step(2)
    assert twins.distance() <= CLOSE


def test_all_states_in_a_dictionary_of_their_own():
    twins = Twins()
    twins.step()
    for model, optimizer in ((twins.model, twins.optimizer), (twins.plain, twins.torchs)):
        weight = model[2].weight
        optimizer.state[weight] = {name: value.clone() for name, value in optimizer.state[weight].items()}
    twins.step(2)
    assert twins.distance() <= CLOSE


@pytest.mark.parametrize("whose", ["ours", "torch's"])
def test_a_loaded_state_dict(whose):
    twins = Twins()
    twins.step(2)
    saved, torchs = twins.optimizer.state_dict(), twins.torchs.state_dict()
    saved = {**saved, "state": {key: {n: v.clone() for n, v in one.items()} for key, one in saved["state"].items()}}
    torchs = {**torchs, "state": {key: {n: v.clone() for n, v in one.items()} for key, one in torchs["state"].items()}}
    weights = [param.detach().clone() for param in twins.model.parameters()]
    twins.step(3)
    for model in (twins.model, twins.plain):
        with torch.no_grad():
            for param, before in zip(model.parameters(), weights, strict=True):
                param.copy_(before)
    load = gradfold.AdamW.load_state_dict if whose == "ours" else torch.optim.Optimizer.load_state_dict
    load(twins.optimizer, saved)
    twins.torchs.load_state_dict(torchs)
    twins.step(2)
    assert twins.distance() <= CLOSE


def test_torchs_loading_and_a_working_set():
    model = build()
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=2))
    step(model, optimizer)
    before = {name: value.clone() for name, value in optimizer.state[model[2].weight].items()}
    with pytest.raises(gradfold.FoldError, match=r"call optimizer\.load_state_dict"):
        torch.optim.Optimizer.load_state_dict(optimizer, torch.optim.AdamW(build().parameters()).state_dict())
    assert all(torch.equal(optimizer.state[model[2].weight][name], value) for name, value in before.items())
    step(model, optimizer)


def test_a_new_param_group():
    twins = Twins()
    twins.step()
    late = []
    for model, optimizer in ((twins.model, twins.optimizer), (twins.plain, twins.torchs)):
        torch.manual_seed(5)
        layer = nn.Linear(4, 4).double()
        model.append(layer)
        optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.1})
        late.append(layer)
    twins.step(2)
    assert twins.distance() <= CLOSE and not torch.equal(late[0].bias, torch.zeros(4))


def test_a_parameter_that_moves_to_another_group():
    twins = Twins()
    twins.step()
    for model, optimizer in ((twins.model, twins.optimizer), (twins.plain, twins.torchs)):
        first, moved = optimizer.param_groups[0], model[2].weight
        first["params"] = [param for param in first["params"] if param is not moved]
        optimizer.add_param_group({"params": [moved], "lr": 0.1, "weight_decay": 0.5})
    twins.step(2)
    assert twins.distance() <= CLOSE


def test_a_parameter_that_is_in_no_group():
    model = build()
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer)
    before = model[2].weight.detach().clone()
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not model[2].weight]
    with pytest.raises(gradfold.FoldError, match=r"shape \(4, 6\) is in no param_group"):
        model(X).sum().backward()
    assert torch.equal(model[2].weight, before)


def test_a_weight_with_new_memory():
    twins = Twins()
    twins.step()
    for model in (twins.model, twins.plain):
        model[0].weight.data = torch.linspace(-1, 1, 48, dtype=torch.float64).view(6, 8)
    twins.step(2)
    assert twins.distance() <= CLOSE


def test_an_option_that_brings_another_state():
    twins = Twins()
    twins.step()
    for optimizer in (twins.optimizer, twins.torchs):
        optimizer.param_groups[0]["amsgrad"] = True
    for states, param in zip(twins.torchs.state.values(), twins.plain.parameters(), strict=True):
        states["max_exp_avg_sq"] = torch.zeros_like(param)
    twins.step(2)
    assert twins.distance() <= CLOSE
    assert "max_exp_avg_sq" in twins.optimizer.state[twins.model[0].weight]


def test_rounding_and_seed_of_a_group():
    """Each change draws other bits, and the same change the same ones."""

    def trained(*changes):
        model = build(torch.bfloat16)
        optimizer = gradfold.AdamW(model.parameters(), lr=1e-3, states="bf16", rounding="stochastic", small_size=0)
        gradfold.fold(model, optimizer)
        for change in changes:
            optimizer.param_groups[0].update(change)
            step(model, optimizer)
        return model[0].weight.detach().clone()

    same = trained({}, {}, {}), trained({}, {}, {})
    assert torch.equal(*same)
    assert torch.equal(trained({}, {"seed": 1}, {"seed": 2}), trained({}, {"seed": 1}, {"seed": 2}))
    assert not torch.equal(same[0], trained({}, {"seed": 1}, {"seed": 2}))
    assert not torch.equal(same[0], trained({}, {"rounding": "nearest"}, {}))


def test_states_that_are_stored_otherwise_than_their_group_says():
    model = build(torch.float32)
    optimizer = gradfold.AdamW(model.parameters(), states="fp32", small_size=0)
    gradfold.fold(model, optimizer)
    step(model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.param_groups[0]["states"] = "int8"
    with pytest.raises(gradfold.FoldError, match="is stored as exp_avg"):
        step(model, optimizer)
    assert torch.equal(before[2], list(model.parameters())[2])


@pytest.mark.parametrize(
    "storage", [{}, {"states": "int8", "rounding": "stochastic", "small_size": 0}], ids=["plain", "int8"]
)
def test_a_gradient_that_is_not_finite_counts_no_step(storage):
    model = build(torch.float32)
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2, **storage)
    gradfold.fold(model, optimizer, on_nonfinite="skip")
    step(model, optimizer)
    kept = {id(p): {n: v.clone() for n, v in s.items()} for p, s in optimizer.state.items()}
    weights = [param.detach().clone() for param in model.parameters()]
    (model(X.float()).square().sum() * float("inf")).backward()
    optimizer.step()
    for param, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(param, before)
        assert all(torch.equal(optimizer.state[param][name], value) for name, value in kept[id(param)].items())


def test_a_first_gradient_that_is_not_finite_leaves_lazy_states_unmade():
    model = build(torch.float32)
    optimizer = gradfold.SGD(model.parameters(), lr=1e-2, momentum=0.9, dampening=0.5)
    gradfold.fold(model, optimizer, on_nonfinite="skip")
    (model(X.float()).square().sum() * float("nan")).backward()
    optimizer.step()
    assert not any(states for states in optimizer.state.values())
    other = build(torch.float32)
    torchs = torch.optim.SGD(other.parameters(), lr=1e-2, momentum=0.9, dampening=0.5)
    for _ in range(2):
        step(model, optimizer)
        step(other, torchs)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_middle_linear_enters_few_frames():
    """Of Python, from the backward of one Linear to that of the next: 203 where nothing was prepared."""
    model = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(5)])
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-3)
    gradfold.fold(model, optimizer)
    x = torch.randn(4, 16)
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    loss, entered = model(x).sum(), []
    sys.setprofile(lambda frame, event, arg: entered.append(frame.f_code) if event == "call" else None)
    try:
        loss.backward()
    finally:
        sys.setprofile(None)
    apply = torch.autograd.function.BackwardCFunction.apply.__code__
    starts = [index for index, code in enumerate(entered) if code is apply]
    assert len(starts) == 5
    assert max(starts[2] - starts[1], starts[3] - starts[2]) <= 60
