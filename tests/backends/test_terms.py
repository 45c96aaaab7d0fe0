"""Gradients that are computed a few rows at a time, against plain loops: every kind of use, alone and together."""

import numpy as np
import pytest
import torch

from gradfold import _torch
from gradfold.backends import DenseTerm, GatherTerm, MatmulTerm, Reference, Scratch, Stored, cpu_gemm, terms
from gradfold.rules import Rule
from tests import oracle
from tests.cases import MATMULS, SHAPES

SCRATCH_BYTES = [1, 2000, 2**23]  # a row at a time, a few rows, everything


class Capture(Rule):
    """Leaves in the weight the gradient that a rule would see."""

    name = "capture"
    counters = {}

    def states(self, group):
        return ()

    def scratch_tiles(self, group):
        return 0

    def update(self, weight, grad, states, numbers, scratch):
        weight.copy_(grad)


class FusedCapture(Capture):
    """The same by way of the fused path."""

    def fused(self, weight, grad, states, numbers):
        weight.copy_(grad)


PATHS = {"plain": Capture(), "fused": FusedCapture()}


def gradients(shape, parts, dtype=torch.float64):
    """The sum of these uses by the backend, from scratch memory full of NaN, on either path and in all tilings."""
    for path, rule in PATHS.items():
        for scratch_bytes in SCRATCH_BYTES:
            weight = torch.full(shape, float("nan"), dtype=dtype)
            Reference(Scratch(scratch_bytes)).step(Stored.plain(weight), [], parts, rule, {}, None)
            yield f"{path}, scratch_bytes={scratch_bytes}", weight


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def exactly(x):
    return x.detach().double().numpy()


def check(parts, want, scale, tolerance=1e-14, dtype=torch.float64):
    """``scale``: the same sum over absolute values, so that cancellation is not held against anybody."""
    for how, got in gradients(want.shape, parts, dtype):
        error = np.linalg.norm(exactly(got) - want)
        assert error <= tolerance * np.linalg.norm(scale), f"{how}: off by {error:.1e}"


# matrix products ------------------------------------------------------------------------------------------------------


def as_it_is(x):
    return x


def transposed(x):
    return x.t().contiguous().t()


def every_second_column(x):
    return torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(1)[:, ::2]


def every_second_row(x):
    return torch.stack([x, torch.full_like(x, float("nan"))], 1).reshape(-1, x.shape[1])[::2]


@pytest.mark.parametrize("shape", MATMULS, ids=str)
@pytest.mark.parametrize("layout", [as_it_is, transposed, every_second_column, every_second_row])
def test_matmul(shape, layout):
    T, N, K = shape
    dY, X = normal(T, N), normal(T, K)
    scale = oracle.linear_grad(abs(exactly(dY)), abs(exactly(X)))
    check([MatmulTerm(layout(dY), layout(X))], oracle.linear_grad(exactly(dY), exactly(X)), scale)


@pytest.mark.parametrize("shape", MATMULS, ids=str)
def test_conv1d_is_the_transposed_matmul(shape):
    T, N, K = shape
    dY, X = normal(T, N), normal(T, K)
    scale = oracle.conv1d_grad(abs(exactly(dY)), abs(exactly(X)))
    check([MatmulTerm(X, dY)], oracle.conv1d_grad(exactly(dY), exactly(X)), scale)


@pytest.mark.parametrize("expand", [(1, 1), (5, 1), (1, 4)], ids=["scalar", "column", "row"])
def test_expanded_dy(expand):
    """``loss.sum()`` and means over a dimension hand down gradients whose strides are zero."""
    dY, X = normal(*expand).expand(5, 4), normal(5, 3)
    scale = oracle.linear_grad(abs(exactly(dY)), abs(exactly(X)))
    check([MatmulTerm(dY, X)], oracle.linear_grad(exactly(dY), exactly(X)), scale)


