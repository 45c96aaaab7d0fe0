"""A rule does not care how its weight is cut, laid out or computed: fused or plain, in any tiles, with any strides."""

import pytest
import torch

import gradfold
from gradfold.backends import DenseTerm, Reference, Scratch, Stored
from gradfold.rules import Rule
from tests.cases import BUSY, BUSY_ROWS, all_rules, each_rule, problem
from tests.pairs import each_pair

FUSED = [row for row in BUSY_ROWS if type(getattr(gradfold, row.name).rule).fused is not Rule.fused]
PLAIN = [row for row in BUSY_ROWS if row not in FUSED]
fused_rules = pytest.mark.parametrize("row", FUSED, ids=lambda row: row.name)
# of the largest value: a kernel's vector body and its scalar tail may round differently, and where tiles end decides
# which one an element meets
KERNELS_ROUNDING = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 1e-2}
SCRATCH_BYTES = [1, 1000, 4096, 2**23]  # one row at a time ... everything at once


def run(row, weight, grads, scratch_bytes=2**23, change=lambda tensor: tensor, plain=False, dtype=None):
    """Weight and states after these gradients, straight through the backend, with NaN in its scratch."""
    rule = type(getattr(gradfold, row.name).rule)()
    if plain:
        rule.fuses = lambda weight: False
    weight = torch.nn.Parameter(change(weight.clone()))
    optimizer = row.ours([weight])
    optimizer.rule, optimizer._backend = rule, Reference(Scratch(scratch_bytes))
    for grad in grads:
        weight.grad = grad.clone()
        kept = weight.grad
        optimizer.step()
        assert torch.equal(weight.grad, grad) and weight.grad is kept, "the caller's .grad is not ours to change"
    return {"weight": weight.detach(), **optimizer.state[weight]}


def assert_same(got, want, tolerance=0.0):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype and got[key].isfinite().all(), key
        error = (got[key].double() - want[key].double()).abs().max()
        assert error <= tolerance * want[key].double().abs().max(), f"{key}: off by {error:.1e}"


def one(shape, dtype=torch.float64, steps=7):
    given = problem([shape], dtype, steps)
    return given.weights[0], [grads[0] for grads in given.grads]


@all_rules
def test_the_fused_kernel_and_the_formula_agree(row):
    weight, grads = one((21, 13))
    assert_same(run(row, weight, grads), run(row, weight, grads, plain=True), 1e-14)


@fused_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_kernel_and_the_formula_agree_in_low_precision(row, dtype):
    weight, grads = one((21, 13), dtype)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert_same(run(row, weight, grads), run(row, weight, grads, plain=True), tolerance)


@pytest.mark.parametrize("row", [BUSY["AdamW"], BUSY["Adam"], BUSY["SGD"], BUSY["Adagrad"]], ids=lambda row: row.name)
def test_torchs_fused_kernels_are_used(row):
    assert row in FUSED


@each_pair(
    row=BUSY_ROWS,
    dtype=[torch.float64, torch.float32, torch.bfloat16],
    shape=[(37, 11), (64, 16), (101,), (5, 3, 2, 2)],
)
def test_plain_path_is_the_same_bit_for_bit_in_any_tiles(row, dtype, shape):
    weight, grads = one(shape, dtype, steps=3)
    whole = run(row, weight, grads, plain=True)
    for scratch_bytes in SCRATCH_BYTES:
        assert_same(run(row, weight, grads, scratch_bytes, plain=True), whole)


@fused_rules
@pytest.mark.parametrize("dtype", KERNELS_ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(37, 11), (64, 16), (101,)], ids=str)
def test_fused_path_is_the_same_in_any_tiles(row, dtype, shape):
    weight, grads = one(shape, dtype, steps=3)
    # strided gradients, so that the fused path tiles; a contiguous one it takes whole
    strided = [torch.stack([grad, grad], -1)[..., 0] for grad in grads]
    whole = run(row, weight, grads)
    for scratch_bytes in SCRATCH_BYTES:
        assert_same(run(row, weight, strided, scratch_bytes), whole, KERNELS_ROUNDING[dtype])


def transposed(tensor):
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


def strided(tensor):
    wide = torch.full((*tensor.shape, 3), float("nan"), dtype=tensor.dtype)
    wide[..., 1] = tensor
    return wide[..., 1]


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


LAYOUTS = [(transposed, (21, 13)), (strided, (21, 13)), (strided, (17,)), (strided, ()), (channels_last, (5, 3, 2, 4))]


@each_rule
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("scratch_bytes", [1, 2**23])
def test_layout_changes_nothing(row, layout, shape, scratch_bytes):
    weight, grads = one(shape, steps=3)
    got = run(row, weight, grads, scratch_bytes, layout)
    assert_same(got, run(row, weight, grads, plain=True))
    assert got["weight"].stride() == layout(weight).stride()


@each_rule
def test_an_expanded_weight_is_refused_as_torch_refuses_it(row):
    """Its elements share memory, so no in-place update of it means anything."""
    weight = torch.randn(3, 1).expand(3, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        run(row, weight, [torch.ones(3, 4)], change=lambda _: weight)


@each_rule
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
def test_an_empty_weight_counts_its_steps(row, shape):
    state = run(row, torch.zeros(shape), [torch.zeros(shape)] * 3)
    assert "step" not in state or state["step"] == 3


@each_rule
def test_float32_states_of_a_bfloat16_weight_stay_float32(row):
    """The mixed case goes through fp32 copies of the weight alone: states as exact as fp32's, weights rounded once."""
    weight, grads = one((21, 13), torch.bfloat16, steps=1)
    optimizer = row.ours([torch.nn.Parameter(weight.clone())])
    specs = optimizer.rule.states(optimizer.param_groups[0])
    param = optimizer.param_groups[0]["params"][0]
    states = {spec.name: torch.full(weight.shape, spec.init, dtype=torch.float32) for spec in specs}
    wide = {name: state.clone() for name, state in states.items()}
    wide_weight = weight.float()
    for target, tensors, grad in ((param.detach(), states, grads[0]), (wide_weight, wide, grads[0].float())):
        counters = {name: torch.tensor(start) for name, start in optimizer.rule.counters.items()}
        numbers = optimizer.rule.advance(counters, optimizer.param_groups[0], True)
        backend = Reference(Scratch(2**20))
        backend.step(
            Stored.plain(target),
            [Stored.plain(tensor) for tensor in tensors.values()],
            [DenseTerm(grad)],
            optimizer.rule,
            optimizer.param_groups[0],
            numbers,
        )
    for name, state in states.items():
        assert state.dtype == torch.float32
        torch.testing.assert_close(state, wide[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(param.detach(), wide_weight.bfloat16(), rtol=2**-8, atol=1e-6)
    assert (param.detach() == wide_weight.bfloat16()).float().mean() > 0.98
