"""Coded weights and states through the reference backend: any gradient, any layout, any cut, compiled or not."""

import pytest
import torch
from torch import nn

import gradfold
from gradfold.backends import DenseTerm, GatherTerm, MatmulTerm, Reference, Scratch, Stored, decode_step_encode, native
from gradfold.backends.quantized import block_shape
from gradfold.codecs import Stream, state_codec, weight_codec
from gradfold.planner.trace import LiveBytes
from gradfold.rules import AdamRule

KIB = 2**10
GROUP = {
    "lr": 0.01,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "amsgrad": False,
    "maximize": False,
    "decoupled_weight_decay": True,
}
LAYOUTS = {
    "linear": lambda: torch.randn(60, 300),
    "narrow": lambda: torch.randn(40, 31),
    "vector": lambda: torch.randn(301),
    "scalar": lambda: torch.randn(()),
    "experts": lambda: torch.randn(3, 20, 150),
    "conv": lambda: torch.randn(12, 4, 3, 3),
    "big kernels": lambda: torch.randn(6, 3, 16, 16),
    "transposed": lambda: torch.randn(300, 60).t(),
    "channels last": lambda: torch.randn(12, 40, 3, 3).to(memory_format=torch.channels_last),
    "every other": lambda: torch.randn(602)[::2],
    "one row": lambda: torch.randn(1, 700),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=["compiled", "eager"])
def form(request, monkeypatch):
    if request.param == "compiled":
        request.getfixturevalue("compiler")
    monkeypatch.setenv("GRADFOLD_COMPILE", "1" if request.param == "compiled" else "0")
    yield request.param
    assert request.param == "eager" or native.reason() is None, "it was not compiled"


class Coded:
    """One parameter with int8 states and a split8 master, stepped straight through the backend."""

    def __init__(self, values, states="int8", master="split8"):
        self.weight = torch.empty_strided(values.shape, values.stride(), dtype=torch.bfloat16).copy_(values)
        self.codec = weight_codec(torch.bfloat16, master)
        parts = {k: v for k, v in self.codec.allocate(values.shape).items() if k != "values"}
        self.parts = {"values": self.weight, **parts}
        self.codecs = [state_codec(states, signed=signed) for signed in (True, False)]
        self.states = [codec.allocate(values.shape) for codec in self.codecs]
        self.counters = {"step": torch.tensor(0.0)}

    def step(self, uses, scratch_bytes=2**20):
        backend = Reference(Scratch(scratch_bytes))
        numbers = AdamRule().advance(self.counters, GROUP, True)
        step = int(self.counters["step"])

        def stored(name, parts, codec):
            return Stored(parts, codec, Stream.of(0, step, "w", name) if codec.stochastic else None)

        weight = stored("weight", self.parts, self.codec)
        states = [stored(n, p, c) for n, p, c in zip(("m", "v"), self.states, self.codecs, strict=True)]
        with torch.no_grad():
            backend.step(weight, states, uses, AdamRule(), GROUP, numbers)
        return sum(t.numel() for t in backend.scratch_tensors())

    def bits(self):
        return [*self.parts.values(), *(part for state in self.states for part in state.values())]


