"""Update rules in Triton: one function per rule, on one tile in registers.

Each function is the twin of a rule in ``gradfold.rules`` and rounds where that rule rounds: ``tl.fma`` stands where
torch's kernels round ``a * b + c`` once, and kernels are compiled without further fusion. Everything that depends on
the step's numbers alone is computed in Python in double precision (``scalars.py``) and passed in ``n``.

    rule(w, g, states, n, FLAGS, MATH) -> w, states

- ``w``, ``g``: fp32 tiles of weight and gradient.
- ``states``: fp32 tiles, in the order of ``Rule.states``.
- ``n``: tuple of fp32 scalars; each function lists them.
- ``FLAGS``: compile-time constants that follow from the hyper-parameters.
- ``MATH``: how divisions and roots are computed, see ``codecs.py``: IEEE for fp32 weights, FAST for 16-bit ones.
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
import triton
import triton.language as tl

from .codecs import FAST, IEEE


@triton.jit
def div(a, b, MATH: tl.constexpr):
    """Divide with IEEE rounding, or within three units in the last place if MATH is FAST and b is normal."""
    if MATH == FAST:
        return a * tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [b], tl.float32, True, 1)
    else:
        return tl.div_rn(a, b) if MATH == IEEE else a / b


@triton.jit
def add_quotient(w, a, b, MATH: tl.constexpr):
    """Return w + a / b."""
    if MATH == FAST:
        return tl.fma(a, tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [b], tl.float32, True, 1), w)
    else:
        return w + div(a, b, MATH)


@triton.jit
def mul_add(a, b, c, MATH: tl.constexpr):
    """Return a * b + c, rounded twice unless MATH is FAST."""
    return tl.fma(a, b, c) if MATH == FAST else a * b + c


@triton.jit
def sqrt(x, MATH: tl.constexpr):
    """Take the square root with IEEE rounding, or within two units in the last place if MATH is FAST."""
    if MATH == FAST:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    else:
        return tl.sqrt_rn(x) if MATH == IEEE else tl.sqrt(x)


@triton.jit
def _lerp(start, end, weight, NEAR: tl.constexpr):
    """Interpolate like torch.lerp, from the nearer end; weight is that of ``end``, minus 1 unless NEAR (below 0.5)."""
    return tl.fma(end - start, weight, start if NEAR else end)


@triton.jit
def _decayed(w, g, rate, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr):
    """Apply sign and weight decay. DECAY: 0 none, 1 decoupled (w * rate), 2 coupled (g + rate * w)."""
    if MAXIMIZE:
        g = g * -1.0  # triton 3.6 writes -g as 0 - g, whose zeros have another sign
    if DECAY == 1:
        w = w * rate
    if DECAY == 2:
        g = tl.fma(w, rate, g)
    return w, g


@triton.jit
def _moments(w, g, states, n, FLAGS: tl.constexpr):
    """Apply sign and weight decay, and update both moments. n: decay, 1 - beta1 (or -beta1), beta2, 1 - beta2."""
    DECAY: tl.constexpr = FLAGS[0]
    MAXIMIZE: tl.constexpr = FLAGS[1]
    NEAR: tl.constexpr = FLAGS[2]
    w, g = _decayed(w, g, n[0], DECAY, MAXIMIZE)
    return w, g, _lerp(states[0], g, n[1], NEAR), tl.fma(g * n[3], g, states[1] * n[2])


@triton.jit
def adam(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """Adam and AdamW. n: those of ``_moments``, then 1 / sqrt(1 - beta2^t), eps, -lr / (1 - beta1^t)."""
    AMSGRAD: tl.constexpr = FLAGS[3]
    w, g, exp_avg, exp_avg_sq = _moments(w, g, states, n, FLAGS)
    if AMSGRAD:
        largest = tl.maximum(states[2], exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        denom = mul_add(sqrt(largest, MATH), n[4], n[5], MATH)
        return add_quotient(w, exp_avg * n[6], denom, MATH), (exp_avg, exp_avg_sq, largest)
    else:
        denom = mul_add(sqrt(exp_avg_sq, MATH), n[4], n[5], MATH)
        return add_quotient(w, exp_avg * n[6], denom, MATH), (exp_avg, exp_avg_sq)


@triton.jit
def sgd(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """SGD. n: weight decay, momentum, 1 - dampening, -lr."""
    DECAY: tl.constexpr = FLAGS[0]
    MAXIMIZE: tl.constexpr = FLAGS[1]
    MOMENTUM: tl.constexpr = FLAGS[2]  # 0 none, 1 plain, 2 Nesterov's
    FIRST: tl.constexpr = FLAGS[3]  # the buffer starts as the gradient
    w, g = _decayed(w, g, n[0], DECAY, MAXIMIZE)
    if MOMENTUM == 0:
        return tl.fma(g, n[3], w), ()
    else:
        if FIRST:
            buffer = g
        else:
            buffer = tl.fma(g, n[2], states[0] * n[1])
        if MOMENTUM == 2:
            return tl.fma(tl.fma(buffer, n[1], g), n[3], w), (buffer,)
        else:
            return tl.fma(buffer, n[3], w), (buffer,)


@triton.jit
def lion(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """Lion. n: decay, beta1, 1 - beta1, -lr, beta2, 1 - beta2."""
    DECAY: tl.constexpr = FLAGS[0]
    MAXIMIZE: tl.constexpr = FLAGS[1]
    w, g = _decayed(w, g, n[0], DECAY, MAXIMIZE)
    mixed = tl.fma(g, n[2], states[0] * n[1])
    sign = (mixed > 0).to(tl.float32) - (mixed < 0).to(tl.float32)
    return tl.fma(sign, n[3], w), (tl.fma(g, n[5], states[0] * n[4]),)


@triton.jit
def rmsprop(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """RMSprop. n: weight decay, alpha, 1 - alpha, the lerp weight of the mean, eps, momentum, -lr."""
    DECAY: tl.constexpr = FLAGS[0]
    MAXIMIZE: tl.constexpr = FLAGS[1]
    MOMENTUM: tl.constexpr = FLAGS[2]
    CENTERED: tl.constexpr = FLAGS[3]
    NEAR: tl.constexpr = FLAGS[4]
    w, g = _decayed(w, g, n[0], DECAY, MAXIMIZE)
    square = tl.fma(g * n[2], g, states[0] * n[1])
    if CENTERED:
        mean = _lerp(states[1 + MOMENTUM], g, n[3], NEAR)
        denom = sqrt(tl.fma(-mean, mean, square), MATH) + n[4]
        extra = (mean,)
    else:
        denom = sqrt(square, MATH) + n[4]
        extra = ()
    if MOMENTUM:
        buffer = states[1] * n[5] + div(g, denom, MATH)
        return tl.fma(buffer, n[6], w), (square, buffer) + extra
    else:
        return add_quotient(w, g * n[6], denom, MATH), (square,) + extra


@triton.jit
def adagrad(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """Adagrad. n: weight decay, eps, -lr of this step."""
    DECAY: tl.constexpr = FLAGS[0]
    MAXIMIZE: tl.constexpr = FLAGS[1]
    w, g = _decayed(w, g, n[0], DECAY, MAXIMIZE)
    total = tl.fma(g, g, states[0])
    return w + div(g * n[2], sqrt(total, MATH) + n[1], MATH), (total,)


@triton.jit
def nadam(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """NAdam. n: those of ``_moments``, then 1 / (1 - beta2^t), eps, -grad_rate, -avg_rate."""
    w, g, exp_avg, exp_avg_sq = _moments(w, g, states, n, FLAGS)
    denom = sqrt(exp_avg_sq * n[4], MATH) + n[5]
    w = add_quotient(w, g * n[6], denom, MATH)
    return add_quotient(w, exp_avg * n[7], denom, MATH), (exp_avg, exp_avg_sq)


@triton.jit
def radam(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """RAdam. n: those of ``_moments``, then eps, -rate, 1 if ``exp_avg_sq`` is used, else 0."""
    w, g, exp_avg, exp_avg_sq = _moments(w, g, states, n, FLAGS)
    step = exp_avg * n[5]
    adaptive = add_quotient(w, step, sqrt(exp_avg_sq, MATH) + n[4], MATH)
    return tl.where(n[6] != 0, adaptive, tl.fma(exp_avg, n[5], w)), (exp_avg, exp_avg_sq)


@triton.jit
def adadelta(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """Adadelta. n: weight decay, rho, 1 - rho, eps, -lr."""
    DECAY: tl.constexpr = FLAGS[0]
    MAXIMIZE: tl.constexpr = FLAGS[1]
    w, g = _decayed(w, g, n[0], DECAY, MAXIMIZE)
    square = tl.fma(g * n[2], g, states[0] * n[1])
    delta = div(sqrt(states[1] + n[3], MATH), sqrt(square + n[3], MATH), MATH) * g
    return tl.fma(delta, n[4], w), (square, tl.fma(delta * n[2], delta, states[1] * n[1]))


@triton.jit
def adamax(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """Adamax. n: weight decay, 1 - beta1 (or -beta1), beta2, eps, -lr / (1 - beta1^t)."""
    DECAY: tl.constexpr = FLAGS[0]
    MAXIMIZE: tl.constexpr = FLAGS[1]
    NEAR: tl.constexpr = FLAGS[2]
    w, g = _decayed(w, g, n[0], DECAY, MAXIMIZE)
    exp_avg = _lerp(states[0], g, n[1], NEAR)
    exp_inf = tl.maximum(states[1] * n[2], tl.abs(g) + n[3], propagate_nan=tl.PropagateNan.ALL)
    return add_quotient(w, exp_avg * n[4], exp_inf, MATH), (exp_avg, exp_inf)


@triton.jit
def asgd(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """Averaged SGD. n: weight decay, 1 - lambd * eta, -eta, mu."""
    DECAY: tl.constexpr = FLAGS[0]
    MAXIMIZE: tl.constexpr = FLAGS[1]
    COPIES: tl.constexpr = FLAGS[2]  # the average is the weight
    w, g = _decayed(w, g, n[0], DECAY, MAXIMIZE)
    w = tl.fma(g, n[2], w * n[1])
    if COPIES:
        return w, (w,)
    else:
        return w, (states[0] + (w - states[0]) * n[3],)


@triton.jit
def rprop(w, g, states, n, FLAGS: tl.constexpr, MATH: tl.constexpr):
    """Rprop. n: lr, eta_plus, eta_minus, the smallest and the largest step size."""
    MAXIMIZE: tl.constexpr = FLAGS[0]
    FIRST: tl.constexpr = FLAGS[1]  # step sizes start as the learning rate
    if MAXIMIZE:
        g = g * -1.0
    agrees = g * states[0]
    factor = tl.where(agrees > 0, n[1], tl.where(agrees < 0, n[2], 1.0))
    if FIRST:
        size = factor * n[0]
    else:
        size = states[1] * factor
    size = tl.minimum(
        tl.maximum(size, n[3], propagate_nan=tl.PropagateNan.ALL), n[4], propagate_nan=tl.PropagateNan.ALL
    )
    g = g * tl.where(agrees < 0, 0.0, 1.0)
    sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
    return tl.fma(sign, -size, w), (g, size)
