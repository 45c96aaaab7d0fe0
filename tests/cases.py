"""The tables: rules with their hyper-parameters, shapes, and a model whose gradients are given.

To add a rule: its function in oracle.py, its rows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import gradfold


class RuleRow(NamedTuple):
    """One optimizer with hyper-parameters, by the name it has in gradfold and in torch.optim."""

    name: str
    hyper: dict[str, Any]

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.hyper.items())]).replace(" ", "")

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments; ``("tensor", x)`` becomes a new float64 tensor each time."""
        return {key: _fresh(value) for key, value in self.hyper.items()}

    def plain(self) -> dict[str, Any]:
        """The same with tensors as plain numbers, for the oracle."""
        return {key: _plain(value) for key, value in self.hyper.items()}

    def ours(self, params: Any) -> gradfold.optim.RuleOptimizer:
        return getattr(gradfold, self.name)(params, **self.arguments())

    def torchs(self, params: Any) -> torch.optim.Optimizer:
        """torch's for-loop implementation."""
        return getattr(torch.optim, self.name)(params, foreach=False, **self.arguments())


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and value[0] == "tensor":
        return value[1]
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _fresh(value: Any) -> Any:
    if isinstance(value, tuple) and value[0] == "tensor":
        return torch.tensor(value[1], dtype=torch.float64)
    return tuple(map(_fresh, value)) if isinstance(value, tuple) else value


def _rows(name: str, *hypers: dict[str, Any]) -> list[RuleRow]:
    return [RuleRow(name, hyper) for hyper in hypers]


