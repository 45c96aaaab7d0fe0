"""Subclasses of Embedding, Linear and Conv1D with a forward of their own: by super().forward, or by their weight."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import gradfold
from gradfold.errors import FoldError
from tests.zoo import compare, distance, ours, torchs, twins

V, H, N = 40, 6, 12


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3.0


class Twice(Scaled):
    def forward(self, ids, shift=0):
        return super().forward((ids + shift) % V).tanh()


class Inherits(Twice):
    pass


class Named(nn.Embedding):
    def forward(self, ids):
        return super(Named, self).forward(ids) + 1  # noqa: UP008


class Halves:
    def forward(self, ids):
        return super().forward(ids) / 2


class Mixed(Halves, nn.Embedding):
    pass


def logged(forward):
    @functools.wraps(forward)
    def wrapped(*args):
        return forward(*args)

    return wrapped


class Decorated(nn.Embedding):
    @logged
    def forward(self, ids):
        return super().forward(ids) * 2


class ReadsItsWeight(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * self.weight.square().mean()


class Either(nn.Embedding):
    """Ovis' visual table: a lookup of words, a product with probabilities."""

    def forward(self, x):
        return x @ self.weight if x.is_floating_point() else super().forward(x)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x.tanh()) * 0.5


class ScaledConv1D(Conv1D):
    def forward(self, x):
        return super().forward(x) * 0.5


class Looks(nn.Embedding):
    def forward(self, ids):
        return F.embedding(ids, self.weight) * 3.0


class Direct(nn.Embedding):
    def forward(self, ids):
        return nn.Embedding.forward(self, ids) * 3.0


class Other(nn.Embedding):
    """It takes ``super()``, and a ``forward``, but not that of ``super()``."""

    def __init__(self, *size):
        super().__init__(*size)
        self.inner = nn.Identity()

    def forward(self, ids):
        assert super().extra_repr()
        return self.inner.forward(self.weight[ids])


class Matmul(nn.Linear):
    """Falcon's."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def hidden(forward):
    return lambda *args: [forward(*args)][0]


class Hidden(nn.Embedding):
    @hidden
    def forward(self, ids):
        return super().forward(ids) * 2


def embedding(kind):
    return lambda: nn.Sequential(kind(V, H), nn.Linear(H, N))


def linear(kind):
    return lambda: nn.Sequential(nn.Embedding(V, H), kind(H, N), nn.Linear(N, N))


FOLDED = {kind.__name__: embedding(kind) for kind in (Scaled, Twice, Inherits, Named, Mixed, Decorated)}
FOLDED |= {"ScaledLinear": linear(ScaledLinear), "ScaledConv1D": linear(lambda nx, nf: ScaledConv1D(nf, nx))}
# whose forward uses the weight itself: folded by what it does with it
READING = {kind.__name__: embedding(kind) for kind in (Looks, Direct, Other, Hidden)} | {"Matmul": linear(Matmul)}
PARTLY = {kind.__name__: embedding(kind) for kind in (ReadsItsWeight, Either)}  # folded, and used beside


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def ids(step=0):
    return torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(step))


def backward(model, optimizer, step):
    model(ids(step)).square().sum().backward()


def special(model):
    """The module that the row is about."""
    return next(one for one in model if type(one).__name__ not in ("Embedding", "Linear"))


@pytest.mark.parametrize("name", [*FOLDED, *READING, *PARTLY])
def test_training(name):
    assert compare((FOLDED | READING | PARTLY)[name], backward) <= 1e-12


@pytest.mark.parametrize("name", [*FOLDED, *READING])
def test_no_dense_gradient(name):
    model = (FOLDED | READING)[name]()
    gradfold.fold(model, ours(model))
    loss = model(ids()).square().sum()
    with Operators() as operators:
        loss.backward()
    assert not {"embedding_dense_backward", "index_put", "_index_put_impl_"}.intersection(operators.ran)


@pytest.mark.parametrize("name", [*FOLDED, *READING])
def test_the_report_says_which(name):
    """Of a forward that uses the weight itself, once a backward has shown it."""
    model = (FOLDED | READING)[name]()
    weight = next(n for n, p in model.named_parameters() if p is special(model).weight)
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer)
    for step in range(2):  # before a backward, and after one
        row = next(row for row in fold.report().rows if row.name == weight)
        assert row.route == ("folded" if name in FOLDED or step else "hooked")
        assert ("no backward has shown" in row.why) == (row.route == "hooked")
        assert (row.handed, row.dense) == (step, 0)
        backward(model, optimizer, step)
        optimizer.step()


@pytest.mark.parametrize("name", PARTLY)
def test_what_happened_decides(name):
    """Such a forward may or may not use the weight otherwise, which a backward tells."""
    model = PARTLY[name]()
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer)
    row = fold.report().rows[0]
    assert (row.route, row.why) == ("folded", "")
    x = F.one_hot(ids(), V).float() if name == "Either" else ids()
    model(x).square().sum().backward()
    row = fold.report().rows[0]
    assert (row.route, row.dense) == ("hooked", 1)
    assert "0.weight: hooked, since a dense gradient of it was made once" in str(fold.report())


@pytest.mark.parametrize("tied", [Scaled, Looks])
def test_tied_to_a_head(tied):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = tied(V, H), nn.Linear(H, V, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids).tanh())

    assert compare(Tied, backward) <= 1e-12
    model = Tied()
    fold = gradfold.fold(model, ours(model))
    (row,) = fold.report().rows
    assert row.route == ("folded" if tied is Scaled else "hooked")
    if tied is Looks:
        assert "a forward uses it itself" in row.why
    backward(model, None, 0)
    (row,) = fold.report().rows
    assert (row.route, row.handed, row.dense) == ("folded", 1, 0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [Scaled, ReadsItsWeight, Either])
def test_in_two_checkpoints(kind, reentrant):
    """A forward that also reads the weight itself is not seen by the fold in its first pass."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.bias = kind(V, H), nn.Linear(H, H), nn.Parameter(torch.zeros(H))

        def forward(self, ids):
            x = self.mix(self.bias)
            words = F.one_hot(ids, V).to(x.dtype) if kind is Either else ids
            for _ in range(3):
                x = checkpoint(lambda x: self.embed(words) + x, x, use_reentrant=reentrant).tanh()
            return self.mix(x)

    assert compare(Net, backward) <= 1e-12


