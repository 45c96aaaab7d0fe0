"""Operations against torch's, one by one; decisions that become guards; and what is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from gradfold.backends import native
from gradfold.backends.native.scalars import Guards, Scalar, Unsupported
from gradfold.codecs import Codec, state_codec, weight_codec
from gradfold.rules import Rule

from .eager import ExactSqrt, same

FP32 = weight_codec(torch.float32)


class Numbers(NamedTuple):
    a: float = 0.37
    b: float = 0.9
    flag: bool = True


_USUAL = Numbers()


class Given(Rule):
    """Any function of tiles as a rule."""

    def __init__(self, function):
        self.function = function

    def update(self, weight, grad, states, numbers, scratch):
        self.function(weight, grad, states[0], numbers, scratch)


def _operators_in_place(w, g, s):
    w += g
    w *= s
    w -= 0.5
    s /= g


F32, I32 = torch.float32, torch.int32
OPERATIONS = {
    "add": lambda w, g, s, n, t: w.add_(g).add_(n.a).add_(1e-8),
    "add alpha": lambda w, g, s, n, t: w.add_(g, alpha=-n.a),
    "add alpha out": lambda w, g, s, n, t: w.copy_(torch.add(w, g, alpha=n.b, out=t[0])),
    "sub": lambda w, g, s, n, t: w.copy_(1.5 - (w - g) - n.a),
    "mul": lambda w, g, s, n, t: w.mul_(n.a).mul_(g),
    "mul out": lambda w, g, s, n, t: w.copy_(torch.mul(w, n.b, out=t[0])),
    "div": lambda w, g, s, n, t: w.div_(g).div_(n.b),
    "div out": lambda w, g, s, n, t: w.copy_(torch.div(g, n.a, out=t[0])),
    "divided": lambda w, g, s, n, t: w.copy_(n.a / g),
    "reciprocal": lambda w, g, s, n, t: w.copy_(w.reciprocal()),
    "addcmul": lambda w, g, s, n, t: w.addcmul_(g, s),
    "addcmul value": lambda w, g, s, n, t: w.addcmul_(g, s, value=n.a),
    "addcmul out": lambda w, g, s, n, t: w.copy_(torch.addcmul(w, g, s, value=-1, out=t[0])),
    "addcdiv": lambda w, g, s, n, t: w.addcdiv_(g, s),
    "addcdiv value": lambda w, g, s, n, t: w.addcdiv_(g, s, value=-n.a / (1 - n.b**3)),
    "lerp small": lambda w, g, s, n, t: w.lerp_(g, 1 - n.b),
    "lerp large": lambda w, g, s, n, t: w.lerp_(g, n.b),
    "lerp half": lambda w, g, s, n, t: (w.lerp_(g, 0.5), s.lerp_(g, 0.5 - 2.0**-27)),
    "lerp below half": lambda w, g, s, n, t: w.lerp_(g, 0.5 - 2.0**-25),
    "sqrt": lambda w, g, s, n, t: (w.sqrt_(), s.copy_(torch.sqrt(s, out=t[0]))),
    "sign": lambda w, g, s, n, t: (w.sign_(), s.neg_().sign_()),
    "neg abs": lambda w, g, s, n, t: (w.neg_(), s.copy_(s.abs())),
    "maximum": lambda w, g, s, n, t: (torch.maximum(w, g, out=w), s.copy_(torch.maximum(g, s))),
    "clamp": lambda w, g, s, n, t: (w.clamp_(min=-0.5), s.clamp_(max=n.b), g.clamp_(-0.25, 0.25), w.add_(g)),
    "where": lambda w, g, s, n, t: w.copy_(torch.where(w > g, torch.where(w <= s, w, g), s * 2)),
    "equal": lambda w, g, s, n, t: w.copy_(torch.where(w == g, torch.where(s != 0.0, w, g + 1), s)),
    "fill": lambda w, g, s, n, t: (s.fill_(n.b), w.add_(s)),
    "operators in place": lambda w, g, s, n, t: _operators_in_place(w, g, s),
    "bits": lambda w, g, s, n, t: w.copy_((((w.view(I32) & ~0xFFF) | (g.view(I32) & 0xFFF)) ^ 5).view(F32)),
    "shifts": lambda w, g, s, n, t: w.copy_((((w.view(I32) >> 9) * 3 - 7) << 2).view(F32)),
    "shift and mask": lambda w, g, s, n, t: w.copy_(((w.view(I32) >> 16) & 0xFFFF).to(F32)),
    "mask": lambda w, g, s, n, t: w.copy_((g.view(I32) & (-(w.view(I32) & 0x7FFFFFFF) >> 31)).view(F32)),
    "mask of any sign": lambda w, g, s, n, t: w.copy_((g.view(I32) & (-w.view(I32) >> 31)).view(F32)),
    "integers": lambda w, g, s, n, t: w.copy_((w * 1000).to(I32).clamp(-300, 200).abs().to(F32)),
    "narrow": lambda w, g, s, n, t: w.copy_((w * 1e4).to(I32).to(torch.int8).to(I32).to(F32)),
    "16 bits": lambda w, g, s, n, t: (w.copy_(w.to(torch.bfloat16).to(F32)), s.copy_(s.to(torch.float16).to(F32))),
    "same dtype": lambda w, g, s, n, t: w.to(F32).add_(g),
}


def run(function, numbers: Any = _USUAL, count: int = 1000) -> None:
    """Compare a rule of this function with the same on tensors, all in fp32."""
    rule = Given(function)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, 3e38, 2.0**-126])
    pairs = torch.cartesian_prod(special, special).t()  # every special value with every other
    w, g, s = (torch.randn(3, 1, count) * 10 ** (4 * torch.rand(3, 1, count) - 3)).unbind()
    w[0, : pairs.shape[1]], g[0, : pairs.shape[1]], s[0, : pairs.shape[1]] = pairs[0], pairs[1], pairs[1].roll(3)
    got = [{"values": w.clone()}, {"values": s.clone()}]
    kernel = native.kernel(rule, numbers, FP32, [FP32], [False, False])
    assert kernel is not None, native.reason()
    kernel(got[0], got[1:], g, numbers, [None, None], 0, count)
    with ExactSqrt():
        rule.update(w, g.clone(), [s], numbers, [torch.empty_like(g)])
    for wanted, one in zip((w, s), got, strict=True):
        unlike = ~same(wanted, one["values"])
        assert not unlike.any(), (wanted[unlike][:4], one["values"][unlike][:4])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    run(OPERATIONS[name])


# what a rule computes beside encoding ---------------------------------------------------------------------------------


def _old_state(w, g, s, n, t):
    w.add_(s)
    s.lerp_(g, n.a)


def _shared_term(w, g, s, n, t):
    torch.add(g, w, alpha=n.a, out=t[0])
    s.lerp_(t[0], n.b)
    w.sub_(t[0])


WAITS = {
    "AdamW": (lambda w, g, s, n, t: (s.lerp_(g, n.a), w.addcdiv_(g, s)), True),
    "an old state": (_old_state, False),
    "a term of both": (_shared_term, False),
    "a state that stays": (lambda w, g, s, n, t: w.sub_(s), True),
}


@pytest.mark.parametrize("name", WAITS)
@pytest.mark.parametrize("states", ["int8", "int4"])
def test_the_rest_of_a_rule_waits_where_that_computes_nothing_twice(name, states):
    function, waits = WAITS[name]
    rule, codec = Given(function), state_codec(states, True)
    w, g, s = torch.randn(3, 5, 300).unbind()
    state = codec.encode(s)
    kernel = native.kernel(rule, _USUAL, FP32, [codec], [False, False])
    assert kernel is not None, native.reason()
    assert ("the rest of the rule" in kernel.source) == (waits and states == "int8")
    got = [{"values": w.clone()}, {part: value.clone() for part, value in state.items()}]
    kernel(got[0], got[1:], g, _USUAL, [None, None], 0, 300)
    s = codec.decode(state, 300)
    rule.update(w, g, [s], _USUAL, [torch.empty_like(g)])
    assert torch.equal(got[0]["values"], w)
    assert all(torch.equal(got[1][part], value) for part, value in codec.encode(s).items())


# decisions ------------------------------------------------------------------------------------------------------------


def _decides(w, g, s, n, t):
    if n.a and n.flag:
        w.mul_(1 - n.a)
    if n.b > 0.5:
        s.add_(g)
    else:
        s.sub_(g)


def test_a_kernel_per_decision_not_per_value():
    rule = Given(_decides)
    many = [Numbers(a, b, flag) for a in (0.0, 0.1, 0.2) for b in (0.1, 0.6, 0.7) for flag in (True, False)]
    made = {id(native.kernel(rule, n, FP32, [FP32], [False, False])) for n in many}
    # (a and flag) is decided by a alone where a is 0, but a bool is always a guard
    assert len(made) == 2 * 2 * 2
    for n in many:
        run(_decides, n)


def test_guards_that_cannot_be_computed_do_not_hold():
    def divides(w, g, s, n, t):
        if 1 / n.a > 2:
            w.add_(g)

    rule = Given(divides)
    first = native.kernel(rule, Numbers(a=0.1), FP32, [FP32], [False, False])
    assert first is not None and not first.holds(Numbers(a=0.0))


def test_scalars_are_pythons():
    guards = Guards()
    x, y = Scalar("n[0]", 0.9, guards), Scalar("n[1]", 7.0, guards)
    made = -x / (1 - x**y) * 2 + abs(y - 3) + 2**y
    wanted = -0.9 / (1 - 0.9**7.0) * 2 + abs(7.0 - 3) + 2**7.0
    assert made.value == wanted == eval(made.source, {"n": (0.9, 7.0)})
    assert bool(x) and x < y and not x >= y and x != y
    assert guards.compile()((0.9, 7.0)) and not guards.compile()((0.9, 0.5))
    with pytest.raises(Unsupported, match="must not become a constant"):
        float(x)


# refusals -------------------------------------------------------------------------------------------------------------

REFUSED = {
    "torch's erf": lambda w, g, s, n, t: w.copy_(torch.erf(w)),
    "torch's item": lambda w, g, s, n, t: w.add_(g.item()),
    "depends on a tensor's values": lambda w, g, s, n, t: w.add_(g) if w > 0 else w.sub_(g),
    "read before it is written": lambda w, g, s, n, t: w.add_(t[0]),
    "into a view": lambda w, g, s, n, t: w.view(I32).add_(1),
    "read after its tensor was written": lambda w, g, s, n, t: (i := w.view(I32), w.add_(g), g.copy_((i + 1).float())),
    "must not become a constant": lambda w, g, s, n, t: w.add_(float(n.a)),
    "beside a tensor of torch.int32": lambda w, g, s, n, t: w.copy_((w.view(I32) * 0.5).view(F32)),
    "operands of torch.float32, torch.int32": lambda w, g, s, n, t: w.copy_(w * w.view(I32)),
    "a shift by": lambda w, g, s, n, t: w.copy_((w.view(I32) << 33).view(F32)),
    "torch.float32 to torch.int64": lambda w, g, s, n, t: w.copy_(w.to(torch.int64)),
    "another shape or dtype": lambda w, g, s, n, t: w.copy_(w.view(I32)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(why, forgotten):
    rule = Given(REFUSED[why])
    with pytest.warns(UserWarning, match="eager torch operations.*" + why):
        assert native.kernel(rule, Numbers(), FP32, [FP32], [False, False]) is None
    assert why in (native.reason() or "")
    assert native.kernel(rule, Numbers(), FP32, [FP32], [False, False]) is None, "and no second warning"


def test_a_codec_of_another_layout_is_refused(forgotten):
    class Thirds(Codec):
        name = "thirds"

        def widths(self, columns):
            return {"codes": (-(-columns // 3), torch.uint8)}

    with pytest.warns(UserWarning, match="43 elements of codes per block"):
        assert native.kernel(Given(OPERATIONS["add"]), Numbers(), FP32, [Thirds()], [False, False]) is None


def test_numbers_that_are_tensors_are_refused(forgotten):
    with pytest.warns(UserWarning, match=r"numbers\[0\] is a Tensor"):
        n = Numbers(a=torch.tensor(0.1))  # type: ignore[arg-type]
        assert native.kernel(Given(OPERATIONS["add"]), n, FP32, [FP32], [False, False]) is None


def test_states_codecs_are_traced_as_they_are():
    """The kernel's source has the codes' own constants, so there is no second copy of a formula."""
    kernel = native.kernel(Given(OPERATIONS["add"]), Numbers(), FP32, [state_codec("int8", True)], [False, False])
    assert kernel is not None and "660584" in kernel.source
