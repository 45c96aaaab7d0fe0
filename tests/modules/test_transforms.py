"""Compilers, functional transforms, parametrizations and hooks around folded modules."""

import inspect
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import gradfold
from tests.zoo import compare, distance, no_gradients, ours, torchs, twins

CLOSE = 1e-10
IDS = torch.tensor([[1, 3, 3], [0, 6, 1]])


def randn(*shape, seed=5):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(y):
    return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).pow(2).sum()


def mlp():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_graph_break(backend):
    def run(model, optimizer, step):
        if not step:
            torch.compiler.reset()
        loss(torch.compile(model, fullgraph=True, backend=backend)(randn(3, 6))).backward()

    assert compare(mlp, run) <= CLOSE


def test_tied_between_a_compiled_region_and_an_eager_one():
    class TiedHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return torch.compile(self.head, fullgraph=True, backend="aot_eager")(torch.tanh(self.embed(ids)))

    torch.compiler.reset()
    assert compare(TiedHead, lambda m, o, step: loss(m(IDS)).backward()) <= CLOSE


def test_compiled_before_folding():
    plain, folded = twins(mlp)
    compiled = torch.compile(folded, fullgraph=True, backend="eager")
    compiled(randn(3, 6)).sum().backward()
    folded.zero_grad()
    optimizer, twin = ours(folded), torchs(plain)
    gradfold.fold(compiled, optimizer)
    for model, stepper in ((plain, twin), (compiled, optimizer)):
        loss(model(randn(3, 6))).backward()
        stepper.step()
    assert distance(folded, plain) <= CLOSE and no_gradients(folded)


def test_functional_transforms_see_a_plain_model():
    plain, folded = twins(mlp)
    gradfold.fold(folded, ours(folded))
    x = randn(3, 6)
    params = {name: p.detach() for name, p in plain.named_parameters()}

    def value(params, x):
        return loss(torch.func.functional_call(plain, params, (x,)))

    expected = torch.func.grad(value)(params, x)

    def folded_value(params, x):
        return loss(torch.func.functional_call(folded, params, (x,)))

    got = torch.func.grad(folded_value)(params, x)
    for name in params:
        assert torch.allclose(got[name], expected[name], atol=1e-12)
    assert torch.allclose(torch.func.vmap(folded)(x), plain(x), atol=1e-12)
    assert torch.allclose(torch.func.jacrev(folded)(x[0]), torch.func.jacfwd(plain)(x[0]), atol=1e-12)
    assert torch.allclose(torch.func.jacfwd(folded)(x[0]), torch.func.jacrev(plain)(x[0]), atol=1e-12)
    per_sample = torch.func.vmap(torch.func.grad(folded_value), (None, 0))(params, x)
    one_by_one = sum(torch.func.grad(value)(params, row)["0.weight"] for row in x)
    assert torch.allclose(sum(per_sample["0.weight"]), one_by_one, atol=1e-12)
    assert distance(folded, plain) == 0


def test_functional_call_with_values_derived_from_the_weights():
    def run(model, optimizer, step):
        values = {name: 2 * p for name, p in model.named_parameters()}
        loss(torch.func.functional_call(model, values, (randn(3, 6),))).backward()

    assert compare(mlp, run) <= CLOSE


def test_functional_call_with_part_of_a_tie():
    class Tie(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    def run(model, optimizer, step):
        other = {"b.weight": model.a.weight * 2}
        loss(torch.func.functional_call(model, other, (randn(3, 6),), tie_weights=False)).backward()

    assert compare(Tie, run) <= CLOSE


def test_vmap_and_backward_outside_it():
    assert compare(mlp, lambda m, o, step: loss(torch.func.vmap(m)(randn(3, 6))).backward()) <= CLOSE


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobian_of_the_input_steps_nothing(vectorize):
    plain, folded = twins(mlp)
    gradfold.fold(folded, ours(folded))
    x = randn(6)
    got = torch.autograd.functional.jacobian(folded, x, vectorize=vectorize)
    assert torch.allclose(got, torch.autograd.functional.jacobian(plain, x), atol=1e-12)
    assert distance(folded, plain) == 0


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


PARAMETRIZE = {
    "parametrize": lambda m: nn.utils.parametrize.register_parametrization(m[0], "weight", Double()),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "spectral_norm": lambda m: nn.utils.parametrizations.spectral_norm(m[0]).eval(),
    "bias": lambda m: nn.utils.parametrize.register_parametrization(m[0], "bias", Double()),
    "prune": lambda m: prune.l1_unstructured(m[0], "weight", 0.3),
}


@pytest.mark.parametrize("how", [how for how in PARAMETRIZE if how != "prune"])  # which leaves what deepcopy refuses
def test_parametrized_before_folding(how):
    def make():
        model = mlp()
        PARAMETRIZE[how](model)
        return model

    assert compare(make, lambda m, o, step: loss(m(randn(3, 6))).backward()) <= CLOSE


@pytest.mark.parametrize("how", ["parametrize", "bias", "prune"])  # the others replace the Parameter: refused, below
def test_parametrized_after_folding(how):
    plain, folded = twins(mlp)
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    for step in range(4):
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            if step == 1:
                PARAMETRIZE[how](model)
            loss(model(randn(3, 6))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= CLOSE and no_gradients(folded)


def test_module_hooks_all_run():
    def run(model, optimizer, step):
        seen = []
        handles = [
            model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
            model[0].register_forward_hook(lambda m, args, y: y + 1),
            model[0].register_full_backward_pre_hook(lambda m, grads: (grads[0] * 3,)),
            model[2].register_full_backward_hook(lambda m, i, o: seen.append("2") or (i[0] * 2,)),
            model[0].register_full_backward_hook(lambda m, i, o: seen.append("0")),
        ]
        loss(model(randn(3, 6).requires_grad_())).backward()
        assert seen == ["2", "0"]
        for handle in handles:
            handle.remove()

    assert compare(mlp, run) <= CLOSE


@pytest.mark.parametrize("how", ["save_on_cpu", "anomaly", "other_thread", "trace"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore::DeprecationWarning", "ignore:.*torch.jit.*")
def test_under_other_autograd_modes(how):
    def run(model, optimizer, step):
        if how == "save_on_cpu":
            with torch.autograd.graph.save_on_cpu():
                y = loss(model(randn(3, 6)))
            y.backward()
        elif how == "anomaly":
            with torch.autograd.detect_anomaly():
                loss(model(randn(3, 6))).backward()
        elif how == "trace":
            torch.jit.trace(model, randn(3, 6), check_trace=False)
            loss(model(randn(3, 6))).backward()
        else:
            y = loss(model(randn(3, 6)))
            thread = threading.Thread(target=y.backward)
            thread.start()
            thread.join()

    assert compare(mlp, run) <= CLOSE


def test_nothing_shows_from_outside():
    plain, folded = twins(lambda: nn.Sequential(nn.Linear(6, 6), nn.Embedding(7, 6, padding_idx=1)))
    ids = [id(p) for p in folded.parameters()]
    gradfold.fold(folded, ours(folded))
    assert repr(folded) == repr(plain)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in folded.named_modules()] == [n for n, _ in plain.named_modules()]
    assert ids == [id(p) for p in folded.parameters()]
    for ours_, theirs in zip(folded, plain, strict=True):
        assert isinstance(ours_, type(theirs)) and type(ours_).__name__ == type(theirs).__name__
        assert type(ours_).__module__ == type(theirs).__module__  # torch.fx takes a torch module for a leaf by it
        assert list(inspect.signature(ours_.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