@pytest.mark.parametrize("shape", MATMULS, ids=str)
@pytest.mark.parametrize(
    ("operands", "weight", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, 2**-8),
        (torch.float16, torch.float16, 2**-10),
        (torch.bfloat16, torch.float32, 2**-8),  # autocast
    ],
    ids=str,
)
@pytest.mark.parametrize("native", [True, False], ids=["native", "emulated"])
def test_low_precision_matmul(shape, operands, weight, tolerance, native, monkeypatch):
    monkeypatch.setattr(_torch, "multiplies", lambda dtype: native)  # whether this processor has bf16 instructions
    monkeypatch.setattr(cpu_gemm, "BLOCK_BYTES", 1)  # several blocks of tokens
    T, N, K = shape
    dY, X = normal(T, N, dtype=operands), normal(T, K, dtype=operands)
    scale = oracle.linear_grad(abs(exactly(dY)), abs(exactly(X)))
    check([MatmulTerm(dY, X)], oracle.linear_grad(exactly(dY), exactly(X)), scale, tolerance, weight)


# embeddings -----------------------------------------------------------------------------------------------------------

ROWS = 9
IDS = {
    "no token": torch.zeros(0, dtype=torch.long),
    "one token": torch.tensor([4]),
    "first and last row": torch.tensor([ROWS - 1, 0, ROWS - 1]),
    "all the same": torch.full((7,), 3),
    "unsorted repeats": torch.tensor([5, 1, 5, 8, 1, 1, 0]),
    "a batch": torch.tensor([[2, 7, 2], [8, 2, 0]]),
    "int32": torch.tensor([6, 6, 1], dtype=torch.int32),
    "strided": torch.arange(ROWS).repeat(2)[::2],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("padding_idx", [None, 0, 1, ROWS - 1])
@pytest.mark.parametrize("chunk_bytes", [1, 2**20])
def test_gather(ids, padding_idx, chunk_bytes, monkeypatch):
    monkeypatch.setattr(terms, "GATHER_BYTES", chunk_bytes)  # a token at a time, or all of them
    dY = normal(*ids.shape, 3)
    kept = dY.clone()
    flat = exactly(dY).reshape(-1, 3)
    scale = oracle.embedding_grad(ids.numpy(), abs(flat), ROWS)
    check([GatherTerm(ids, dY, padding_idx)], oracle.embedding_grad(ids.numpy(), flat, ROWS, padding_idx), scale)
    assert torch.equal(dY, kept), "autograd's tensor is not ours to change"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gather_of_expanded_dy(dtype):
    ids = torch.tensor([5, 1, 5])
    ones = torch.ones(1, dtype=dtype).expand(3, 4)
    want = np.zeros((ROWS, 4))
    want[5], want[1] = 2, 1
    check([GatherTerm(ids, ones)], want, want, 0, dtype)


@pytest.mark.parametrize("native", [True, False], ids=["native", "emulated"])
def test_bfloat16_gather_errs_no_more_than_torch(native, monkeypatch):
    """A frequent token: thousands of summands in one row."""
    monkeypatch.setattr(_torch, "multiplies", lambda dtype: native)
    ids = torch.randint(0, 3, (1000,))
    dY = normal(1000, 8, dtype=torch.bfloat16)
    weight = torch.zeros(ROWS, 8, dtype=torch.bfloat16, requires_grad=True)
    torch.nn.functional.embedding(ids, weight).backward(dY)
    want = oracle.embedding_grad(ids.numpy(), exactly(dY), ROWS)
    theirs = np.linalg.norm(exactly(weight.grad) - want)
    for how, got in gradients((ROWS, 8), [GatherTerm(ids, dY)], torch.bfloat16):
        assert np.linalg.norm(exactly(got) - want) <= 1.05 * theirs, how


# dense, and all together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_dense(shape):
    grad = normal(*shape)
    check([DenseTerm(grad)], exactly(grad), exactly(grad), 0)
    check([DenseTerm(grad), DenseTerm(grad.float())], 2 * exactly(grad), exactly(grad), 1e-7)


def test_dense_that_is_expanded_or_strided():
    for grad in (torch.ones(1, dtype=torch.float64).expand(5, 3), normal(3, 5).t(), normal(5, 6)[:, ::2]):
        kept = grad.clone()
        check([DenseTerm(grad)], exactly(grad), exactly(grad), 0)
        assert torch.equal(grad, kept)


def mixed_uses():
    """A tied head's weight [9, 4]: two products, two lookups and a direct use; with their gradients by loops."""
    dY, X, E = normal(6, ROWS), normal(6, 4), normal(7, 4)
    ids, dense = IDS["unsorted repeats"], normal(ROWS, 4)
    one = oracle.linear_grad(exactly(dY), exactly(X))
    two = oracle.embedding_grad(ids.numpy(), exactly(E), ROWS, 1)
    return {
        "matmul": (lambda: MatmulTerm(dY, X), one),
        "gather": (lambda: GatherTerm(ids, E, 1), two),
        "dense": (lambda: DenseTerm(dense), exactly(dense)),
    }


@pytest.mark.parametrize(
    "kinds",
    [
        ("matmul", "gather"),
        ("gather", "matmul"),
        ("dense", "gather", "matmul"),
        ("matmul", "matmul", "gather", "gather", "dense"),
        ("gather", "dense", "gather"),
        ("dense", "dense"),
    ],
    ids="+".join,
)
def test_uses_of_several_kinds_add_up(kinds):
    parts = mixed_uses()
    want = sum(parts[kind][1] for kind in kinds)
    check([parts[kind][0]() for kind in kinds], want, sum(abs(parts[kind][1]) for kind in kinds), 2e-14)


@pytest.mark.parametrize("native", [True, False], ids=["native", "emulated"])
def test_uses_of_several_dtypes_add_up(native, monkeypatch):
    """Under autocast one use of a fp32 weight is bf16 and another fp32."""
    monkeypatch.setattr(_torch, "multiplies", lambda dtype: native)
    low = [normal(6, n, dtype=torch.bfloat16) for n in (ROWS, 4)]
    full = [normal(5, n, dtype=torch.float32) for n in (ROWS, 4)]
    ids, rows = IDS["unsorted repeats"], normal(7, 4, dtype=torch.bfloat16)
    dense = normal(ROWS, 4, dtype=torch.float64)
    parts = [MatmulTerm(*low), MatmulTerm(*full), GatherTerm(ids, rows), DenseTerm(dense)]
    want = [
        oracle.linear_grad(exactly(low[0]), exactly(low[1])),
        oracle.linear_grad(exactly(full[0]), exactly(full[1])),
        oracle.embedding_grad(ids.numpy(), exactly(rows), ROWS),
        exactly(dense),
    ]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        check([parts[i] for i in order], sum(want), sum(map(abs, want)), 2**-8, torch.float32)


# streams, of which this machine has none: what is asked of CUDA ------------------------------------------------------


class Stream:
    """Writes down what it is told to wait for."""

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


class OnDevice(torch.Tensor):
    """A tensor that says that it lies on a GPU, and for which streams it has been kept."""

    is_cuda = True

    def record_stream(self, stream):
        self.__dict__.setdefault("kept_for", []).append(stream)


CUDA = torch.device("cuda", 0)


@pytest.fixture
def streams(monkeypatch):
    """Two streams, and a function that makes one of them the current one."""
    found = Stream(), Stream()
    current = lambda index: monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found[index])  # noqa: E731
    return *found, current


