"""Prepared launches: the kernel is handed what Triton's own dispatch would hand it. A driver that only listens."""

# ruff: noqa: E402

import gc
import types
import weakref

import pytest

triton = pytest.importorskip("triton", reason="kernels need triton: pip install 'gradfold[gpu]'")

import torch
from triton.runtime.driver import driver

import gradfold
from benchmarks.compile_kernels import Listening
from gradfold.backends import UNCHANGED, Change, Job, MatmulTerm, Scratch, StepNumbers
from gradfold.backends.triton import Triton, backend, launch_cache, tile_configs
from gradfold.backends.triton.kernels.step import fold_step
from gradfold.engine.storage import allocate_state, bind, storage_of

SHAPE, TOKENS = (256, 128), 64


@pytest.fixture
def listening(monkeypatch, request):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton-kernels")))
    monkeypatch.setattr(backend, "_reachable", lambda weight: True)
    # What is handed over does not depend on tiles, and these compile in a sixth of the time of those that are shipped.
    for row in tile_configs._TILE_CONFIGS:
        monkeypatch.setitem(tile_configs._TILE_CONFIGS, row, tile_configs.TileConfig(16, 128, 16, 0, warps=4, stages=1))
    listener, before = Listening(90), driver._active
    driver.set_active(listener)
    fold_step.device_caches.clear()
    yield listener
    fold_step.device_caches.clear()
    gc.collect()  # kernels unload themselves from the driver that loaded them
    driver._active = before


