"""Every rule, folded and not, on the same gradients as torch's optimizer of the same name (Lion: the oracle)."""

import functools

import numpy as np
import pytest
import torch

from tests import oracle
from tests.cases import (
    RULE_ROWS,
    SHAPES,
    Given,
    both_routes,
    each_rule,
    lion_rows,
    ours,
    problem,
    reference,
    torch_rules,
    torchs,
)
from tests.pairs import in_turn

EXACT = 1e-14  # relative to the largest value of the tensor
# Error of ours over error of torch's for-loop in the same dtype, both against the fp64 oracle. Issue 2 asks for 2 in
# float32. Measured: at most 1.04 in float32 and 1.06 in bfloat16, where most rules err only 0.4 to 0.9 times as much.
FACTOR = {torch.float32: 1.25, torch.bfloat16: 1.25}
FLAT = [(200,), (13, 16)]  # for those errors: one hooked, one folded


def assert_exact(got, want, what):
    got, want = torch.as_tensor(got).detach().double(), torch.as_tensor(want).detach().double()
    assert got.shape == want.shape, what
    if want.numel():
        error = (got - want).abs().max() / want.abs().max().clamp(min=1e-300)
        assert error <= EXACT, f"{what}: off by {error:.1e} of the largest value"


@torch_rules
@pytest.mark.parametrize("route", ["folded", pytest.param("unfolded", marks=pytest.mark.slow)])
def test_float64_equals_torch(row, route):
    given = problem()
    model, optimizer = ours(row, given, route)
    expected, theirs = reference(row)
    for shape, weight, want in zip(SHAPES, model.weights(), expected.weights(), strict=True):
        assert_exact(weight, want, f"weight {shape}")
        assert list(optimizer.state[weight]) == list(theirs.state[want]), shape
        for key, state in theirs.state[want].items():
            assert_exact(optimizer.state[weight][key], state, f"{key} {shape}")


@lion_rows
@both_routes
def test_float64_equals_the_oracle(row, route):
    given = problem()
    model, optimizer = ours(row, given, route)
    for index, weight in enumerate(model.weights()):
        want, states = oracle.run(
            row.name, row.plain(), given.weights[index].numpy(), [g[index].numpy() for g in given.grads]
        )
        assert_exact(weight, want, f"weight {SHAPES[index]}")
        for key, state in states.items():
            assert_exact(optimizer.state[weight][key], state, f"{key} {SHAPES[index]}")


def test_the_model_receives_exactly_the_gradients_it_is_given():
    """What the tests above rest on."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = problem(dtype=dtype, steps=1)
        model = Given(given.weights)
        model(given.grads[0]).backward()
        for weight, grad in zip(model.weights(), given.grads[0], strict=True):
            assert torch.equal(weight.grad, grad)


@in_turn(row=RULE_ROWS, dtype=FACTOR)
def test_low_precision_errs_no_more_than_torch(row, dtype):
    given = problem(FLAT, dtype)
    got, _ = ours(row, given, "folded")
    assert all(weight.dtype == dtype for weight in got.weights())
    exact, torchs_error = _reference(row.id, dtype)
    ratio = _distance(got.weights(), exact) / torchs_error
    assert ratio <= FACTOR[dtype], f"{ratio:.2f} times torch's error"


@each_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_folded_and_unfolded_take_the_same_step(row, dtype):
    """One code for both: the same numbers, bit for bit."""
    given = problem(dtype=dtype)
    (folded, one), (unfolded, other) = ours(row, given, "folded"), ours(row, given, "unfolded")
    for left, right in zip(folded.weights(), unfolded.weights(), strict=True):
        assert torch.equal(left, right)
        for key, state in one.state[left].items():
            assert torch.equal(state, other.state[right][key]), key


@functools.cache
def _reference(row_id, dtype):
    """The oracle's weights, and torch's error in this dtype; the same for both routes."""
    row = next(row for row in RULE_ROWS if row.id == row_id)
    given = problem(FLAT, dtype)
    exact = []
    for index, weight in enumerate(given.weights):
        grads = [grads[index].double().numpy() for grads in given.grads]
        exact.append(oracle.run(row.name, row.plain(), weight.double().numpy(), grads)[0])
    weights = _naive_lion(row, given) if row.name == "Lion" else torchs(row, given)[0].weights()
    return exact, _distance(weights, exact)


def _naive_lion(row, given):
    """Lion as a user of torch writes it down; every operation rounds to the weight's dtype."""
    h = oracle.RULES["Lion"][1] | row.plain()
    beta1, beta2 = h["betas"]
    weights = []
    for index, weight in enumerate(given.weights):
        w, m = weight.clone(), torch.zeros_like(weight)
        for grads in given.grads:
            g = -grads[index] if h["maximize"] else grads[index]
            w.mul_(1 - h["lr"] * h["weight_decay"]).add_((m * beta1 + g * (1 - beta1)).sign(), alpha=-h["lr"])
            m.mul_(beta2).add_(g, alpha=1 - beta2)
        weights.append(w)
    return weights


def _distance(weights, exact):
    return np.linalg.norm(np.concatenate([(w.detach().double().numpy() - e).ravel() for w, e in zip(weights, exact)]))
