"""Where a tile is cut, and over how many threads it runs, does not change a byte."""

import itertools
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gradfold.backends.native import threads as over
from tests.cases import BUSY

from .eager import Case, case, clone, differences, make, native_step, tile_of

COLUMNS = 700  # five blocks and a short one
CODECS = [("bf16 stochastic", "int8"), ("split8 stochastic", "int4"), ("fp32", "bf16"), ("split16", "fp32")]
each_codec = pytest.mark.parametrize("weight, states", CODECS)


def whole(given: Case, rows: int = 12, columns: int = COLUMNS):
    parts, grad = make(given, (rows, columns))
    before = clone(parts)
    native_step(given, parts, grad, first_offset=5)
    return before, grad, parts


@each_codec
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_rows(weight, states, rows):
    given = case(BUSY["AdamW"], weight, states)
    parts, grad, wanted = whole(given)
    for start in range(0, 12, rows):
        some = slice(start, min(start + rows, 12))
        tile = tile_of(parts, given, COLUMNS, some)
        native_step(given, tile, grad[some], 5 + start * COLUMNS, COLUMNS)
    assert differences(wanted, parts) == {}


@each_codec
@pytest.mark.parametrize("cuts", [(0, 128, 700), (0, 384, 640, 700), (0, 512, 700)])
def test_columns(weight, states, cuts):
    given = case(BUSY["AdamW"], weight, states)
    parts, grad, wanted = whole(given)
    for start, stop in itertools.pairwise(cuts):
        tile = tile_of(parts, given, COLUMNS, slice(2, 12), slice(start, stop))
        native_step(given, tile, grad[2:, start:stop], 5 + 2 * COLUMNS + start, COLUMNS)
    native_step(given, tile_of(parts, given, COLUMNS, slice(0, 2)), grad[:2], 5, COLUMNS)
    assert differences(wanted, parts) == {}


@each_codec
def test_narrow_rows(weight, states):
    """Plain parts without gaps are stepped as one long row."""
    given = case(BUSY["AdamW"], weight, states)
    parts, grad, wanted = whole(given, 100, 3)
    apart = torch.zeros(100, 5)
    apart[:, :3] = grad
    native_step(given, parts, apart[:, :3], 5)
    assert differences(wanted, parts) == {}


@each_codec
def test_rows_that_lie_apart(weight, states):
    """Views of every third row."""
    given = case(BUSY["AdamW"], weight, states)
    parts, grad, wanted = whole(given)
    apart = [{name: part.new_zeros(36, part.shape[1]) for name, part in one.items()} for one in parts]
    views = [{name: part[1::3] for name, part in one.items()} for one in apart]
    for view, one in zip(views, parts, strict=True):
        for name, part in one.items():
            view[name].copy_(part)
    native_step(given, views, grad.repeat_interleave(3, 0)[::3], 5)
    assert differences(wanted, [{name: part.contiguous() for name, part in view.items()} for view in views]) == {}
    assert not any(part[0::3].any() or part[2::3].any() for one in apart for part in one.values())


@each_codec
@pytest.mark.parametrize("rows, threads", [(12, 2), (12, 5), (1, 3), (2, 7)])
def test_threads(weight, states, rows, threads, monkeypatch):
    given = case(BUSY["AdamW"], weight, states)
    parts, grad, wanted = whole(given, rows)
    monkeypatch.setattr(over, "THREAD_WORK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    native_step(given, parts, grad, 5)
    assert differences(wanted, parts) == {}


@pytest.mark.parametrize("rows, columns, count", [(12, 700, 5), (1, 700, 3), (1, 100, 4), (3, 1, 7), (2, 1280, 4)])
def test_shares_cover_a_tile_once(rows, columns, count):
    seen = torch.zeros(rows, columns)
    shares = over.cut(rows, columns, count)
    for top, bottom, left, right in shares:
        seen[top:bottom, left:right] += 1
        assert left % 128 == 0 and (right % 128 == 0 or right == columns)
    assert bool((seen == 1).all()) and len(shares) <= count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    given = case(BUSY["Lion"])
    parts, grad = make(given, (8, 200))
    monkeypatch.setattr(over, "THREAD_WORK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    native_step(given, parts, grad)
    child = os.fork()
    if not child:
        native_step(given, parts, grad)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_tiles(shape):
    given = case(BUSY["AdamW"], "bf16 stochastic", "int8")
    parts, grad = make(given, shape)
    native_step(given, parts, grad)


def test_tensors_that_do_not_fit():
    """C would believe everything."""
    given = case(BUSY["Lion"], "bf16 stochastic", "int8")
    parts, grad = make(given, (4, 256))
    kernel = given.kernel()
    assert kernel is not None

    def step(grad=grad, keys=None):
        kernel(parts[0], parts[1:], grad, given.numbers, keys or given.keys(), 0, 256)

    before = clone(parts)
    with pytest.raises(ValueError, match="values: torch.bfloat16"):
        step(grad=grad[:, :128])
    with pytest.raises(ValueError, match="grad: torch.float64"):
        step(grad=grad.double())
    with pytest.raises(ValueError, match="adjacent columns"):
        step(grad=grad.t().contiguous().t())
    with pytest.raises(ValueError, match=r"keys\[0\]"):
        step(keys=[None, None])
    assert differences(before, parts) == {}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fake_tensors_have_no_memory():
    given = case(BUSY["Lion"])
    with FakeTensorMode():
        parts = [{"values": torch.zeros(2, 3)} for _ in range(2)]
    with pytest.raises((ValueError, RuntimeError), match="without memory|FakeTensor"):
        native_step(given, parts, torch.zeros(2, 3))


def test_a_graph_that_saved_the_old_weight_is_stale():
    given = case(BUSY["Lion"])
    weight = torch.nn.Parameter(torch.ones(2, 3))
    loss = weight.pow(2).sum()
    native_step(given, [{"values": weight.detach()}, {"values": torch.zeros(2, 3)}], torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_keys_of_two_parameters():
    given = case(BUSY["AdamW"], "bf16 stochastic", "int8")
    parts, grad = make(given, (4, 256))
    kernel, keys = given.kernel(), given.keys()
    assert kernel is not None
    with pytest.raises(ValueError, match="share their first word"):
        kernel(parts[0], parts[1:], grad, given.numbers, [keys[0], None, keys[2] + 1], 0, 256)