def plain(value):
    """Tensors and descriptors by what they point to."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if hasattr(value, "base"):
        return "descriptor", value.base.data_ptr(), tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
    return (value.data_ptr(), value.dtype) if hasattr(value, "data_ptr") else value


def problem(states="int8"):
    optimizer = gradfold.AdamW([torch.nn.Parameter(torch.zeros(1))], states=states, rounding="stochastic", small_size=0)
    group, rule = optimizer.param_groups[0], optimizer.rule
    weight = torch.zeros(SHAPE, dtype=torch.bfloat16)
    storage, state = storage_of(weight, rule, group), {"step": torch.tensor(3.0)}
    for spec, codec in zip(storage.specs, storage.codecs, strict=True):
        state |= allocate_state(weight, spec, codec)

    def job(step, change=UNCHANGED, tokens=TOKENS):
        state["step"].fill_(step - 1)
        numbers = StepNumbers(rule.advance(state, group, False), step)
        term = MatmulTerm(
            torch.zeros(tokens, SHAPE[0], dtype=torch.bfloat16), torch.zeros(tokens, SHAPE[1], dtype=torch.bfloat16)
        )
        return [term], numbers, change

    def prepare(ours):
        first, states = bind(weight, storage, state, "w", group)
        return ours.prepare(first, states, rule, group)

    return job, prepare


def arguments_of(call):
    """Of a launch, behind the grid, the stream, the function and the hooks."""
    return call[:3], list(map(plain, call[9:]))


def but_norms(arguments):
    """Their memory is another in each stepper."""
    at = launch_cache.SCALARS_AT + 7
    return arguments[:at] + arguments[at + 1 :]


def test_a_prepared_launch_is_the_one_triton_would_make(listening, monkeypatch):
    job, prepare = problem()
    stepper = prepare(Triton(Scratch()))
    at = launch_cache.SCALARS_AT
    stepper(*job(1))
    cases = [
        (2, UNCHANGED, TOKENS, 1),
        (3, UNCHANGED, 24, 1),
        (4, Change(0.5), TOKENS, 2),
        (5, Change(0.25), TOKENS, 2),
    ]
    for step, change, tokens, launches in cases:  # a factor of one is a kernel of its own, which does not multiply
        given = job(step, change, tokens)
        stepper(*given)
        assert len(stepper.launches()) == launches, "made again"
        prepare(Triton(Scratch()))(*given)  # which has prepared nothing: by Triton's own dispatch
        mine, theirs = map(arguments_of, listening.launched[-2:])
        assert mine[0] == theirs[0]
        assert len(mine[1]) == len(theirs[1]) == len(fold_step.arg_names)
        for index, (a, b) in enumerate(zip(mine[1], theirs[1], strict=True)):
            if index != at + 7:  # the norms, new memory each time
                assert a == b, fold_step.arg_names[index]


def test_a_product_that_lies_where_an_earlier_one_lay_keeps_its_arguments(listening, monkeypatch):
    """As activations of a training loop do: only the numbers of the step are put in."""
    job, prepare = problem()
    stepper = prepare(Triton(Scratch()))
    at = launch_cache.SCALARS_AT
    terms, *_ = job(1)
    for step in (1, 2):  # compiled, then kept; with a factor, too
        stepper(terms, *job(step)[1:])
        stepper(terms, job(step)[1], Change(0.7))
    monkeypatch.setattr(Triton, "take_step", lambda *_: pytest.fail("prepared again"))
    for step, change in [(3, UNCHANGED), (4, Change(0.5)), (5, Change(2.0)), (6, UNCHANGED)]:
        _, numbers, _ = job(step)
        scalars = stepper.numbers(numbers)[1]
        power = stepper(terms, numbers, change)
        _, mine = arguments_of(listening.launched[-1])
        assert mine[at] == (scalars.data_ptr(), torch.float32) and mine[at + 4] == change.scale
        assert scalars[-1:].view(torch.int32).item() == step
        assert mine[at + 7] == (power.tiles.data_ptr(), torch.float32)


@pytest.mark.parametrize("change", ["place", "tokens", "strides", "clip_value"])
def test_arguments_are_not_kept_for_another(listening, change):
    job, prepare = problem()
    stepper = prepare(Triton(Scratch()))
    terms, numbers, usual = job(1)
    for _ in range(2):
        stepper(terms, numbers, usual)
    (term,) = terms
    others = {
        "place": MatmulTerm(term.left.clone(), term.right),
        "tokens": MatmulTerm(term.left[:16], term.right[:16]),
        "strides": MatmulTerm(term.left, torch.zeros(TOKENS, 2 * SHAPE[1], dtype=torch.bfloat16)[:, : SHAPE[1]]),
    }
    changed = Change(clip_value=0.5) if change == "clip_value" else usual
    given = [others.get(change, term)], numbers, changed
    for _ in range(3):
        stepper(*given)
        prepare(Triton(Scratch()))(*given)  # by Triton's own dispatch
        mine, theirs = map(arguments_of, listening.launched[-2:])
        norms = launch_cache.SCALARS_AT + 7
        assert (
            mine[0] == theirs[0]
            and mine[1][:norms] == theirs[1][:norms]
            and mine[1][norms + 1 :] == theirs[1][norms + 1 :]
        )


def test_a_bias_that_steps_along_brings_its_own_memory(listening):
    """Also one that was prepared again, as after load_state_dict."""
    job, prepare = problem("fp32")
    ours, (terms, numbers, change) = Triton(Scratch()), job(1)
    stepper = prepare(ours)

    def bias():
        optimizer = gradfold.AdamW([torch.nn.Parameter(torch.zeros(1))], small_size=0)
        group, weight, state = optimizer.param_groups[0], torch.zeros(SHAPE[0], dtype=torch.bfloat16), {}
        storage = storage_of(weight, optimizer.rule, group)
        for spec, codec in zip(storage.specs, storage.codecs, strict=True):
            state |= allocate_state(weight, spec, codec)
        first, states = bind(weight, storage, state, "b", group)
        return ours.prepare(first, states, optimizer.rule, group)

    for other in (bias(), bias()):
        for _ in range(3):
            along = Job(other, [], numbers, change)
            assert ours.step_along(Job(stepper, terms, numbers, change), along) is not None
            fresh = Triton(Scratch())
            assert fresh.step_along(Job(prepare(fresh), terms, numbers, change), along) is not None
            mine, theirs = map(arguments_of, listening.launched[-2:])
            assert mine[0] == theirs[0] and but_norms(mine[1]) == but_norms(theirs[1])
            assert other.weight.values.data_ptr() in [
                v[0] for v in mine[1][launch_cache.BIAS_AT] if isinstance(v, tuple)
            ]


def test_few_arguments_are_kept(listening, monkeypatch):
    monkeypatch.setattr(launch_cache, "MAX_BLOCKS", 3)
    job, prepare = problem()
    stepper = prepare(Triton(Scratch()))
    terms = [job(1, tokens=8 * n)[0] for n in range(1, 9)]
    for _ in range(2):
        for one in terms:
            stepper(one, *job(1)[1:])
            assert len(stepper.here().blocks) <= 3


def test_another_kind_of_launch_is_made_anew(listening):
    job, prepare = problem("fp32")
    stepper = prepare(Triton(Scratch()))
    for change in (UNCHANGED, Change(clip_value=0.1), Change(torch.tensor(0.5)), Change(guarded=True)):
        stepper(*job(1, change))
    assert len(stepper.launches()) == 4


def test_operands_that_lie_otherwise_are_another_kind(listening, monkeypatch):
    """Triton compiles for addresses and strides that are multiples of 16, and for those that are not."""
    made = []
    launch = types.SimpleNamespace(block=lambda *_: lambda *_: [0.0])
    monkeypatch.setattr(Triton, "_launch", lambda *_: made.append(1) or ([0.0], launch))
    job, prepare = problem()
    stepper = prepare(Triton(Scratch()))

    def layouts(rows, columns):
        wide = torch.zeros(rows, columns + 1, dtype=torch.bfloat16)
        aside = torch.zeros(rows * columns + 1, dtype=torch.bfloat16)[1:].view(rows, columns)
        return [wide[:, 1:].contiguous(), wide[:, :-1], wide[:, 1:], aside]

    lefts, rights = layouts(TOKENS, SHAPE[0]), layouts(TOKENS, SHAPE[1])
    uses = [(left, rights[0]) for left in lefts] + [(lefts[0], right) for right in rights[1:]]
    for _ in range(2):
        for left, right in uses:
            stepper([MatmulTerm(left, right)], *job(1)[1:])
    assert len(made) == len(uses)


@pytest.mark.parametrize("offset", [0, 1], ids=["described", "by address"])
def test_nothing_prepared_keeps_a_product_alive(listening, offset):
    """Neither the launch that was made for it, nor one that was there."""
    job, prepare = problem()
    stepper = prepare(Triton(Scratch()))
    for _ in range(2):
        operands = [torch.zeros(TOKENS * n + offset, dtype=torch.bfloat16)[offset:].view(TOKENS, n) for n in SHAPE]
        alive = [weakref.ref(operand) for operand in operands]
        stepper([MatmulTerm(*operands)], *job(1)[1:])
        operands.clear()
        listening.launched.clear()
        gc.collect()
        assert [one() for one in alive] == [None, None]
    assert len(stepper.launches()) == 1


def test_a_state_that_was_replaced_is_let_go(listening):
    """What was prepared for it goes with it."""
    model = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False).to(torch.bfloat16)
    optimizer = gradfold.AdamW(model.parameters(), states="fp32", small_size=0)
    gradfold.fold(model, optimizer, backend=Triton(Scratch()), on_nonfinite="skip")
    states = optimizer.state[model.weight]

    def step():
        model(torch.zeros(TOKENS, SHAPE[1], dtype=torch.bfloat16)).sum().backward()
        optimizer.step()

    step()
    listening.launched.clear()
    gone = weakref.ref(states["exp_avg"])
    states["exp_avg"] = torch.ones(SHAPE)
    step()
    gc.collect()
    assert gone() is None
    launched = arguments_of(listening.launched[-1])[1]
    assert (states["exp_avg"].data_ptr(), torch.float32) in [
        value for one in launched if isinstance(one, tuple) for value in one
    ]