@each_layout
def test_any_layout_in_any_cut_is_the_contiguous_one(layout, form):
    values = LAYOUTS[layout]()
    grads = [torch.randn(values.shape) for _ in range(3)]
    plain = Coded(values.contiguous())
    for grad in grads:
        plain.step([DenseTerm(grad)])
    for scratch_bytes, dtype in ((1, torch.float32), (3_000, torch.float64), (2**20, torch.float32)):
        coded = Coded(values)
        assert coded.weight.stride() == values.stride()
        for grad in grads:
            coded.step([DenseTerm(grad.to(dtype))], scratch_bytes)
        for a, b in zip(plain.bits(), coded.bits(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("compiler")
def test_compiled_and_eager_agree(monkeypatch):
    """To the rounding of single operations: the last bits of a 32-bit master, a code here and there."""
    grads = [torch.randn(60, 300) for _ in range(4)]
    results = []
    for compiled in ("1", "0"):
        monkeypatch.setenv("GRADFOLD_COMPILE", compiled)
        torch.manual_seed(0)
        coded = Coded(LAYOUTS["linear"](), master="split16")
        for grad in grads:
            coded.step([DenseTerm(grad)])
        results.append(coded.bits())
        assert (native.reason() is None) == (compiled == "1")
    for a, b in zip(*results, strict=True):
        assert (a == b).float().mean() > (0.95 if a.dtype == torch.int16 else 0.999)


def test_the_gradient_of_every_use_is_summed_in_fp32(form):
    """Whole numbers: the sum is exact in any order, and the bits are those of the dense gradient."""
    whole = lambda *shape: torch.randint(-3, 4, shape).float()  # noqa: E731
    dY, X, ids, rows, dense = whole(7, 50), whole(7, 200), torch.randint(0, 50, (9,)), whole(9, 200), whole(50, 200)
    total = dY.t() @ X + dense + torch.zeros(50, 200).index_add(0, ids, rows)
    values = torch.randn(50, 200)
    wanted = Coded(values)
    wanted.step([DenseTerm(total)])
    for dtype in (torch.float32, torch.bfloat16):
        for scratch_bytes in (1, 5_000, 2**20):
            coded = Coded(values)
            uses = [MatmulTerm(dY.to(dtype), X.to(dtype)), GatherTerm(ids, rows.to(dtype)), DenseTerm(dense.to(dtype))]
            coded.step(uses, scratch_bytes)
            for a, b in zip(wanted.bits(), coded.bits(), strict=True):
                assert torch.equal(a, b)


def test_a_gradient_that_is_given_stays_as_it_is(form):
    param = nn.Parameter(torch.randn(64, 128))
    optimizer = gradfold.Adam([param], states="int8", weight_decay=0.1, maximize=True)
    param.grad = torch.randn(64, 128)
    before = param.grad.clone()
    optimizer.step()
    assert torch.equal(param.grad, before)


@each_layout
def test_scratch_is_bounded(layout):
    values = LAYOUTS[layout]()
    row_bytes = 4 * block_shape(values)[1]
    for scratch_bytes in (1, 4 * row_bytes, 64 * KIB):
        held = Coded(values).step([DenseTerm(torch.randn(values.shape).double())], scratch_bytes)
        assert held <= max(scratch_bytes, row_bytes + 8)


def test_experts_are_cut_inside_one():
    """``[3, 20, 150]`` with its gradient there: a block may begin at any of the 60 rows."""
    values = LAYOUTS["experts"]()
    assert block_shape(values) == (3, 3_000)
    assert block_shape(values, [DenseTerm(values)]) == (60, 150)
    assert Coded(values).step([DenseTerm(torch.randn(values.shape).double())], 10_000) <= 10_000


def test_eager_temporaries_do_not_grow_with_the_weight(monkeypatch):
    monkeypatch.setenv("GRADFOLD_COMPILE", "0")
    peaks = []
    for rows in (256, 2048):
        coded, grad = Coded(torch.randn(rows, 1024)), torch.randn(rows, 1024)
        with LiveBytes(timeline=False) as live:
            live.track(coded.bits(), grad)
            at_rest = live.now_bytes
            held = coded.step([DenseTerm(grad)])  # scratch memory, of a size of its own
            peaks.append(live.peak_bytes - at_rest - held)
    assert peaks[1] <= peaks[0] + 64 * KIB  # row indices
    assert peaks[1] <= 20 * 4 * decode_step_encode.PANE_ELEMENTS


def test_panes_cover_a_tile_once_and_begin_on_blocks():
    for rows, columns, elements in ((5, 700, 300), (3, 100, 1000), (1000, 7, 50), (1, 1, 1), (0, 5, 10), (4, 0, 10)):
        seen = torch.zeros(rows, columns)
        for height, width in decode_step_encode.panes(rows, columns, elements):
            assert width.start % 128 == 0
            assert (height.stop - height.start) * (width.stop - width.start) <= max(elements, 128 + columns % 128)
            seen[height, width] += 1
        assert (seen == 1).all()


def test_a_step_on_fake_tensors_allocates_what_a_real_one_does(form):
    """The planner's premise, with codes."""
    from gradfold.planner.step import measure_step, step_memory

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(256, 512, dtype=torch.bfloat16), nn.Linear(512, 100, dtype=torch.bfloat16))

    def optimizer(params):
        return gradfold.AdamW(params, states="int8", master="split8")

    def loss(model, batch):
        return model(batch).float().logsumexp(-1).sum()

    batch, model = torch.randn(16, 256).bfloat16(), build()
    predicted = step_memory(build, optimizer, batch, loss=loss)
    measured = measure_step(model, optimizer(model.parameters()), batch, fold=True, loss=loss)
    assert predicted.resting_bytes == measured.resting_bytes
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.002)
