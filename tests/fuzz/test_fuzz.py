"""Random cases against torch; and those that once failed. `python -m tests.fuzz` runs thousands."""

import pytest

from gradfold.backends.terms import MatmulTerm
from tests.fuzz.case import Case, consistent, draw
from tests.fuzz.run import calmed, run
from tests.fuzz.shrink import shrink

QUICK, SLOW = (100, 120, 150), range(0, 1500, 50)  # first seeds of the tests


def check(case):
    result = run(case)
    assert result.good, f"{result.kind}: {result.said}\n{case.describe()}"
    return result


@pytest.mark.parametrize("first", QUICK)
def test_seeds_in_fp64(first):
    results = [check(draw(seed, ("float64",))) for seed in range(first, first + 10)]
    assert any(result.kind == "ok" for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("first", SLOW)
def test_seeds(first):
    for seed in range(first, first + 50):
        check(draw(seed))


# Cases that the fuzzer has found, shrunk. `python -m tests.fuzz` prints them in this form.
FOUND = {
    "a bf16 Linear of no inputs": Case(ops=(("empty",),), dtype="bfloat16"),
    "a hook on a norm that wakes": Case(
        ops=(("bilinear",),),
        loss="cross_entropy",
        working_set=(("chunks", 4), ("interval", 1), ("by", "bytes")),
        habits=("param_hook",),
    ),
    "a hook on a norm that is unfrozen": Case(
        ops=(("norm", "rms"),), steps=3, loss="cross_entropy", habits=("freeze", "param_hook")
    ),
    "NAdam's mu_product through torch": Case(
        rule="NAdam", hyper=(("lr", 0.05), ("betas", (0.7, 0.95))), steps=4, habits=("through_torch",)
    ),
}


# Exact as far as numbers go: torch is as far from itself when it rounds otherwise, because the optimizer divides
# gradients that are zero but for rounding by ``eps``. In fp64 no difference of another kind was left above 1e-9.
NOISE = {
    "a bias below BatchNorm": Case(
        seed=10351,
        ops=(("batch_norm",),),
        first="ids",
        loss="head",
        rule="RMSprop",
        hyper=(("lr", 0.01), ("maximize", True)),
        clip_norm=0.05,
        working_set=(("chunks", 3), ("by", "bytes")),
    ),
    "attention's bias of keys": Case(
        seed=39,
        ops=(("multihead",), ("linear", 4, True)),
        width=4,
        batch=3,
        loss="head",
        rule="Adagrad",
        hyper=(("lr", 0.1), ("weight_decay", 0.03)),
        steps=3,
    ),
    "a scale below a norm": Case(
        seed=743,
        ops=(("linear", 5, True), ("scalar",), ("norm", "group"), ("norm", "group"), ("rows", 1, True)),
        width=5,
        batch=1,
        tokens=1,
        loss="tied_head",
        loss_scale=300.0,
        rule="NAdam",
        scratch_bytes=1,
    ),
}


@pytest.mark.parametrize("case", NOISE.values(), ids=NOISE.keys())
def test_torch_is_as_far_from_itself(case):
    assert check(case).kind == "noise"
    assert check(calmed(case)).distance < 1e-9


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND.keys())
def test_found(case):
    assert check(case).kind == "ok"


# the fuzzer itself ----------------------------------------------------------------------------------------------------


def test_a_seed_is_one_case_and_a_case_is_one_line():
    for seed in range(30):
        case = draw(seed)
        assert case == draw(seed) and eval(case.describe(), {"Case": Case, "inf": float("inf")}) == case
        assert consistent(case) == case


def test_a_term_that_is_added_wrongly_is_found_and_shrunk(monkeypatch):
    """Off by 1e-7 where a weight is used twice; what it does not need to fail is dropped."""
    add = MatmulTerm.add

    def wrong(self, tile, start, stop):
        add(self, tile, start, stop)
        tile.mul_(1 + 1e-7)

    monkeypatch.setattr(MatmulTerm, "add", wrong)
    case = Case(
        ops=(("activation", "tanh"), ("linear", 3, True), ("norm", "rms"), ("shared", 0), ("dropout",)),
        segments=((0, 2, "nested"),),
        rule="AdamW",
        accumulate=2,
        habits=("eval_pass", "schedule"),
    )
    case, result = shrink(case, run(case), tries=80)
    assert result.kind == "wrong" and 1e-9 < result.distance < 1e-6
    assert len(case.ops) <= 2 and not case.habits and not case.segments and case.rule == "SGD"


def test_weights_that_moved_before_a_refusal_are_found(monkeypatch):
    case = Case(batch=3, habits=("second_backward",))
    assert run(case).kind == "refused"
    monkeypatch.setattr("tests.fuzz.loop.snapshot", lambda model: {})
    monkeypatch.setattr("tests.fuzz.run.same", lambda one, other: False)
    assert run(case).kind == "wrong"
