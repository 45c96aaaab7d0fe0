"""Whatever a module is called with, the training is plain torch's: ranks, layouts, operands, precisions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from tests.zoo import compare, distance, ours, recorded, torchs, twins

CLOSE = 1e-10


def randn(*shape, seed=5):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(y):
    return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).pow(2).sum()


# inputs ---------------------------------------------------------------------------------------------------------------

INPUTS = {
    "1d": lambda: randn(6),
    "2d": lambda: randn(3, 6),
    "3d": lambda: randn(2, 3, 6),
    "4d": lambda: randn(2, 1, 3, 6),
    "5d": lambda: randn(2, 1, 2, 2, 6),
    "no_rows": lambda: randn(0, 6),
    "no_batch": lambda: randn(0, 3, 6),
    "one_row": lambda: randn(1, 6),
    "transposed": lambda: randn(6, 3).t(),
    "strided": lambda: randn(3, 12)[:, ::2],
    "expanded": lambda: randn(1, 6).expand(4, 6),
    "permuted": lambda: randn(6, 2, 3).permute(1, 2, 0),
    "needs_grad": lambda: randn(3, 6).requires_grad_(),
    "sparse": lambda: torch.eye(6, dtype=torch.float64).to_sparse(),
}
LINEARS = {
    "bias": lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)),
    "no_bias": lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)),
    "in_place_after": lambda: nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3), nn.ELU(inplace=True)
    ),
    "frozen_bias": lambda: frozen(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), "0.bias"),
    "frozen_weight": lambda: frozen(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), "1.weight"),
    "no_features": lambda: nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 3)),
}


def frozen(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("model", LINEARS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_linear(model, kind):
    assert compare(LINEARS[model], lambda m, o, step: loss(m(INPUTS[kind]())).backward()) <= CLOSE


def test_nested_tensors():
    parts = [randn(3, 6), randn(2, 6)]

    def run(model, optimizer, step):
        x = torch.nested.nested_tensor(parts, layout=torch.jagged)
        loss(model(x).values()).backward()

    assert compare(LINEARS["bias"], run) <= CLOSE


IDS = torch.tensor([[1, 3, 3], [0, 6, 1]])
EMBEDDINGS = {
    "plain": (lambda: nn.Embedding(7, 6), IDS),
    "padding": (lambda: nn.Embedding(7, 6, padding_idx=3), IDS),
    "padding_from_the_end": (lambda: nn.Embedding(7, 6, padding_idx=-1), IDS),
    "only_padding": (lambda: nn.Embedding(7, 6, padding_idx=3), torch.full((2, 2), 3)),
    "by_frequency": (lambda: nn.Embedding(7, 6, scale_grad_by_freq=True), IDS),
    "int32": (lambda: nn.Embedding(7, 6), IDS.int()),
    "one_id": (lambda: nn.Embedding(7, 6), torch.tensor(3)),
    "no_ids": (lambda: nn.Embedding(7, 6), IDS[:0]),
    "one_row": (lambda: nn.Embedding(1, 6), torch.zeros(4, dtype=torch.long)),
    "strided_ids": (lambda: nn.Embedding(7, 6), IDS.t()),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embedding(kind):
    make, ids = EMBEDDINGS[kind]

    def run(model, optimizer, step):
        hidden = model[0](ids)
        hidden.mul_(2)
        loss(model[1](hidden)).backward()

    assert compare(lambda: nn.Sequential(make(), nn.Linear(6, 4)), run) <= CLOSE


def test_embedding_bag_and_others_are_hooked():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.conv = nn.EmbeddingBag(7, 6), nn.Conv1d(2, 2, 1)
            self.bilinear, self.prelu = nn.Bilinear(6, 6, 3), nn.PReLU()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, ids):
            x = self.prelu(self.conv(self.bag(ids)[:, None].expand(2, 2, 6)))
            return self.bilinear(x, x.roll(1, -1)) * self.scale

    assert compare(Other, lambda m, o, step: loss(m(IDS)).backward()) <= CLOSE


# what the operand or the output is ------------------------------------------------------------------------------------


class Query(nn.Module):
    """A parameter that is itself the input of Linears, as learned queries and label embeddings are."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.query = nn.Embedding(40, 6)
        self.project = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6)

    def forward(self):
        x = self.query.weight
        if self.how == "view":
            x = x.view(1, 40, 6)
        if self.how == "itself":
            return self.project(self.project.weight)
        if self.how == "transposed":
            x = self.query.weight[:6].t()
        y = self.project(x)
        return self.second(y) if self.how == "two" else y


