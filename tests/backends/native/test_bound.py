"""Bound kernels: products, dense gradients and their norm, stepped in one pass; what moves, and what does not."""

import itertools

import pytest
import torch

from gradfold.backends import native
from gradfold.backends.native import threads as over
from tests.cases import BUSY, BUSY_ROWS, RuleRow

from .eager import Case, ExactSqrt, case, clone, differences, eager, make, native_step, tile_of

SHAPES = [(252, 507, 123), (64, 256, 64), (1, 1, 1), (13, 128, 257), (7, 17, 600), (6, 16, 1)]  # rows, columns, tokens
CODECS = [
    ("fp32", "fp32"),
    ("bf16", "bf16"),
    ("fp32", "int8"),
    ("bf16 stochastic", "int4"),
    ("split8 stochastic", "int8"),
    ("split16", "fp32"),
]
each_codec = pytest.mark.parametrize("weight, states", CODECS)


def bind(given: Case, parts, shape, **options) -> native.Bound:
    bound = native.bind(given.rule, given.numbers, given.codecs, parts, given.streams(), shape, **options)
    assert bound is not None, native.reason()
    return bound


def operands(rows: int, columns: int, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(tokens, rows, generator=generator), torch.randn(tokens, columns, generator=generator)
    return (left * 1e-2).to(dtype), right.to(dtype)


def oracle(products, grad=None) -> torch.Tensor:
    """The gradient in fp64, one token after the other."""
    rows, columns = (products[0][0].shape[1], products[0][1].shape[1]) if products else grad.shape
    total = torch.zeros(rows, columns, dtype=torch.float64) if grad is None else grad.double()
    for left, right in products:
        for token in range(left.shape[0]):
            total = total + left[token].double()[:, None] * right[token].double()[None, :]
    return total


# SGD at lr 1 that maximizes, on a weight of zeros: the weight is the gradient it has seen.
ECHO = RuleRow("SGD", {"lr": 1.0, "maximize": True})


def seen(products=(), grad=None, *, shape, **options) -> tuple[torch.Tensor, float]:
    weight = torch.zeros(shape)
    bound = bind(case(ECHO), [{"values": weight}], shape)
    return weight, bound(case(ECHO).numbers, products, grad, **options)


@pytest.mark.parametrize("rows, columns, tokens", SHAPES)
def test_products(rows, columns, tokens):
    """At most twice as far from fp64 as torch's own product, or a few roundings of the largest sum."""
    left, right = operands(rows, columns, tokens)
    wanted = oracle([(left, right)])
    got, squares = seen([(left, right)], shape=(rows, columns))
    torchs = (left.t() @ right - wanted).abs().max()
    magnitudes = left.abs().double().t() @ right.abs().double()
    assert (got - wanted).abs().max() <= max(2 * torchs, 4e-7 * magnitudes.max())
    assert squares == pytest.approx(wanted.square().sum().item(), rel=1e-5)


def test_several_terms():
    shape = (37, 203)
    products = [operands(*shape, tokens, seed=tokens) for tokens in (5, 0, 300)]
    grad = torch.randn(shape)
    wanted = oracle(products, grad)
    got, squares = seen(products, grad, shape=shape)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert squares == pytest.approx(wanted.square().sum().item(), rel=1e-5)


def test_no_tokens():
    got, squares = seen([operands(9, 140, 0)], shape=(9, 140))
    assert squares == 0 and not got.any()
    got, squares = seen(shape=(9, 140))
    assert squares == 0 and not got.any(), "no terms at all"


@pytest.mark.parametrize("draw", [0, 1, 2**31 - 1, 2**31, 2**32 + 5, -3])
def test_keys_of_a_draw(draw):
    """Made in C, as codecs make them."""
    given, shape = case(BUSY["AdamW"], "bf16 stochastic", "int8"), (3, 20)
    parts, _ = make(given, shape)
    bound = bind(given, parts, shape)
    bound(given.numbers, draw=draw)
    streams = [stream for stream in given.streams(draw) if stream is not None]
    assert len(streams) == 2
    assert bound._keys.tolist() == [streams[0].key()[0].item(), *(stream.key()[1].item() for stream in streams)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_terms_are_widened(dtype):
    left, right = operands(20, 150, 40, dtype)
    grad = torch.randn(20, 150).to(dtype)
    special = torch.tensor([0.0, -0.0, 6e-8, -6e-5, 65504.0]).to(dtype)
    grad[0, :5], grad[-1, -5:] = special, special
    got, squares = seen([(left, right)], grad, shape=(20, 150))
    wide, same = seen([(left.float(), right.float())], grad.float(), shape=(20, 150))
    assert torch.equal(got, wide) and squares == same
    assert torch.equal(seen(grad=grad, shape=(20, 150))[0], grad.float())


def test_operands_that_are_slices():
    left, right = operands(60, 300, 50)
    wanted, _ = seen([(left[::2, 7:40].contiguous(), right[::2, 100:260].contiguous())], shape=(33, 160))
    got, _ = seen([(left[::2, 7:40], right[::2, 100:260])], shape=(33, 160))
    assert torch.equal(got, wanted)
    grad = torch.randn(66, 300)
    assert torch.equal(seen(grad=grad[::2, 100:260], shape=(33, 160))[0], grad[::2, 100:260])


@pytest.mark.parametrize("scale, clip_value", [(0.3, None), (1.0, 0.02), (0.3, 0.005)])
def test_changes(scale, clip_value):
    """As torch multiplies and clamps; the norm is that of before."""
    left, right = operands(20, 300, 30)
    plain, before = seen([(left, right)], shape=(20, 300))
    wanted = plain * scale if clip_value is None else (plain * scale).clamp(-clip_value, clip_value)
    got, squares = seen([(left, right)], shape=(20, 300), scale=scale, clip_value=clip_value)
    assert torch.equal(got, wanted) and squares == before
    grad = plain.clone()
    got, squares = seen(grad=grad, shape=(20, 300), scale=scale, clip_value=clip_value)
    assert torch.equal(got, wanted) and torch.equal(grad, plain), "the gradient is only read"


@each_codec
@pytest.mark.parametrize("shape", [(25, 507), (12, 128), (1, 1), (40, 3)])
def test_the_step_of_a_kernel(weight, states, shape):
    """Bit for bit what ``Kernel`` and the eager chain make of the same gradient; another step, other bits."""
    given = case(BUSY["AdamW"], weight, states, step=3)
    parts, grad = make(given, shape)
    once, got, other = clone(parts), clone(parts), clone(parts)
    with ExactSqrt():
        eager(given, parts, grad, first_offset=5, step=9)
    native_step(given, once, grad, first_offset=5, step=9)
    bound = bind(given, got, shape, first_offset=5)
    assert bound(given.numbers, grad=grad, draw=9) == pytest.approx(grad.double().square().sum().item())
    assert differences(parts, got) == {} and differences(parts, once) == {}
    bind(given, other, shape, first_offset=5)(given.numbers, grad=grad, draw=8)
    assert not any(given.stochastic) or shape == (1, 1) or differences(parts, other)


@pytest.mark.parametrize("row", BUSY_ROWS, ids=lambda row: row.name)
def test_every_rule_steps_from_products(row):
    given, shape = case(row, step=3), (30, 200)
    parts, _ = make(given, shape)
    left, right = operands(*shape, 70)
    grad, _ = seen([(left, right)], shape=shape)
    got = clone(parts)
    native_step(given, parts, grad)
    bind(given, got, shape)(given.numbers, [(left, right)], draw=1)
    assert differences(parts, got) == {}


@each_codec
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_rows_at_a_time(weight, states, rows):
    given, shape = case(BUSY["AdamW"], weight, states), (31, 700)
    parts, grad = make(given, shape)
    left, right = operands(*shape, 40)
    got = clone(parts)
    bind(given, parts, shape)(given.numbers, [(left, right)], grad, draw=1)
    bound = bind(given, got, shape)
    for start in range(0, 31, rows):
        stop = min(start + rows, 31)
        bound(given.numbers, [(left[:, start:stop], right)], grad[start:stop], draw=1, start=start, stop=stop)
    assert differences(parts, got) == {}


@each_codec
@pytest.mark.parametrize("rows, threads", [(31, 2), (31, 5), (1, 3), (2, 7)])
def test_threads(weight, states, rows, threads, monkeypatch):
    given, shape = case(BUSY["AdamW"], weight, states), (rows, 700)
    parts, grad = make(given, shape)
    left, right = operands(*shape, 40)
    got = clone(parts)
    alone = bind(given, parts, shape)(given.numbers, [(left, right)], grad, scale=0.5, draw=1)
    monkeypatch.setattr(over, "THREAD_WORK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    together = bind(given, got, shape)(given.numbers, [(left, right)], grad, scale=0.5, draw=1)
    assert differences(parts, got) == {}
    assert together == pytest.approx(alone, rel=1e-13)


@pytest.mark.parametrize("cuts", [(0, 128, 700), (0, 384, 640, 700)])
def test_a_slice_of_a_parameter(cuts):
    """Of rows and of columns: its elements draw the bits of their place."""
    given, shape = case(BUSY["AdamW"], "bf16 stochastic", "int8"), (20, 700)
    parts, _ = make(given, shape)
    left, right = operands(*shape, 40)
    got = clone(parts)
    bind(given, parts, shape)(given.numbers, [(left, right)], draw=1)
    for rows, (start, stop) in itertools.product((slice(0, 9), slice(9, 20)), itertools.pairwise(cuts)):
        tile = tile_of(got, given, 700, rows, slice(start, stop))
        place = dict(first_offset=rows.start * 700 + start, row_stride=700)
        bound = bind(given, tile, (rows.stop - rows.start, stop - start), **place)
        bound(given.numbers, [(left[:, rows], right[:, start:stop])], draw=1)
    assert differences(parts, got) == {}


@each_codec
@pytest.mark.parametrize("where", ["left", "right", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_moves_that_is_not_finite(weight, states, where, value):
    given, shape = case(BUSY["AdamW"], weight, states), (20, 300)
    parts, _ = make(given, shape)
    left, right = operands(*shape, 30)
    terms = {"left": left, "right": right, "grad": torch.randn(shape)}
    terms[where][-1, -1] = value
    before = clone(parts)
    bound = bind(given, parts, shape)
    squares = bound(given.numbers, [(left, right)], terms["grad"], guarded=True)
    assert not torch.tensor(squares).isfinite() and differences(before, parts) == {}


def test_large_operands_of_a_finite_gradient_step():
    """Where the norms do not tell, the gradient itself does."""
    left, right = torch.zeros(2, 8), torch.zeros(2, 200)
    left[0], right[1], left[1, 3], right[1, 7] = 1e30, 1e30, 1.0, 2e30
    got, squares = seen([(left, right)], shape=(8, 200), guarded=True)
    assert got[3, 7] == 2e30 and squares > 4e60
    left[1] = 1e30
    weight, squares = seen([(left, right)], shape=(8, 200), guarded=True)
    assert not weight.any() and squares == float("inf")


def test_numbers_of_another_way_through_the_rule():
    """A rule that decides anew, here by its first step, has another kernel; the same arrays are bound."""
    first, later = case(BUSY["SGD"], step=1), case(BUSY["SGD"], step=2)
    parts, grad = make(first, (5, 130))
    wanted = clone(parts)
    bound = bind(first, parts, (5, 130))
    for given in (first, later, first):
        native_step(given, wanted, grad)
        assert bound.ready(given.numbers)
        bound(given.numbers, grad=grad)
    assert differences(wanted, parts) == {}


def test_numbers_without_a_kernel(monkeypatch):
    first, later = case(BUSY["SGD"], step=1), case(BUSY["SGD"], step=2)
    parts, grad = make(first, (5, 130))
    bound = bind(first, parts, (5, 130))
    monkeypatch.setenv("GRADFOLD_COMPILE", "0")
    assert not bound.ready(later.numbers) and bound.ready(first.numbers)
    with pytest.raises(ValueError, match="no kernel for them"):
        bound(later.numbers, grad=grad)
    assert native.bind(first.rule, first.numbers, first.codecs, parts, first.streams(), (5, 130)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathers(dtype):
    """Rows that meet in one are added; ids of other rows are passed over."""
    ids = torch.tensor([3, 29, 0, 3, 12, -1, 30, 3, 700])
    rows = torch.randn(9, 300).to(dtype)
    wanted = torch.zeros(30, 300)
    for i, one in zip(ids.tolist(), rows.float(), strict=True):
        if 0 <= i < 30:
            wanted[i] += one
    got, squares = seen(gathers=[(ids, rows)], shape=(30, 300))
    assert torch.equal(got, wanted) and squares == pytest.approx(wanted.double().square().sum().item())
    left, right = operands(30, 300, 20)
    both, _ = seen([(left, right)], gathers=[(ids, rows), (ids, rows)], shape=(30, 300), guarded=True)
    torch.testing.assert_close(both.double(), oracle([(left, right)]) + 2 * wanted.double(), rtol=1e-5, atol=1e-5)
    part, _ = seen(gathers=[(ids - 5, rows)], shape=(30, 300), start=5, stop=20)
    assert torch.equal(part[5:20], wanted[5:20]) and not part[:5].any() and not part[20:].any()
    rows[4, 2] = float("nan")
    nothing, squares = seen(gathers=[(ids, rows)], shape=(30, 300), guarded=True)
    assert not nothing.any() and squares != squares
    with pytest.raises(ValueError, match=r"ids: torch.int32 \[9\]"):
        seen(gathers=[(ids.int(), rows)], shape=(30, 300))


def test_measure_steps_nothing():
    left, right = operands(20, 300, 30)
    weight = torch.zeros(20, 300)
    bound = bind(case(ECHO), [{"values": weight}], (20, 300))
    grad = torch.randn(20, 300)
    assert bound.ready(case(ECHO).numbers)
    for terms in [([(left, right)], None), ([], grad), ([(left, right)], grad)]:
        assert bound.measure(*terms) == pytest.approx(oracle(*terms).square().sum().item(), rel=1e-5)
    assert not weight.any()


def test_scratch_memory_of_the_callers():
    lent = []

    def scratch(size_bytes: int) -> torch.Tensor:
        lent.append(torch.full((size_bytes + 64,), 255, dtype=torch.uint8))  # NaN wherever it is read
        return lent[-1][:size_bytes]

    left, right = operands(20, 300, 30)
    weight = torch.zeros(20, 300)
    bind(case(ECHO), [{"values": weight}], (20, 300), scratch=scratch)(case(ECHO).numbers, [(left, right)])
    assert torch.equal(weight, seen([(left, right)], shape=(20, 300))[0])
    assert len(lent) == 1 and bool((lent[0][-64:] == 255).all()), "nothing is written behind it"


def test_terms_that_do_not_fit():
    """C would believe everything."""
    left, right = operands(20, 300, 30)
    weight = torch.zeros(20, 300)
    bound, numbers = bind(case(ECHO), [{"values": weight}], (20, 300)), case(ECHO).numbers
    for products, match in [
        ([(left[:, :19], right)], "left: torch.float32"),
        ([(left, right[:29])], "right: torch.float32"),
        ([(left.double(), right)], "left: torch.float64"),
        ([(left, right.t().contiguous().t())], "adjacent columns"),
    ]:
        with pytest.raises(ValueError, match=match):
            bound(numbers, products)
    with pytest.raises(ValueError, match="rows 15:25 of 20"):
        bound(numbers, [(left[:, :10], right)], start=15, stop=25)
    with pytest.raises(ValueError, match="grad: "):
        bound(numbers, grad=torch.zeros(20, 299))
    assert not weight.any()


def test_a_graph_that_saved_the_old_weight_is_stale():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    loss = weight.pow(2).sum()
    bind(case(ECHO), [{"values": weight.detach()}], (2, 3))(case(ECHO).numbers, grad=torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_where_it_pays():
    assert native.pays(512, 2048, 768, torch.float32) and not native.pays(513, 2048, 768, torch.float32)
    assert native.pays(16, 16, 16, torch.bfloat16) and not native.pays(16, 4096, 16, torch.bfloat16)
    assert not native.pays(16, 2048, 768, torch.float64)
