"""Every way through every rule against the reference backend given the same gradient, bit for bit; then the oracle."""

import itertools

import numpy as np
import pytest
import torch

from gradfold.backends import DenseTerm, PendingSum, Reference, Scratch
from gradfold.backends.triton import Triton
from gradfold.engine import GroupStep, ParamStepper
from tests import oracle
from tests.backends.native.eager import (
    COMBINATIONS,
    STATES,
    WEIGHTS,
    case,
    clone,
    differences,
    forget_signs_of_nan,
    make_special,
    variants,
)
from tests.cases import BUSY, BUSY_ROWS, RuleRow

from .launches import compare, kernel, plain_zeros, reference

pytestmark = pytest.mark.usefixtures("quick_tiles")

# averages that lerp from their far end, which torch does where the new part weighs one half or more
FAR = [
    RuleRow("AdamW", {"betas": (0.5, 0.9)}),
    RuleRow("NAdam", {"betas": (0.3, 0.9)}),
    RuleRow("RAdam", {"betas": (0.3, 0.9)}),
    RuleRow("RMSprop", {"alpha": 0.3, "centered": True}),
]
WAYS = [*variants(), *FAR]
LAST = 12  # a step at which RAdam has changed over


def steps(row: RuleRow) -> list[int]:
    """Those that differ in more than their numbers: a lazy buffer is fresh at the first, RAdam changes over."""
    return [1, LAST] if row.hyper.get("momentum") or row.name == "RAdam" else [LAST]


@pytest.mark.parametrize("index, row", list(enumerate(WAYS)), ids=[row.id for row in WAYS])
def test_every_way_through_every_rule(index, row):
    """With storages in turn."""
    for step in steps(row):
        compare(case(row, *COMBINATIONS[(5 * index) % len(COMBINATIONS)], step=step), (5, 150), step=step)


@pytest.mark.oldest
@pytest.mark.parametrize("row", BUSY_ROWS, ids=lambda row: row.name)
def test_each_rule(row):
    """In the precision that shows every rounding."""
    compare(case(row, "fp32", "fp32", step=LAST), (5, 150))


@pytest.mark.slow
@pytest.mark.parametrize("row", WAYS, ids=lambda row: row.id)
@pytest.mark.parametrize("states", STATES)
def test_every_rule_with_every_storage(row, states):
    for weight, step in itertools.product(WEIGHTS, (1, LAST)):
        compare(case(row, weight, states, step=step), (5, 125), step=step)


SPECIAL_CASES = [(row, *COMBINATIONS[(2 + 5 * i) % len(COMBINATIONS)]) for i, row in enumerate(BUSY_ROWS)]
SUM = RuleRow("SGD", {"lr": 1.0, "maximize": True})  # weight plus gradient: past the ends of 16-bit formats
SPECIAL_CASES += [(SUM, weight, "fp32") for weight in ("bf16 stochastic", "fp16 stochastic", "split8 stochastic")]


@pytest.mark.parametrize("row, weight, states", SPECIAL_CASES, ids=lambda x: x.name if isinstance(x, RuleRow) else x)
def test_special_values(row, weight, states):
    """NaN, infinities, zeros and the ends of every format in weight, gradient and states."""
    given = case(row, weight, states, step=2)
    for seed in (2, 7):
        wanted, grad = make_special(given, (4, 140), seed)
        grad = plain_zeros(grad)
        got = clone(wanted)
        reference(given, wanted, grad)
        kernel(given, got, [DenseTerm(grad)])
        for parts in (wanted, got):
            forget_signs_of_nan(given, parts, 140)
        assert differences(wanted, got) == {}


def test_negative_zero():
    """A gradient of -0.0 that autograd wrote, in a buffer that begins as the gradient."""
    given = case(RuleRow("SGD", {"momentum": 0.9}), "fp32", "fp32", step=1)
    wanted = [{"values": torch.ones(1, 1)}, {"values": torch.ones(1, 1)}]
    got, grad = clone(wanted), torch.tensor([[-0.0]])
    reference(given, wanted, grad)
    kernel(given, got, [DenseTerm(grad)])
    assert differences(wanted, got) == {}


# Where neither weight nor states are coded the reference backend runs torch's own fused kernels, which round in other
# places: the truth is the judge there.


def trained(row: RuleRow, backend, weight: torch.Tensor, grads: list[torch.Tensor]):
    optimizer = row.ours([torch.nn.Parameter(weight.clone())])
    (group,) = optimizer.param_groups
    group |= {"states": None, "rounding": None, "small_size": 0}
    (param,) = group["params"]
    stepper = ParamStepper(param, optimizer, backend)
    for grad in grads:
        power = stepper.step([DenseTerm(grad)], GroupStep(group, optimizer.rule))
        assert isinstance(power, PendingSum) == isinstance(backend, Triton)
    return param.detach(), optimizer.state[param]


@pytest.mark.oldest
@pytest.mark.parametrize("row", BUSY_ROWS, ids=lambda row: row.name)
def test_stored_as_torch_does(row):
    """Four steps: no further from fp64 than one and a half times what torch's own kernels are, or two roundings."""
    shape = (3, 131)
    weight = torch.randn(shape)
    grads = [torch.randn(shape) * 10 ** -torch.randint(0, 3, shape).float() for _ in range(4)]
    exact, exact_states = oracle.run(
        row.name, row.plain(), weight.double().numpy(), [g.double().numpy() for g in grads]
    )
    got, states = trained(row, Triton(Scratch()), weight, grads)
    theirs, their_states = trained(row, Reference(Scratch()), weight, grads)
    pairs = [(exact, got, theirs)]
    pairs += [(truth, states[name], their_states[name]) for name, truth in exact_states.items() if name in states]
    assert len(pairs) > 1 or not states
    for truth, ours, other in pairs:
        if ours.dim():
            off, allowed = (oracle.relative_l2(x.double().numpy(), truth) for x in (ours, other))
            assert off <= max(1.5 * allowed, 2 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_stored_as_torch_does(dtype):
    """bf16 and fp16 weights whose states have their dtype: no further from the truth than torch's fused kernel."""
    shape = (3, 131)
    weight = torch.randn(shape).to(dtype)
    grads = [torch.randn(shape).to(dtype) for _ in range(4)]
    row = BUSY["AdamW"]
    exact, _ = oracle.run(row.name, row.plain(), weight.double().numpy(), [g.double().numpy() for g in grads])
    off, allowed = (
        oracle.relative_l2(trained(row, backend, weight, grads)[0].double().numpy(), exact)
        for backend in (Triton(Scratch()), Reference(Scratch()))
    )
    assert off <= 1.1 * allowed