@pytest.mark.parametrize("how", ["plain", "view", "two", "itself", "transposed"])
@pytest.mark.parametrize("scratch_bytes", [1, 2**20])
def test_a_parameter_as_the_input(how, scratch_bytes):
    """The input steps in the same backward: the other weight's gradient must be of what it was."""
    plain, folded = twins(lambda: Query(how))
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1], scratch_bytes=scratch_bytes)
    for _ in range(3):
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            loss(model()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= CLOSE


def test_a_parameter_as_the_input_whose_memory_was_exchanged():
    def run(model, optimizer, step):
        model.query.weight.data = 2 * model.query.weight.data
        loss(model()).backward()

    assert compare(lambda: Query("plain"), run) <= CLOSE


class Stop(torch.autograd.Function):
    """Lets no gradient through: None, which is not a gradient of zeros."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("first", [lambda: nn.Linear(6, 6), lambda: nn.Embedding(7, 6)], ids=["linear", "embedding"])
def test_no_gradient_is_not_a_gradient_of_zeros(first):
    """torch does not step what no gradient reached; weight decay would show a step with zeros."""

    def run(model, optimizer, step):
        x = IDS if isinstance(model[0], nn.Embedding) else randn(3, 6)
        (Stop.apply(model[0](x)).sum() + loss(model[1](randn(3, 6)))).backward()

    assert compare(lambda: nn.Sequential(first(), nn.Linear(6, 6)), run) <= CLOSE


def test_a_graph_outlives_the_step_where_torchs_does():
    """torch saves a weight only for an input that needs a gradient."""

    def run(model, optimizer, step):
        y = model(randn(3, 6)).sum()
        y.backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
        y.backward()

    assert compare(lambda: nn.Linear(6, 6), run) <= CLOSE


def test_a_stale_graph_is_noticed_as_in_torch():
    folded = nn.Linear(6, 6).double()
    optimizer = ours(folded)
    gradfold.fold(folded, optimizer)
    x = randn(3, 6).requires_grad_()
    stale = folded(x).sum()
    folded(x).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# precision ------------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A weight used under autocast by its module, twice, and directly outside it."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.norm = nn.Embedding(7, 32), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, ids, direct):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.norm(self.linear(self.embed(ids)))
            y = self.linear(torch.tanh(x))
            if direct:
                y = y + F.linear(x, self.linear.weight)
        return y.float().pow(2).mean() + (self.linear.weight.pow(2).mean() if direct else 0.0)


@pytest.mark.parametrize("direct", [False, True])
def test_autocast(direct):
    """As near to the fp32 gradient as torch's own autocast is."""
    plain, folded = twins(Mixed, torch.float32)
    truth = copy.deepcopy(plain).double()
    recorder, _ = recorded(folded)
    plain(IDS, direct).backward()
    folded(IDS, direct).backward()
    with torch.autocast("cpu", enabled=False):
        x = truth.norm(truth.linear(truth.embed(IDS)))
        y = truth.linear(torch.tanh(x)) + (F.linear(x, truth.linear.weight) if direct else 0)
        (y.pow(2).mean() + (truth.linear.weight.pow(2).mean() if direct else 0.0)).backward()
    for name, param in truth.named_parameters():
        theirs = (plain.get_parameter(name).grad.double() - param.grad).norm()
        own = (recorder.grads[name].double() - param.grad).norm()
        assert own <= 2 * theirs + 1e-7, name


def test_autocast_around_backward_too():
    plain, folded = twins(Mixed, torch.float32)
    optimizers = torchs(plain, "SGD"), ours(folded, "SGD")
    gradfold.fold(folded, optimizers[1])
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(IDS, True).backward()
            optimizer.step()
    assert distance(folded, plain) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights(dtype):
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)).to(dtype)
    start = copy.deepcopy(model)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    model(randn(3, 6).to(dtype)).float().pow(2).sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())
    assert distance(model, start) > 0


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype(default):
    """Temporaries have the dtype they are given, not the one that new tensors happen to have."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)).to(torch.bfloat16)
    twin = copy.deepcopy(model)
    x = randn(3, 6).to(torch.bfloat16).requires_grad_()
    torch.set_default_dtype(default)
    try:
        optimizer = ours(model)
        gradfold.fold(model, optimizer)
        model(x).float().pow(2).sum().backward()
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer = ours(twin)
    gradfold.fold(twin, optimizer)
    twin(x).float().pow(2).sum().backward()
    optimizer.step()
    assert distance(model, twin) <= 1e-6


def test_a_batch_of_gradients_in_low_precision():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(torch.bfloat16)
    gradfold.fold(model, ours(model))
    x = randn(3, 6).to(torch.bfloat16).requires_grad_()
    y = model(x)
    (got,) = torch.autograd.grad(y, x, torch.ones(2, *y.shape, dtype=y.dtype), is_grads_batched=True, retain_graph=True)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.allclose(got[1].float(), expected.float(), atol=1e-2)