TENSOR_LR = {"lr": ("tensor", 0.02)}
ALL = {"lr": 0.05, "weight_decay": 0.1, "maximize": True}  # with every other option of the rule on
RULE_ROWS: list[RuleRow] = [
    *_rows(
        "AdamW",
        {},
        {"lr": 0.05, "betas": (0.7, 0.95)},
        {"betas": (0.0, 0.9)},
        {"lr": 0.05, "eps": 1e-2},
        {"lr": 0.05, "weight_decay": 0.5},
        {"lr": 0.05, "weight_decay": 0.0},
        {"lr": 0.05, "amsgrad": True, "betas": (0.9, 0.5)},
        {"lr": 0.05, "maximize": True},
        {**ALL, "amsgrad": True},
        TENSOR_LR,
        {**TENSOR_LR, "betas": (("tensor", 0.8), ("tensor", 0.9))},
    ),
    *_rows(
        "Adam",
        {},
        {"lr": 0.05, "weight_decay": 0.1},
        {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.05, "amsgrad": True, "betas": (0.9, 0.5), "eps": 1e-4},
        {**ALL, "amsgrad": True},
        {**TENSOR_LR, "weight_decay": 0.1},
    ),
    *_rows(
        "SGD",
        {},
        {"lr": 0.05},
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.05, "dampening": 0.5},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True},
        {"lr": 0.05, "weight_decay": 0.1},
        {"lr": 0.05, "maximize": True},
        {**ALL, "momentum": 0.8, "dampening": 0.3},
        {**ALL, "momentum": 0.8, "nesterov": True},
        {**TENSOR_LR, "momentum": 0.9},
    ),
    *_rows(
        "Lion",
        {},
        {"lr": 0.01, "betas": (0.5, 0.8)},
        {"lr": 0.01, "weight_decay": 0.5},
        {"lr": 0.01, "maximize": True},
        ALL,
        {**TENSOR_LR, "weight_decay": 0.1},
    ),
    *_rows(
        "RMSprop",
        {},
        {"lr": 0.05, "alpha": 0.8},
        {"lr": 0.05, "eps": 1e-2},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"centered": True},
        {"momentum": 0.9, "centered": True},
        {"maximize": True},
        {**ALL, "momentum": 0.9, "centered": True},
        TENSOR_LR,
    ),
    *_rows(
        "Adagrad",
        {},
        {"lr": 0.1, "lr_decay": 0.2},
        {"weight_decay": 0.1},
        {"initial_accumulator_value": 0.5},
        {"eps": 1e-2},
        {"maximize": True},
        {**ALL, "lr_decay": 0.1, "initial_accumulator_value": 0.1},
        TENSOR_LR,
    ),
    *_rows(
        "NAdam",
        {},
        {"lr": 0.05, "betas": (0.7, 0.95)},
        {"lr": 0.05, "eps": 1e-2},
        {"lr": 0.05, "momentum_decay": 0.3},
        {"lr": 0.05, "weight_decay": 0.1},
        {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {**ALL, "decoupled_weight_decay": True},
        TENSOR_LR,
    ),
    *_rows(
        "RAdam",  # its two branches change over at the sixth step or later
        {},
        {"lr": 0.05, "betas": (0.7, 0.95)},
        {"lr": 0.05, "eps": 1e-2},
        {"lr": 0.05, "weight_decay": 0.1},
        {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
        ALL,
        TENSOR_LR,
    ),
    *_rows(
        "Adadelta",
        {},
        {"lr": 0.5, "rho": 0.6},
        {"eps": 1e-2, "weight_decay": 0.1},
        {**ALL, "rho": 0.8},
        TENSOR_LR,
    ),
    *_rows(
        "Adamax",
        {},
        {"lr": 0.05, "betas": (0.3, 0.5)},
        {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1},
        ALL,
        TENSOR_LR,
    ),
    *_rows(
        "ASGD",
        {},
        {"lr": 0.05, "lambd": 0.1, "alpha": 0.5},
        {"lr": 0.05, "t0": 2.0},
        {**ALL, "t0": 3, "lambd": 0.2},
        TENSOR_LR,
    ),
    *_rows(
        "Rprop",
        {},
        {"lr": 0.1, "etas": (0.3, 1.7)},
        {"lr": 0.1, "step_sizes": (0.09, 0.11)},
        {"lr": 0.1, "maximize": True},
        TENSOR_LR,
    ),
]
RULE_IDS = [row.id for row in RULE_ROWS]
NAMES = list(dict.fromkeys(row.name for row in RULE_ROWS))
# one busy row per rule, for tests whose subject is not the rule
BUSY: dict[str, RuleRow] = {
    row.name: row
    for row in [
        RuleRow("AdamW", {"lr": 0.05, "weight_decay": 0.1}),
        RuleRow("Adam", {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True}),
        RuleRow("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        RuleRow("Lion", {"lr": 0.05, "weight_decay": 0.1}),
        RuleRow("RMSprop", {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "centered": True}),
        RuleRow("Adagrad", {"lr": 0.05, "weight_decay": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
        RuleRow("NAdam", {"lr": 0.05, "weight_decay": 0.1}),
        RuleRow("RAdam", {"lr": 0.05, "weight_decay": 0.1, "betas": (0.9, 0.95)}),
        RuleRow("Adadelta", {"lr": 0.5, "weight_decay": 0.1}),
        RuleRow("Adamax", {"lr": 0.05, "weight_decay": 0.1}),
        RuleRow("ASGD", {"lr": 0.05, "weight_decay": 0.1, "t0": 2.0, "lambd": 0.1}),
        RuleRow("Rprop", {"lr": 0.05}),
    ]
}
BUSY_ROWS = list(BUSY.values())


def _kind(row: RuleRow) -> tuple:
    return row.name, *(bool(row.hyper.get(key)) for key in ("amsgrad", "momentum", "centered"))


# one row for each set of states that an optimizer can keep
STATE_ROWS: list[RuleRow] = list({_kind(row): row for row in [*RULE_ROWS, *BUSY_ROWS]}.values())

all_rules = pytest.mark.parametrize("row", RULE_ROWS, ids=RULE_IDS)
torch_rules = pytest.mark.parametrize(
    "row", [row for row in RULE_ROWS if row.name != "Lion"], ids=[i for i in RULE_IDS if not i.startswith("Lion")]
)
lion_rows = pytest.mark.parametrize("row", [row for row in RULE_ROWS if row.name == "Lion"], ids=lambda row: row.id)
each_rule = pytest.mark.parametrize("row", BUSY_ROWS, ids=list(BUSY))
each_state_set = pytest.mark.parametrize("row", STATE_ROWS, ids=lambda row: row.id)
each_torch_state_set = pytest.mark.parametrize(
    "row", [row for row in STATE_ROWS if row.name != "Lion"], ids=lambda row: row.id
)
each_torch_rule = pytest.mark.parametrize(
    "row", [row for row in BUSY_ROWS if row.name != "Lion"], ids=[name for name in BUSY if name != "Lion"]
)

# 0-D, 1-D, empty, odd, round, a convolution's 4-D
SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (0,), (3, 0), (1, 5), (5, 1), (8, 8), (7, 13), (2, 3, 2, 2)]
# (T, N, K) of a matrix product: odd (252 x 507 x 123, scaled), round, one token, no token, one row, one column
MATMULS: list[tuple[int, int, int]] = [
    (31, 63, 27),
    (32, 64, 16),
    (1, 9, 5),
    (0, 6, 4),
    (5, 1, 7),
    (5, 7, 1),
    (1, 1, 1),
]


class Given(nn.Module):
    """A model whose weights receive exactly the gradients it is given, whatever route computes them.

    Matrices are Linears applied to the identity, so that ``dY.T @ X`` is a sum of zeros and one summand.
    """

    def __init__(self, weights: Sequence[Tensor]):
        super().__init__()
        self.order: list[str] = []
        for index, weight in enumerate(weights):
            if weight.dim() == 2 and weight.numel():
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(weight.clone())
                self.add_module(f"linear{index}", linear)
                self.order.append(f"linear{index}.weight")
            else:
                self.register_parameter(f"free{index}", nn.Parameter(weight.clone()))
                self.order.append(f"free{index}")

    def weights(self) -> list[nn.Parameter]:
        return [self.get_parameter(name) for name in self.order]

    def forward(self, grads: Sequence[Tensor]) -> Tensor:
        loss = grads[0].new_zeros(())
        for name, grad in zip(self.order, grads, strict=True):
            if name.startswith("linear"):
                linear = self.get_submodule(name.removesuffix(".weight"))
                eye = torch.eye(grad.shape[1], dtype=grad.dtype)
                loss = loss + (linear(eye) * grad.t()).sum()
            else:
                loss = loss + (self.get_parameter(name) * grad).sum()
        return loss


class Problem(NamedTuple):
    """Weights, and for every step a gradient for each of them."""

    weights: list[Tensor]
    grads: list[list[Tensor]]  # [step][weight]


def problem(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype=torch.float64, steps: int = 7, seed: int = 0) -> Problem:
    """Gradients of scales from 1e-3 to 10, some of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def grad(shape):
        scale = 10 ** (4 * torch.rand(shape, generator=generator, dtype=torch.float64) - 3)
        return normal(shape) * scale * (torch.rand(shape, generator=generator) > 0.1)

    weights = [normal(shape).to(dtype) for shape in shapes]
    return Problem(weights, [[grad(shape).to(dtype) for shape in shapes] for _ in range(steps)])


def with_states(optimizer):
    """torch 2.11's Adagrad makes states only when it is made; here are those of parameters that have come without."""
    if type(optimizer) is torch.optim.Adagrad:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if not optimizer.state[param]:
                    start = torch.full_like(param, group["initial_accumulator_value"])
                    optimizer.state[param] = {"step": torch.tensor(0.0), "sum": start}
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any], scheduler: Any = None) -> None:
    """The loop of a user."""
    for batch in batches:
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def ours(row: RuleRow, given: Problem, route: str, **options: Any) -> tuple[Given, gradfold.optim.RuleOptimizer]:
    """gradfold's optimizer on these gradients, ``folded`` or ``unfolded``."""
    model = Given(given.weights)
    optimizer = row.ours(model.weights())
    if route == "folded":
        gradfold.fold(model, optimizer, **options)
    train(model, optimizer, given.grads)
    return model, optimizer


def torchs(row: RuleRow, given: Problem) -> tuple[Given, torch.optim.Optimizer]:
    """torch's optimizer on the same gradients."""
    model = Given(given.weights)
    optimizer = row.torchs(model.weights())
    train(model, optimizer, given.grads)
    return model, optimizer


_references: dict[str, tuple[Given, torch.optim.Optimizer]] = {}


def reference(row: RuleRow) -> tuple[Given, torch.optim.Optimizer]:
    """torch's result of the default problem, made once per row; look, do not touch."""
    if row.id not in _references:
        _references[row.id] = torchs(row, problem())
    return _references[row.id]


both_routes = pytest.mark.parametrize("route", ["folded", "unfolded"])
