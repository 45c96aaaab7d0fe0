"""Gradients of experts' weights, a few rows at a time, against plain loops over each expert's own tokens."""

import math

import numpy as np
import pytest
import torch

import gradfold
from gradfold.backends import (
    UNCHANGED,
    BatchedTerm,
    Change,
    DenseTerm,
    GroupedTerm,
    PiecesTerm,
    Reference,
    Scratch,
    Stored,
    native,
    norms,
)
from gradfold.backends.compiled import CompiledStep
from tests import oracle
from tests.backends.test_terms import Capture, check, exactly, gradients, normal

KINDS = ["grouped", "tail", "batched", "pieces"]
SHAPES = [
    (4, 6, 5),
    (3, 1, 7),
    (5, 8, 1),
    (3, 4, 160),
    (1, 6, 5),
]  # of 128 columns on, rows of all experts are cut alike
COUNTS = {1: [6], 3: [3, 0, 2], 4: [0, 3, 0, 5], 5: [2, 0, 0, 1, 4]}  # tokens of each expert


def term_of(kind, shape, dtype=torch.float64):
    """A term, and each expert's left and right."""
    experts, rows, columns = shape
    counts = [3] * experts if kind == "batched" else COUNTS[experts]
    torch.manual_seed(0)
    pairs = [(normal(count, rows, dtype=dtype), normal(count, columns, dtype=dtype)) for count in counts]
    if kind == "batched":
        return BatchedTerm(torch.stack([left for left, _ in pairs]), torch.stack([right for _, right in pairs])), pairs
    if kind == "pieces":
        uses = [(e, left, right) for e, (left, right) in enumerate(pairs) if len(left)]
        made = PiecesTerm(experts, uses[:1], (rows, columns))
        for use in uses[1:]:
            assert made.absorb(PiecesTerm(experts, [use], (rows, columns)))
        return made, pairs
    left, right = torch.cat([left for left, _ in pairs]), torch.cat([right for _, right in pairs])
    if kind == "tail":  # tokens of no expert here, whose memory a kernel has not written
        left, right = (torch.cat([side, torch.full_like(side[:1], torch.nan)]) for side in (left, right))
    return GroupedTerm(left, right, torch.tensor(counts).cumsum(0).to(torch.int32)), pairs


def loops(pairs):
    return np.stack([oracle.linear_grad(exactly(left), exactly(right)) for left, right in pairs])


def sizes(pairs):
    return loops([(left.abs(), right.abs()) for left, right in pairs])


each_kind = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@each_kind
@each_shape
def test_a_gradient_is_each_experts_own(kind, shape):
    term, pairs = term_of(kind, shape)
    check([term], loops(pairs), sizes(pairs))


@pytest.mark.parametrize("others", [("pieces",), ("batched", "grouped"), ("dense",)], ids=str)
def test_terms_of_experts_add_up(others):
    shape = (4, 6, 5)
    term, pairs = term_of("grouped", shape)
    want, scale, terms = loops(pairs), sizes(pairs), [term]
    for kind in others:
        if kind == "dense":
            grad = normal(*shape)
            terms.append(DenseTerm(grad))
            want, scale = want + exactly(grad), scale + exactly(grad.abs())
        else:
            other, theirs = term_of(kind, shape)
            terms.append(other)
            want, scale = want + loops(theirs), scale + sizes(theirs)
    check(terms, want, scale)


@each_kind
@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 1, 3), (0, 2, 9), (1, 2, 5), (2, 1, 4)])
def test_a_slice_is_that_of_the_gradient(kind, dim, start, stop):
    term, pairs = term_of(kind, (4, 6, 5))
    cut = (slice(None),) * dim + (slice(start, stop),)
    check([term.narrow(dim, start, stop)], loops(pairs)[cut], sizes(pairs)[cut])


@each_kind
def test_a_slice_of_a_slice(kind):
    term, pairs = term_of(kind, (4, 6, 160))
    cut = term.narrow(0, 1, 4).narrow(1, 1, 6).narrow(0, 1, 3)
    check([cut], loops(pairs)[2:4, 1:6], sizes(pairs)[2:4, 1:6])


def test_a_slice_without_tokens_is_zero():
    term, _ = term_of("pieces", (4, 6, 5))
    for _, got in gradients((1, 6, 5), [term.narrow(0, 2, 3)]):
        assert not got.any()


@each_kind
def test_a_strided_view_of_the_weight_steps(kind):
    """A slice along the second dimension, as working sets may cut: its memory is not contiguous."""
    term, pairs = term_of(kind, (4, 6, 5))
    weight = torch.full((4, 6, 5), torch.nan, dtype=torch.float64)
    Reference(Scratch()).step(Stored.plain(weight[:, 2:5]), [], [term.narrow(1, 2, 5)], Capture(), {}, None)
    np.testing.assert_allclose(exactly(weight[:, 2:5]), loops(pairs)[:, 2:5], atol=1e-13)
    assert weight[:, :2].isnan().all() and weight[:, 5:].isnan().all()


@each_kind
def test_low_precision_is_summed_in_fp32(kind):
    term, pairs = term_of(kind, (4, 6, 160), torch.bfloat16)
    out = torch.empty(4, 6, 160)
    Reference(Scratch(2000)).gradient(out.bfloat16(), [term], out, add=False)
    wide = [(left.float(), right.float()) for left, right in pairs]
    np.testing.assert_allclose(exactly(out), loops(wide), atol=2e-2 * np.abs(sizes(wide)).max())


