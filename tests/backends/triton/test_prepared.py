"""Prepared launches: the kernel is handed what Triton's own dispatch would hand it. A driver that only listens."""

# ruff: noqa: E402

import gc
import weakref

import pytest

triton = pytest.importorskip("triton", reason="kernels need triton: pip install 'gradfold[gpu]'")

import torch
from triton.runtime.driver import driver

import gradfold
from benchmarks.compiled import Listening
from gradfold.backends import UNCHANGED, Change, MatmulUse, Scratch, Stored
from gradfold.backends.triton import Triton, backend, prepared, table
from gradfold.backends.triton.kernels.step import fold_step
from gradfold.engine.storage import allocate_state, bind, storage_of

SHAPE, TOKENS = (256, 128), 64


@pytest.fixture
def listening(monkeypatch, request):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton-kernels")))
    monkeypatch.setattr(backend, "_reachable", lambda weight: True)
    # What is handed over does not depend on tiles, and these compile in a sixth of the time of those that are shipped.
    for row in table._TABLE:
        monkeypatch.setitem(table._TABLE, row, table.Config(16, 128, 16, 0, warps=4, stages=1))
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
        numbers = rule.advance(state, group, False)
        first, states = bind(weight, storage, state, "w", group)
        use = MatmulUse(
            torch.zeros(tokens, SHAPE[0], dtype=torch.bfloat16), torch.zeros(tokens, SHAPE[1], dtype=torch.bfloat16)
        )
        return first, states, [use], rule, group, numbers, change

    return job


def arguments_of(call):
    """Of a launch, behind the grid, the stream, the function and the hooks."""
    return call[:3], list(map(plain, call[9:]))


def test_a_prepared_launch_is_the_one_triton_would_make(listening, monkeypatch):
    job, ours = problem(), Triton(Scratch())
    at = prepared.NUMBERS
    ours.step(*job(1))
    for step, change, tokens in [(2, UNCHANGED, TOKENS), (3, UNCHANGED, 24), (4, Change(0.5), TOKENS)]:
        given = job(step, change, tokens)
        launches = len(next(iter(ours.shelf._found.values())).launches)
        ours.step(*given)
        assert len(next(iter(ours.shelf._found.values())).launches) == launches, "made again"
        Triton(Scratch()).step(*given)  # which has prepared nothing: by Triton's own dispatch
        mine, theirs = map(arguments_of, listening.launched[-2:])
        assert mine[0] == theirs[0]
        assert len(mine[1]) == len(theirs[1]) == len(fold_step.arg_names)
        for index, (a, b) in enumerate(zip(mine[1], theirs[1], strict=True)):
            if index != at + 7:  # the norms, new memory each time
                assert a == b, fold_step.arg_names[index]


def test_another_kind_of_launch_is_made_anew(listening):
    job, ours = problem("fp32"), Triton(Scratch())
    for change in (UNCHANGED, Change(clip_value=0.1), Change(torch.tensor(0.5)), Change(guarded=True)):
        ours.step(*job(1, change))
    assert len(next(iter(ours.shelf._found.values())).launches) == 4


def test_operands_that_lie_otherwise_are_another_kind(listening, monkeypatch):
    """Triton compiles for addresses and strides that are multiples of 16, and for those that are not."""
    made = []
    monkeypatch.setattr(Triton, "_launch", lambda *_: made.append(1) or ([0.0], lambda *_: None))
    job, ours = problem(), Triton(Scratch())

    def layouts(rows, columns):
        wide = torch.zeros(rows, columns + 1, dtype=torch.bfloat16)
        aside = torch.zeros(rows * columns + 1, dtype=torch.bfloat16)[1:].view(rows, columns)
        return [wide[:, 1:].contiguous(), wide[:, :-1], wide[:, 1:], aside]

    lefts, rights = layouts(TOKENS, SHAPE[0]), layouts(TOKENS, SHAPE[1])
    uses = [(left, rights[0]) for left in lefts] + [(lefts[0], right) for right in rights[1:]]
    for _ in range(2):
        for left, right in uses:
            weight, states, _, *rest = job(1)
            ours.step(weight, states, [MatmulUse(left, right)], *rest)
    assert len(made) == len(uses)


@pytest.mark.parametrize("offset", [0, 1], ids=["described", "by address"])
def test_nothing_prepared_keeps_a_product_alive(listening, offset):
    """Neither the launch that was made for it, nor one that was there."""
    job, ours = problem(), Triton(Scratch())
    for _ in range(2):
        weight, states, _, *rest = job(1)
        operands = [torch.zeros(TOKENS * n + offset, dtype=torch.bfloat16)[offset:].view(TOKENS, n) for n in SHAPE]
        alive = [weakref.ref(operand) for operand in operands]
        ours.step(weight, states, [MatmulUse(*operands)], *rest)
        operands.clear()
        listening.launched.clear()
        gc.collect()
        assert [one() for one in alive] == [None, None]
    assert len(next(iter(ours.shelf._found.values())).launches) == 1


def test_nothing_prepared_keeps_a_state_alive(listening):
    job, ours = problem("fp32"), Triton(Scratch())
    given = job(1)
    ours.step(*given)
    storages = [weakref.ref(part.untyped_storage()) for one in given[1] for part in one.parts.values()]
    assert all(isinstance(one, Stored) for one in given[1])
    held = next(iter(ours.shelf._found.values()))
    tensors = [x for launch in held.launches.values() for x in launch.arguments if isinstance(x, torch.Tensor)]
    data = {part.data_ptr() for one in [given[0], *given[1]] for part in one.parts.values()}
    assert not any(tensor.data_ptr() in data for tensor in tensors) and storages
