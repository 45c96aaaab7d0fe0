"""The oracle itself: against torch.optim where torch has the rule, by hand where it has not, and against autograd."""

import inspect
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gradfold
from tests import oracle
from tests.cases import MATMULS, NAMES, RULE_ROWS, problem, reference, torch_rules

EXACT = 1e-14  # relative to the largest value of the tensor


@torch_rules
def test_the_oracle_agrees_with_torch(row):
    given = problem()
    model, optimizer = reference(row)
    for index, weight in enumerate(model.weights()):
        want, states = oracle.run(
            row.name, row.plain(), given.weights[index].numpy(), [g[index].numpy() for g in given.grads]
        )
        np.testing.assert_allclose(
            weight.detach().numpy(), want, rtol=0, atol=EXACT * (1 + np.abs(want).max(initial=0))
        )
        for key, state in states.items():
            got = torch.as_tensor(optimizer.state[weight][key]).numpy()
            np.testing.assert_allclose(got, state, rtol=0, atol=EXACT * (1 + np.abs(state).max(initial=0)), err_msg=key)


def test_lion_by_hand():
    """Two steps of algorithm 2 worked out on paper: lr 0.1, betas (0.9, 0.99), weight decay 0.5."""
    hyper = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.5}
    weight, grads = np.array([2.0, -1.0, 4.0]), [np.array([3.0, -2.0, 0.0]), np.array([-0.1, 30.0, 0.0])]
    got, states = oracle.run("Lion", hyper, weight, grads)
    # step 1: signs +1 -1 0;  w = 0.95 w - 0.1 sign = 1.8, -0.85, 3.8;  m = 0.01 g = 0.03, -0.02, 0
    # step 2: c = 0.9 m + 0.1 g = 0.017, 2.982, 0: signs +1 +1 0;  w = 0.95 w - 0.1 sign
    np.testing.assert_allclose(got, [1.61, -0.9075, 3.61], rtol=1e-15)
    np.testing.assert_allclose(states["exp_avg"], [0.99 * 0.03 - 0.001, 0.99 * -0.02 + 0.3, 0.0], rtol=1e-15)


def test_the_oracle_imports_nothing_of_gradfold():
    source = inspect.getsource(sys.modules["tests.oracle"])
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert not [line for line in imports if "gradfold" in line or "torch" in line]


@pytest.mark.parametrize("name", NAMES)
def test_rows_try_every_hyperparameter(name):
    arguments = set(inspect.signature(getattr(gradfold, name).__init__).parameters) - {"self", "params", "storage"}
    tried = {key for row in RULE_ROWS if row.name == name for key in row.hyper}
    assert tried == arguments
    assert any(isinstance(row.hyper.get("lr"), tuple) for row in RULE_ROWS if row.name == name), (
        "no row with a tensor lr"
    )


def test_every_optimizer_has_rows():
    public = {name for name in gradfold.__all__ if inspect.isclass(getattr(gradfold, name))}
    optimizers = {name for name in public if issubclass(getattr(gradfold, name), torch.optim.Optimizer)}
    # these look at whole gradients or have two weights, and have tests of their own
    assert optimizers == {*NAMES, "Adafactor", "AdamMini", "AdamWScheduleFree", "LAMB", "LARS", "Muon"}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Lion"])
def test_the_oracles_defaults_are_torchs_and_ours(name):
    """Names and values."""
    defaults = oracle.RULES[name][1]
    for module in (gradfold, torch.optim):
        theirs = getattr(module, name)([torch.nn.Parameter(torch.zeros(1))]).defaults
        assert {key: theirs[key] for key in defaults} == defaults


@pytest.mark.parametrize("shape", MATMULS, ids=str)
def test_matmul_gradients_agree_with_autograd(shape):
    T, N, K = shape
    X, dY = torch.randn(T, K, dtype=torch.float64), torch.randn(T, N, dtype=torch.float64)
    W = torch.randn(N, K, dtype=torch.float64, requires_grad=True)
    F.linear(X, W).backward(dY)
    bound = 1e-14 * (1 + (dY.abs().t() @ X.abs()).norm())
    assert np.linalg.norm(oracle.linear_grad(dY.numpy(), X.numpy()) - W.grad.numpy()) <= bound
    V = W.detach().t().clone().requires_grad_()
    (X @ V).backward(dY)
    assert np.linalg.norm(oracle.conv1d_grad(dY.numpy(), X.numpy()) - V.grad.numpy()) <= bound


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding_gradients_agree_with_autograd(padding_idx):
    ids = torch.tensor([[3, 1, 3], [0, 3, 1]])
    dY = torch.randn(2, 3, 4, dtype=torch.float64)
    W = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    F.embedding(ids, W, padding_idx=padding_idx).backward(dY)
    got = oracle.embedding_grad(ids.numpy(), dY.reshape(-1, 4).numpy(), 6, padding_idx)
    np.testing.assert_allclose(got, W.grad.numpy(), rtol=0, atol=1e-15)
