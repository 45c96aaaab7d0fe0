"""Moments that are stored and read back at every step: do they follow what fp32 would hold?"""

import math

import pytest
import torch

from gradfold.codecs import random_bits, row_offsets, state_codec, stream_key

BETA1, BETA2 = 0.9, 0.999


def follow(codec, start, gradients, beta, power, random=True):
    """An exponential mean of gradients^power through a codec, beside the same in fp32: ``(stored, exact)`` per step."""
    rows, columns = start.shape
    parts, exact = codec.encode(start), start.clone()
    for step, grad in enumerate(gradients):
        bits = None
        if random and codec.stochastic:
            bits = random_bits(stream_key(0, step, "w", "state"), row_offsets(range(rows), columns), columns)
        new = beta * codec.decode(parts, columns) + (1 - beta) * grad**power
        parts = codec.encode(new, bits)
        exact = beta * exact + (1 - beta) * grad**power
        yield codec.decode(parts, columns), exact


def last(steps):
    *_, final = steps
    return final


# decay ----------------------------------------------------------------------------------------------------------------

DECAY = 1000  # steps
ZEROS = [torch.zeros(())] * DECAY
WANT = BETA2**DECAY  # 0.368


@pytest.mark.parametrize(
    "name, random, want",
    [
        ("fp32", False, WANT),
        ("bf16", True, WANT),
        ("bf16", False, 1.0),  # it stays where it is for ever
        ("int8", True, WANT),
        ("int8", False, 1.0),  # nor do these move, whose scales are powers of two
        ("int4", True, WANT),
    ],
)
def test_a_second_moment_without_gradient(name, random, want):
    """It decays to 0.368 in 1,000 steps, but not if it is rounded to nearest."""
    codec = state_codec(name, False)
    start = codec.decode(codec.encode(torch.rand(32, 128) + 0.5), 128)
    stored, _ = last(follow(codec, start, ZEROS, BETA2, 2, random))
    ratio = (stored / start).double()
    error = 4 * float(ratio.std()) / ratio.numel() ** 0.5  # of the mean of independent random walks
    assert error < 0.1 * WANT
    assert float(ratio.mean()) == pytest.approx(want, abs=max(error, 1e-3 * want))


@pytest.mark.parametrize("name, rel", [("int8", 0.05), pytest.param("int4", 0.15, marks=pytest.mark.slow)])
def test_it_decays_beside_an_element_that_does_not(name, rel):
    """With the block's largest held where it is, only random bits let the others decay."""
    start = torch.ones(32, 128)
    grad = torch.zeros(32, 128)
    grad[:, 0] = 1
    ended = {}
    for random in (False, True):
        stored, exact = last(follow(state_codec(name, False), start, [grad] * DECAY, BETA2, 2, random))
        assert stored[:, 0].allclose(exact[:, 0], rtol=1e-3)
        ended[random] = float(stored[:, 1:].double().mean())
    assert ended[False] == pytest.approx(1, rel=1e-3)
    assert ended[True] == pytest.approx(WANT, rel=rel)


def test_a_second_moment_grows_by_steps_smaller_than_a_level():
    """Adagrad's sum, too, is this: increments of a thousandth."""
    codec, n = state_codec("int8", False), 256
    parts = codec.encode(torch.ones(8, n))
    for step in range(1000):
        bits = random_bits(stream_key(0, step, "w", "sum"), row_offsets(range(8), n), n)
        grown = codec.decode(parts, n)
        grown[:, 1:] += 1e-3  # the first of each row stays
        grown[:, 0] += 1e-2
        parts = codec.encode(grown, bits)
    assert float(codec.decode(parts, n)[:, 1:].double().mean()) == pytest.approx(2, rel=0.03)


# gradients as they come -----------------------------------------------------------------------------------------------


