"""``gradfold.nn.GroupedLinear``: a Linear for each expert, plain and folded."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from tests.zoo import distance, no_gradients, ours, torchs

E, K, N = 4, 8, 12
COUNTS = [3, 0, 5, 2]


def by_hand(layer, x, counts):
    parts = x.split(counts)
    biases = [None] * E if layer.bias is None else layer.bias
    return torch.cat([F.linear(part, w, b) for part, w, b in zip(parts, layer.weight, biases, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_each_token_meets_its_expert(dtype, bias):
    torch.manual_seed(0)
    layer, counts = gradfold.nn.GroupedLinear(E, K, N, bias=bias, dtype=dtype), torch.tensor(COUNTS)
    x = torch.randn(10, K, dtype=dtype, requires_grad=True)
    want = by_hand(layer, x, COUNTS)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for got in (layer(x, counts=counts), layer(x, counts.cumsum(0)), layer(x, offsets=counts.cumsum(0).int())):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    grads = [torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (layer(x, counts=counts), want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=50 * tolerance)


def test_tokens_of_no_expert_become_zeros():
    for dtype in (torch.float64, torch.float32):
        layer = gradfold.nn.GroupedLinear(E, K, N, bias=True, dtype=dtype)
        y = layer(torch.randn(7, K, dtype=dtype), torch.tensor([1, 2, 2, 5]))
        assert y[:5].abs().min() > 0 and not y[5:].any()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "neither"),
        ({"offsets": torch.tensor([1, 2, 3, 4]), "counts": torch.tensor([1, 1, 1, 1])}, "both"),
        ({"counts": torch.tensor([1, 2, 3])}, r"counts of shape \(3,\).*4 integers"),
        ({"offsets": torch.tensor([1.0, 2, 3, 4])}, "offsets.*float32.*integers"),
    ],
)
def test_refusals(arguments, match):
    with pytest.raises(ValueError, match=match):
        gradfold.nn.GroupedLinear(E, K, N)(torch.randn(4, K), **arguments)


def test_a_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"x of shape \(4, 9\): give \[tokens, 8\]"):
        gradfold.nn.GroupedLinear(E, K, N)(torch.randn(4, 9), counts=torch.tensor([1, 1, 1, 1]))


class Net(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.up, self.down = (gradfold.nn.GroupedLinear(E, *sizes, bias=bias) for sizes in ((K, N), (N, K)))

    def forward(self, x, counts):
        return self.down(torch.tanh(self.up(x, counts=counts)), counts.cumsum(0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip_norm": 0.05}], ids=str)
def test_folded_steps_are_torchs(bias, options):
    torch.manual_seed(0)
    plain = Net(bias).double()
    folded = copy.deepcopy(plain)
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1], **options)
    assert {row.route for row in fold.report().rows if "weight" in row.name} == {"folded"}
    for step in range(5):
        counts = torch.tensor(COUNTS).roll(step)
        for i in range(options.get("accumulate", 1)):
            x = torch.randn(10, K, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + i))
            for model in (plain, folded):
                model(x, counts).square().mean().backward()
        assert no_gradients(folded)
        if "clip_norm" in options:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-12


def test_folded_in_fp32_by_grouped_mm():
    torch.manual_seed(0)
    plain = Net(False)
    folded = copy.deepcopy(plain)
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    for step in range(3):
        x = torch.randn(10, K, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            model(x, torch.tensor(COUNTS)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-6


def test_copies_are_plain():
    layer = gradfold.nn.GroupedLinear(E, K, N)
    fold = gradfold.fold(layer, ours(layer))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is gradfold.nn.GroupedLinear
    assert repr(layer) == "GroupedLinear(num_experts=4, in_features=8, out_features=12, bias=False)"
    fold.remove()
    assert type(layer) is gradfold.nn.GroupedLinear
