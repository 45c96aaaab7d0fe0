"""The interpreter's fma rounds once, in every version."""

from fractions import Fraction

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from .repairs import fma, rounds_twice

pytestmark = pytest.mark.oldest


def operands(count: int = 4000) -> list[np.ndarray]:
    """Among them sums that cancel, and sums that lie next to half way between two numbers."""
    random = np.random.default_rng(0)
    x, y = (random.standard_normal(count) * 2.0 ** random.integers(-70, 60, count) for _ in range(2))
    x, y = x.astype(np.float32), y.astype(np.float32)
    y[::7] = 2.0**-30
    z = -(x.astype(np.float64) * y) * (1 + 2.0 ** -random.integers(2, 50, count).astype(np.float64))
    z[1::3] *= 2.0 ** random.integers(-40, 40, count)[1::3]
    z[::5] = 0
    with np.errstate(over="ignore"):
        return [x, y, z.astype(np.float32)]


def test_rounds_once():
    x, y, z = operands()
    own = interpreter.interpreter_builder.create_fma(*(interpreter.TensorHandle(v, tl.float32) for v in (x, y, z)))
    for got in (fma(x, y, z), own.data):
        assert got.dtype == np.float32
        for at in np.flatnonzero(np.isfinite(got) & np.isfinite(z)):
            exact = Fraction(float(x[at])) * Fraction(float(y[at])) + Fraction(float(z[at]))
            near = [np.nextafter(got[at], np.float32(end)) for end in (-np.inf, np.inf)]
            off = abs(Fraction(float(got[at])) - exact)
            for other in near:
                away = abs(Fraction(float(other)) - exact) if np.isfinite(other) else off + 1
                assert off < away or (off == away and not got[at].view(np.int32) & 1)


def test_what_is_not_finite():
    x, y, z = np.array(
        [[np.inf, 1, -1], [np.nan, 1, 1], [3e38, 3e38, 1], [0, np.inf, 1], [-0.0, 1, -0.0]], np.float32
    ).T
    wanted = np.array([np.inf, np.nan, np.inf, np.nan, -0.0], np.float32)
    assert np.array_equal(fma(x, y, z), wanted, equal_nan=True) and np.signbit(fma(x, y, z)[4])


def test_the_interpreter_is_repaired():
    assert not rounds_twice()
