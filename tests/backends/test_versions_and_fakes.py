"""Every step is seen by autograd's version counters, and runs on fake tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import gradfold
from tests.cases import BUSY_ROWS, Given, both_routes, each_rule, problem
from tests.pairs import in_turn

LAYOUTS = {"contiguous": lambda x: x, "transposed": lambda x: x.t().contiguous().t()}


@each_rule
@both_routes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_step_bumps_the_weights_version(row, route, dtype, layout):
    given = problem([(4, 3), (5,), ()], dtype, steps=3)
    given.weights[0] = layout(given.weights[0])
    model = Given(given.weights)
    optimizer = row.ours(model.weights())
    if route == "folded":
        gradfold.fold(model, optimizer)
    for grads in given.grads:
        versions = [weight._version for weight in model.weights()]
        model(grads).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(weight._version > old for weight, old in zip(model.weights(), versions, strict=True))


@each_rule
@both_routes
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_a_graph_that_saved_the_old_weight_is_stale(row, route, kind):
    """torch's fused kernels do not count versions themselves: an old graph would use the new weight in silence."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4))
    optimizer = row.ours(model.parameters())
    if route == "folded":
        gradfold.fold(model, optimizer)
    read = model[0].weight if kind is nn.Embedding else model[1].weight
    old = (read * torch.ones_like(read, requires_grad=True)).sum()  # saves the weight
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


@each_rule
def test_a_folded_layers_old_graph_is_stale(row):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    optimizer = row.ours(model.parameters())
    gradfold.fold(model, optimizer)
    old, new = model(torch.ones(2, 3)).sum(), model(torch.ones(2, 3)).sum()
    new.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


class Net(nn.Module):
    """Every route: a lookup with padding, a product, a tied head, and hooked norms and convolutions."""

    def __init__(self, dtype):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=2, dtype=dtype)
        self.conv = nn.Conv2d(1, 2, 3, padding=1, dtype=dtype)
        self.norm = nn.LayerNorm(12, dtype=dtype)
        self.mix = nn.Linear(12, 6, dtype=dtype)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.head = nn.Linear(6, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)  # [B, T, 6]
        y = self.conv(x[:, None]).permute(0, 2, 1, 3).flatten(2)  # [B, T, 12]
        return (self.head(self.mix(self.norm(y)) * self.scale) ** 2).mean()


def a_few_steps(row, dtype):
    model = Net(dtype)
    optimizer = row.ours(model.parameters())
    fold = gradfold.fold(model, optimizer)
    for _ in range(2):
        loss = model(torch.zeros(2, 4, dtype=torch.long))
        loss.backward()
        assert all(param.grad is None for param in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, fold


@in_turn(row=BUSY_ROWS, dtype=[torch.float32, torch.bfloat16])
def test_a_folded_step_runs_on_fake_tensors(row, dtype):
    """What the planner counts must be what happens: same states, same scratch, no real memory."""
    real_model, real, real_fold = a_few_steps(row, dtype)
    with FakeTensorMode():
        model, optimizer, fold = a_few_steps(row, dtype)
    for param, real_param in zip(model.parameters(), real_model.parameters(), strict=True):
        assert isinstance(param, FakeTensor) and param._version > 0
        states, real_states = optimizer.state[param], real.state[real_param]
        assert states.keys() == real_states.keys()
        for key, state in states.items():
            assert isinstance(state, FakeTensor)
            assert (state.shape, state.dtype) == (real_states[key].shape, real_states[key].dtype), key
    fake_scratch, real_scratch = ([t.numel() for t in f.scratch_tensors()] for f in (fold, real_fold))
    assert fake_scratch == real_scratch
    assert all(isinstance(tensor, FakeTensor) for tensor in fold.scratch_tensors())


@each_rule
def test_an_unfolded_step_runs_on_fake_tensors(row):
    with FakeTensorMode():
        model = Net(torch.float32)
        optimizer = row.ours(model.parameters())
        model(torch.zeros(2, 4, dtype=torch.long)).backward()
        optimizer.step()
        assert all(isinstance(state, FakeTensor) for states in optimizer.state.values() for state in states.values())
