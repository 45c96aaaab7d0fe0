"""Forwards that use their weights themselves: each function of torch that has a handler, and what has none."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.planner.trace import LiveBytes
from tests.zoo import compare, distance, ours, torchs, twins

V, H, N = 20, 6, 9


class Reads(nn.Module):
    """``use(x, weight, bias)`` with a weight [N, H] and tokens x [B, T, H]."""

    def __init__(self, use, *shape):
        super().__init__()
        self.use = use
        self.weight = nn.Parameter(torch.randn(*(shape or (N, H))) * 0.3)
        self.bias = nn.Parameter(torch.randn(N) * 0.3)

    def forward(self, x):
        return self.use(x, self.weight, self.bias)


class Net(nn.Module):
    def __init__(self, use, *shape, run=lambda module, x: module(x)):
        super().__init__()
        self.embed, self.reads, self.run = nn.Embedding(V, H), Reads(use, *shape), run

    def forward(self, ids):
        return self.run(self.reads, self.embed(ids).tanh())


def halves(x, w, b):
    top, rest = w.split([4, 5])
    return torch.cat([F.linear(x, rest, b[4:]), x @ top.t() + b[:4]], -1)


FOLDED = {
    "linear": F.linear,
    "linear_keywords": lambda x, w, b: F.linear(input=x, bias=b, weight=w),
    "one_token": lambda x, w, b: F.linear(x[0, 0], w),
    "matmul": lambda x, w, b: x @ w.T + b,
    "torch_matmul": lambda x, w, b: torch.matmul(x, w.transpose(0, 1)),
    "weight_first": lambda x, w, b: w @ x[0].T,
    "weight_vector": lambda x, w, b: w @ x[0, 0],
    "mm": lambda x, w, b: torch.mm(x[0], w.t()),
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()),
    "chunk": lambda x, w, b: torch.cat([F.linear(x, part) for part in w.chunk(3)], -1),
    "split": halves,
    "rows": lambda x, w, b: F.linear(x, w[2:5]),
    "rows_of_rows": lambda x, w, b: x @ w[1:][2:5].T,
    "twice": lambda x, w, b: F.linear(x, w) * F.linear(x.tanh(), w[:]),
    "rows_as_inputs": lambda x, w, b: F.linear(x, w) @ w,
    "some_rows_as_inputs": lambda x, w, b: F.linear(x, w)[..., 3:7] @ w[3:7],
    "items": lambda x, w, b: w[torch.tensor([[1, -2], [1, 3]])],
    "index_select": lambda x, w, b: torch.index_select(w, 0, torch.tensor([1, 1, 3])),
    "embedding": lambda x, w, b: F.embedding(torch.tensor([[1, 2], [1, 3]]), w, padding_idx=-7),
}  # fmt: skip
SHAPED = {
    "squeezed": ((N, H, 1), lambda x, w, b: F.linear(x, w.squeeze(-1), b)),
    "flattened": ((N, 2, 3), lambda x, w, b: x @ w.flatten(1).T),
    "convolution": ((N, H, 3), lambda x, w, b: F.conv1d(x.transpose(1, 2), w, b, padding=1)),
}
DENSE = {
    "arithmetic": lambda x, w, b: F.linear(x, w * 2),
    "columns": lambda x, w, b: F.linear(x[..., :3], w[:, :3]),
    "steps": lambda x, w, b: F.linear(x, w[::2]),
    "scaled_sum": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t(), alpha=2.0),
    "inner_checkpoint": lambda x, w, b: checkpoint(lambda x: F.linear(x, w, b), x, use_reentrant=False),
    "max_norm": lambda x, w, b: F.embedding(torch.tensor([1, 2]), w.clone(), max_norm=1.0),
}


def ids(step):
    return torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(step))


def backward(model, optimizer, step):
    model(ids(step)).square().sum().backward()


def route(model, step=backward):
    fold = gradfold.fold(model, ours(model))
    before = {row.name: row for row in fold.report().rows}["reads.weight"]
    assert before.route == "hooked" and "no backward has shown" in before.why
    step(model, None, 0)
    return {row.name: row for row in fold.report().rows}["reads.weight"].route


@pytest.mark.parametrize("name", [*FOLDED, *SHAPED, *DENSE])
def test_steps_as_torch(name):
    shape, use = SHAPED.get(name) or ((), (FOLDED | DENSE)[name])  # fmt: skip
    assert compare(lambda: Net(use, *shape), backward) <= 1e-12
    assert route(Net(use, *shape)) == ("hooked" if name in DENSE else "folded")


@pytest.mark.parametrize("name", ["linear", "split", "items", "some_rows_as_inputs"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_checkpoints(name, reentrant):
    def run(module, x):
        for _ in range(2):
            x = x + checkpoint(module, x, use_reentrant=reentrant).sum() * 0.01
        return x + module(x).sum() * 0.1

    assert compare(lambda: Net(FOLDED[name], run=run), backward) <= 1e-12
    assert route(Net(FOLDED[name], run=run)) == "folded"


@pytest.mark.parametrize("name", ["split", "convolution"])
@pytest.mark.parametrize("working_set", [None, "out", "in"])
def test_accumulated_clipped_and_in_turns(name, working_set):
    shape, use = SHAPED.get(name) or ((), FOLDED[name])  # fmt: skip
    plain, folded = twins(lambda: Net(use, *shape))
    theirs, mine = torchs(plain), ours(folded)
    turns = working_set and gradfold.WorkingSet(chunks=1, axis=working_set)
    gradfold.fold(folded, mine, accumulate=2, clip_norm=0.1, working_set=turns)
    for model, optimizer in ((plain, theirs), (folded, mine)):
        for step in range(2):
            for micro in range(2):
                backward(model, optimizer, 2 * step + micro)
            if model is plain:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-12


def test_the_parameter_is_itself_everywhere():
    seen = []
    model = Net(lambda x, w, b: seen.append(w) or F.linear(x, w, b))
    weight = model.reads.weight
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer)
    backward(model, None, 0)
    optimizer.step()
    assert seen[0] is weight is model.reads.weight and type(model.reads).__name__ == "Reads"
    fold.remove()
    assert type(model.reads) is Reads and not vars(model.reads).keys() & {"_gradfold_reads"}


def test_copies_and_pickles_are_plain():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.MultiheadAttention(4, 2))
    gradfold.fold(model, ours(model))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(one) for one in copied] == [nn.Conv1d, nn.MultiheadAttention]


def test_autograd_grad_and_views_with_hooks():
    model = Net(FOLDED["split"]).double()
    plain = copy.deepcopy(model)
    gradfold.fold(model, ours(model))
    (mine,) = torch.autograd.grad(model(ids(0)).square().sum(), [model.reads.weight])
    (theirs,) = torch.autograd.grad(plain(ids(0)).square().sum(), [plain.reads.weight])
    assert (mine - theirs).abs().max() <= 1e-13

    def hooked(x, w, b):
        view = w.t()
        view.register_hook(lambda grad: grad * 2)
        return x @ view

    assert compare(lambda: Net(hooked), backward) <= 1e-12
    assert route(Net(hooked)) == "hooked"


def test_under_autocast():
    for use in (FOLDED["linear"], halves):
        model = Net(use)
        plain = copy.deepcopy(model)
        optimizers = ours(model, "SGD"), torchs(plain, "SGD")
        gradfold.fold(model, optimizers[0])
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = one(ids(0)).float().square().sum()
            loss.backward()
            optimizer.step()
        assert distance(model, plain) <= 1e-3


def test_no_gradient_of_attention_exists():
    width = 256
    model = nn.MultiheadAttention(width, 2, batch_first=True)
    optimizer = gradfold.SGD(model.parameters(), lr=1e-3)
    gradfold.fold(model, optimizer, scratch_bytes=2**17)
    x = torch.randn(1, 4, width)

    def step():
        model(x, x, x, need_weights=False)[0].square().sum().backward()
        optimizer.step()

    step()
    with LiveBytes() as live:
        live.track(model)
        before = live.now_bytes
        step()
        assert live.peak_bytes - before < model.out_proj.weight.nbytes  # of in_proj it would be three times that