def on_device(*shape):
    return torch.zeros(*shape).as_subclass(OnDevice)


def term_of(kind):
    left, right = on_device(4, 6), on_device(4, 3)
    made = {
        "product": lambda: MatmulTerm(left, right),
        "dense": lambda: DenseTerm(right),
        "bias": lambda: terms.BiasTerm(left),
    }
    return made[kind]()


@pytest.mark.parametrize("kind", ["product", "dense", "bias"])
def test_a_term_of_the_same_stream_waits_for_nothing(kind, streams):
    first, _, current = streams
    term = term_of(kind)
    current(0)
    term.record(CUDA)
    term.wait(CUDA)
    assert first.waited == [] and not any(hasattr(one, "kept_for") for one in term.tensors)


@pytest.mark.parametrize("kind", ["product", "dense", "bias"])
def test_a_term_of_another_stream_is_waited_for_and_kept(kind, streams):
    first, second, current = streams
    term = term_of(kind)
    current(0)
    term.record(CUDA)
    current(1)
    term.wait(CUDA)
    assert second.waited == [first] and first.waited == []
    assert all(one.kept_for == [second] for one in term.tensors)


def test_what_is_made_of_a_term_was_made_where_it_was(streams):
    first, second, current = streams
    term = term_of("product")
    current(0)
    term.record(CUDA)
    current(1)
    term.narrow(0, 0, 2).wait(CUDA)
    assert second.waited == [first]


def test_terms_of_the_cpu_ask_for_no_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("asked"))
    term = MatmulTerm(torch.zeros(4, 6), torch.zeros(4, 3))
    term.record(torch.device("cpu"))
    term.wait(torch.device("cpu"))