def noise(steps: int, shape, spread: float, seed: int = 0):
    """Gradients whose size varies between elements by ``spread`` decades (standard deviation), heavy-tailed in time."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (spread * torch.randn(shape, generator=generator))
    made = []
    for _ in range(steps):
        tail = torch.exp(0.7 * torch.randn(shape, generator=generator) - 0.49)
        made.append(sizes * tail * torch.randn(shape, generator=generator))
    return sizes, made


def update_error(name: str, spread: float, random: bool = True) -> float:
    """Rms of ``sqrt(v / stored v) - 1`` over the second half of 1,500 steps."""
    shape = (8, 128)
    _sizes, gradients = noise(1500, shape, spread)
    errors = []
    steps = follow(state_codec(name, False), torch.zeros(shape), gradients, BETA2, 2, random)
    for step, (stored, exact) in enumerate(steps):
        if step > 750 and step % 25 == 0:
            errors.append((exact / stored).sqrt() - 1)
    return float(torch.stack(errors).square().mean().sqrt())


@pytest.mark.parametrize(
    "name, spread, most",
    [
        pytest.param("bf16", 0.3, 0.05, marks=pytest.mark.slow),
        ("bf16", 1.0, 0.05),
        ("int8", 0.3, 0.2),
        pytest.param("int8", 1.0, 0.2, marks=pytest.mark.slow),
        pytest.param("int4", 0.3, 0.65, marks=pytest.mark.slow),
    ],
)
def test_second_moments_follow(name, spread, most):
    """For comparison: with beta2 = 0.999 the second moment's own sampling error is 0.05 to 0.1."""
    assert update_error(name, spread) < most


def moment_error(encode_decode, spread: float) -> float:
    """Rms error of the first moment, each element in units of its own gradients' size, over the rms of the moment."""
    shape = (8, 128)
    sizes, gradients = noise(200, shape, spread)
    stored = exact = torch.zeros(shape)
    errors, values = [], []
    for step, grad in enumerate(gradients):
        fresh, exact = BETA1 * stored + (1 - BETA1) * grad, BETA1 * exact + (1 - BETA1) * grad
        stored = encode_decode(fresh)
        if step > 50:
            errors.append((fresh - exact) / sizes)
            values.append(exact / sizes)
    return float(torch.stack(errors).square().mean().sqrt() / torch.stack(values).square().mean().sqrt())


def through(name):
    codec = state_codec(name, True)
    return lambda m: codec.decode(codec.encode(m), m.shape[1])


def linear(m, random=False):
    scale = m.abs().amax(1, keepdim=True) / 127
    return (m / scale + (torch.rand_like(m) - 0.5 if random else 0)).round() * scale


@pytest.mark.parametrize("spread, most", [(0.0, 0.04), (0.3, 0.04), (0.6, 0.06)])
def test_first_moments_follow(spread, most):
    assert moment_error(through("int8"), spread) < most


def test_int4_first_moments_follow_roughly():
    assert moment_error(through("int4"), 0.0) < 0.35 and moment_error(through("int4"), 0.3) < 0.7


def test_why_first_moments_are_not_coded_linearly():
    assert moment_error(linear, 0.3) > 1.5 * moment_error(through("int8"), 0.3)
    assert moment_error(linear, 0.6) > 5 * moment_error(through("int8"), 0.6)


def test_why_first_moments_are_not_rounded_at_random():
    """An element far under its block's largest is now and then stored as a level many times itself."""
    assert moment_error(lambda m: linear(m, random=True), 0.6) > 2 * moment_error(linear, 0.6)


@pytest.mark.parametrize("factor", [0.1, pytest.param(3.0, marks=pytest.mark.slow)])
def test_an_element_whose_gradient_changes_is_followed(factor):
    """Half of the elements change size after a fifth of the steps. To nearest int8 divides them by what they were."""
    shape = (8, 128)
    generator = torch.Generator().manual_seed(1)
    changing = torch.rand(shape, generator=generator) < 0.5
    changing[:, 0] = False
    gradients = []
    for step in range(2500):
        size = torch.where(changing & (step > 500), factor, 1.0)
        size[:, 0] = 20  # the block's largest does not change
        gradients.append(size * torch.randn(shape, generator=generator))
    ratio = {}
    for random in (False, True):
        stored, exact = last(follow(state_codec("int8", False), torch.ones(shape), gradients, BETA2, 2, random))
        ratio[random] = float((exact / stored).sqrt()[changing].median())
    assert abs(math.log(ratio[True])) < 0.15, "its update is what it should be"
    assert abs(math.log(ratio[False])) > 0.3, "and would not have been"