@each_kind
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 40, 160)], ids=str)  # by tiles; by Gram matrices
def test_norms(kind, norm_type, shape):
    term, pairs = term_of(kind, shape)
    weight = torch.empty(shape, dtype=torch.float64)
    assert (norms.products_for_gram([term], (0, 0)) is not None) == (shape[1] == 40)
    grad = torch.from_numpy(loops(pairs)).flatten()
    want = float(torch.linalg.vector_norm(grad, norm_type))
    got = Reference(Scratch(4000)).power(weight, [term], norm_type)
    assert got == pytest.approx(want if norm_type == math.inf else want**norm_type, rel=1e-12)


@each_kind
def test_a_bound_is_one(kind):
    term, pairs = term_of(kind, (4, 6, 5))
    assert np.abs(loops(pairs)).max() <= term.bound() < 1e6
    assert Reference(Scratch()).finite(torch.empty(4, 6, 5, dtype=torch.float64), [term])


@each_kind
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_found(kind, value):
    term, _ = term_of(kind, (4, 6, 5))
    term.tensors[0].view(-1)[-1 if kind == "pieces" else 7] = value
    assert not term.bound() < 1e300
    assert not Reference(Scratch()).finite(torch.empty(4, 6, 5, dtype=torch.float64), [term])


@each_kind
def test_copies_hold_the_same(kind):
    term, pairs = term_of(kind, (4, 6, 5))
    moved = term.map(torch.clone)
    assert all(a is not b for a, b in zip(term.tensors, moved.tensors, strict=True))
    check([moved], loops(pairs), sizes(pairs))
    before = term.tensors[0]
    term.detach_from({before.untyped_storage()._cdata, term.tensors[1].untyped_storage()._cdata})
    assert all(one is not before for one in term.tensors)
    check([term], loops(pairs), sizes(pairs))


def test_whose_memory_is_the_modules_input():
    for kind in KINDS:
        term, _ = term_of(kind, (4, 6, 5))
        sides = [tensor for tensor in term.tensors if tensor.is_floating_point()]
        assert {id(x) for x in term.inputs} == {id(x) for x in sides[1::2]}
        term.transposed = True
        assert {id(x) for x in term.inputs} == {id(x) for x in sides[::2]}


def test_pieces_of_another_kind_stay_apart():
    term, _ = term_of("pieces", (4, 6, 5))
    other, _ = term_of("pieces", (4, 6, 5))
    other.transposed = True
    assert not term.absorb(other) and not term.absorb(term_of("grouped", (4, 6, 5))[0])
    assert not DenseTerm(torch.ones(1)).absorb(term)


def test_a_bias_is_a_sum_over_each_experts_tokens():
    rows = normal(3, 5)
    term = PiecesTerm(4, [(1, torch.ones(2, 1).double(), rows[:2]), (3, torch.ones(1, 1).double(), rows[2:])], (1, 5))
    term.of_bias = True
    want = torch.zeros(4, 5, dtype=torch.float64)
    want[1], want[3] = rows[:2].sum(0), rows[2]
    check([term], want.numpy(), want.abs().numpy() + 1)
    check([term.narrow(1, 1, 4)], want[:, 1:4].numpy(), want.abs().numpy() + 1)
    check([term.narrow(0, 1, 4)], want[1:].numpy(), want.abs().numpy() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_experts_gradient_exists_whole(dtype):
    """Scratch memory is that of a Linear of as many rows, and not one row for each expert."""
    weight = torch.zeros(8, 256, 512, dtype=dtype)
    scratch = Scratch(2**18)
    Reference(scratch).prepare(Stored.plain(weight), [], Capture(), {})
    assert 0 < sum(tensor.nbytes for tensor in scratch.tensors()) <= 2**18


@each_kind
@pytest.mark.parametrize("change", [UNCHANGED, Change(scale=0.5, clip_value=0.7), Change(guarded=True)], ids=str)
@pytest.mark.parametrize("others", [0, 1], ids=["alone", "with a dense one"])
def test_a_compiled_step_takes_one_expert_after_the_other(kind, change, others, monkeypatch):
    """With the results of tiles; an expert without tokens steps, too."""
    shape = (4, 64, 128)
    term, _ = term_of(kind, shape, torch.float32)
    terms, weight = [term, *[DenseTerm(normal(*shape, dtype=torch.float32))][:others]], normal(*shape).float()
    optimizer, ran = gradfold.AdamW([torch.nn.Parameter(weight)], lr=1e-2), []
    rule, group = optimizer.rule, optimizer.param_groups[0]
    count = CompiledStep.step_experts
    monkeypatch.setattr(CompiledStep, "step_experts", lambda *args: ran.append(1) or count(*args))
    results = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(CompiledStep, "experts", lambda *args: None)
        values = [weight.clone(), torch.zeros(shape), torch.zeros(shape)]
        stored = [Stored.plain(one) for one in values]
        numbers = rule.advance({"step": torch.zeros(())}, group, True)
        power = Reference(Scratch()).step(stored[0], stored[1:], terms, rule, group, numbers, change)
        results.append((values, power))
    assert len(ran) == 1 or native.reason() is not None
    for one, other in zip(*(values for values, _ in results), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    assert (results[0][0][1][2] == 0).all() == (kind != "batched" and not others)  # the third expert had no token
    assert not torch.equal(results[0][0][0][2], weight[2])