def test_it_looks_as_before():
    for name, make in FOLDED.items():
        model = make()
        kind = type(special(model))
        plain = copy.deepcopy(model)
        fold = gradfold.fold(model, ours(model))
        module = special(model)
        assert isinstance(module, kind) and str(model) == str(plain) and type(module).__name__ == kind.__name__, name
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(special(copied)) is kind
            assert torch.equal(copied(ids()), plain(ids()))
        fold.remove()
        assert type(module) is kind


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}], ids=str)
def test_what_an_embedding_may_not_do(options):
    model = Scaled(V, H, **options)
    with pytest.raises(FoldError, match=next(iter(options))):
        gradfold.fold(model, ours(model))
    assert type(model) is Scaled


def test_a_forward_replaced_afterwards():
    """Until a backward has shown what it does."""
    model = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, N))
    fold = gradfold.fold(model, ours(model))
    model[1].forward = lambda x: F.linear(x, model[1].weight, model[1].bias)
    row = fold.report().rows[1]
    assert (row.route, row.why) == ("hooked", "the forward of 1 was replaced")
    backward(model, None, 0)
    row = fold.report().rows[1]
    assert row.route == "hooked" and "dense gradient of it was made once" in row.why


def test_a_wrapper_that_runs_it_is_no_replacement():
    model = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, N))
    fold = gradfold.fold(model, ours(model))
    model[1].forward = functools.partial(lambda forward, x: forward(x), model[1].forward)
    backward(model, None, 0)
    row = fold.report().rows[1]
    assert (row.route, row.why, row.handed) == ("folded", "", 1)


def test_accumulated_and_clipped():
    plain, folded = twins(FOLDED["Scaled"])
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine, accumulate=2, clip_norm=0.1)
    for model, optimizer in ((plain, theirs), (folded, mine)):
        for step in range(2):
            for micro in range(2):
                backward(model, optimizer, 2 * step + micro)
            if model is plain:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-12
