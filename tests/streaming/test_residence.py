"""Where weights are between steps, and who may look at them or change them there."""

import copy
import errno
import gc
import io
import os
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

import gradfold
from gradfold import FoldError, Stream

from .scenes import Stack, distance, folded, ghostly, loss_of, made, same_bits, train


def refuses(message):
    return pytest.raises(FoldError, match=re.escape(message))


@pytest.fixture(params=["cpu", "ghosts"])
def where(request, monkeypatch):
    """Weights that are away show their values in host memory; or NaNs without memory, as on a GPU."""
    if request.param == "ghosts":
        ghostly(monkeypatch)
    return request.param


def test_state_dict(where):
    """Between steps a state_dict has all weights, and loading one changes what the next step computes with."""
    model, optimizer, fold = folded("llama", Stream())
    train(model, optimizer, range(2), fold)
    plain, theirs, other = folded("llama")
    train(plain, theirs, range(2), other)
    assert distance(model, plain) == 0
    fresh = made("llama", seed=5)
    model.load_state_dict(fresh.state_dict())
    plain.load_state_dict(fresh.state_dict())
    train(model, optimizer, range(2, 4), fold)
    train(plain, theirs, range(2, 4), other)
    assert distance(model, plain) == 0


def test_values_may_be_changed(tmp_path):
    """On a CPU parameters show their values in host memory, and keep what is written there, also by ``.data``."""
    runs = []
    for stream in (None, Stream(offload="disk", folder=tmp_path)):
        model, optimizer, fold = folded("llama", stream)
        for step in range(3):
            train(model, optimizer, [step], fold)
            for param in model.parameters():
                param.data.mul_(0.9)
                with torch.no_grad():
                    param.add_(0.01)
        runs.append((model, optimizer))
    same_bits(*runs)


def test_ghosts_refuse_to_be_changed(monkeypatch):
    """What has no values cannot be written to: torch raises."""
    ghostly(monkeypatch)
    model, _, _ = folded("llama", Stream())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.shape == (32, 16)
    with pytest.raises(RuntimeError, match="single memory location"):
        weight.data.mul_(2)


def test_evaluation_between_steps(where):
    """Forwards without gradients see the newest weights and change nothing; so does generation."""
    model, optimizer, fold = folded("llama", Stream())
    plain, theirs, other = folded("llama")
    for step in range(3):
        train(model, optimizer, [step], fold)
        train(plain, theirs, [step], other)
        for one in (model, plain):
            one.eval()
        with torch.no_grad():
            assert torch.equal(loss_of(model, 9), loss_of(plain, 9))
            ids = torch.tensor([[3, 4, 5]])
            assert torch.equal(
                model.generate(ids, max_new_tokens=4, do_sample=False),
                plain.generate(ids, max_new_tokens=4, do_sample=False),
            )
        for one in (model, plain):
            one.train()
    assert distance(model, plain) == 0


def test_inference_mode(where):
    """Memory that is made inside of it is written to outside."""
    model, optimizer, fold = folded("llama", Stream())
    plain, theirs, other = folded("llama")
    with torch.inference_mode():
        assert torch.equal(loss_of(model, 9), loss_of(plain, 9))
    train(model, optimizer, range(2), fold)
    train(plain, theirs, range(2), other)
    assert distance(model, plain) == 0


def test_another_forward_before_backward(where):
    """A reference's forward without gradients, and a second one with them, between a forward and its backward."""
    runs = []
    for stream in (None, Stream()):
        model, optimizer, _ = folded("stack", stream)
        for step in range(3):
            loss = loss_of(model, step)
            with torch.no_grad():
                reference = loss_of(model, step + 10)
            (loss + reference * loss_of(model, step + 20)).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((model, optimizer))
    same_bits(*runs)


def test_a_forward_without_backward(where):
    """A loss that is thrown away leaves nothing behind."""
    model, optimizer, fold = folded("stack", Stream())
    plain, theirs, other = folded("stack")
    loss_of(model, 3)
    train(model, optimizer, range(2), fold)
    loss_of(model, 4)
    train(model, optimizer, range(2, 3), fold)
    train(plain, theirs, range(3), other)
    assert distance(model, plain) == 0


def test_a_backward_that_raises(where):
    """Half of the blocks have stepped: zero_grad() and the next batch, as without a stream."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("on purpose")

    runs = []
    for stream in (None, Stream()):
        model, optimizer, fold = folded("stack", stream)
        train(model, optimizer, range(2), fold)
        hook = model.layers[1].register_forward_hook(lambda module, args, out: Fails.apply(out))
        with pytest.raises(ValueError, match="on purpose"):
            loss_of(model, 2).backward()
        hook.remove()
        optimizer.zero_grad()
        train(model, optimizer, range(3, 5), fold)
        runs.append((model, optimizer))
    same_bits(*runs)


def test_a_gradient_that_is_not_finite(where):
    """A parameter whose gradient is not finite does not move, whole: not one of its tiles."""
    model, optimizer, fold = folded("stack", Stream(tile_bytes=300), on_nonfinite="skip")
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 8, dtype=torch.float64)
    x[0, 0] = torch.inf
    model(x).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert fold.traffic.weights_to_host == 0
    train(model, optimizer, range(1), fold)
    assert not torch.equal(model.state_dict()["layers.0.0.weight"], before["layers.0.0.weight"])


def test_guard_of_tiles(where):
    """Only the last rows of a gradient are not finite: the first ones, which step in a tile before, stay too."""
    model, optimizer, fold = folded("stack", Stream(tile_bytes=16 * 12 * 3), on_nonfinite="skip")
    assert sum(len(_steppers(one)) for one in fold._state.slices() if one.name == "layers.0.0.weight") == 4
    before = copy.deepcopy(model.state_dict())
    hook = model.layers[0][0].register_full_backward_pre_hook(lambda module, grads: (_spoiled(grads[0]),))
    train(model, optimizer, range(1), fold)
    hook.remove()
    after = model.state_dict()
    for name in ("layers.0.0.weight", "first.weight"):  # one that streams, one that stays
        assert torch.equal(after[name], before[name])
        states = optimizer.state[model.get_parameter(name)]
        assert not any(states[key].any() for key in ("exp_avg", "exp_avg_sq"))
    assert not torch.equal(after["layers.1.0.weight"], before["layers.1.0.weight"])


def _spoiled(grad):
    grad = grad.clone()
    grad[0, -1] = torch.nan
    return grad


def _steppers(one):
    return one._bound.stepper.tiles


def test_frozen_weights(where):
    """Frozen weights of blocks stream too, and do not move; unfrozen, they train."""
    runs = []
    for stream in (None, Stream()):
        model = made("llama")
        model.model.layers[1].requires_grad_(False)
        model.model.embed_tokens.requires_grad_(False)
        optimizer = gradfold.AdamW(model.parameters(), lr=1e-2)
        fold = gradfold.fold(model, optimizer, **({} if stream is None else {"stream": stream}))
        train(model, optimizer, range(3), fold)
        model.model.layers[1].requires_grad_(True)
        train(model, optimizer, range(3, 6), fold)
        runs.append((model, optimizer))
    same_bits(*runs)


def test_weights_that_are_not_in_the_optimizer(where):
    """They stream as well."""
    model = made("stack")
    model.layers.requires_grad_(False)
    optimizer = gradfold.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    fold = gradfold.fold(model, optimizer, stream=Stream())
    plain = made("stack")
    plain.layers.requires_grad_(False)
    theirs = torch.optim.AdamW([one for one in plain.parameters() if one.requires_grad], lr=1e-2)
    train(model, optimizer, range(3), fold)
    train(plain, theirs, range(3))
    assert distance(model, plain) <= 1e-12


def test_paused(where):
    """Inside fold.paused() gradients are written, and stepped with, as in torch."""
    model, optimizer, fold = folded("stack", Stream())
    plain = made("stack")
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with fold.paused():
        train(model, optimizer, range(2))
    train(model, optimizer, range(2, 4), fold)
    train(plain, theirs, range(4))
    assert distance(model, plain) <= 1e-12


def test_schedule_free(where):
    """optimizer.eval() and train() change weights in place, wherever they live."""
    runs = []
    for stream in (None, Stream()):
        model, optimizer, fold = folded("stack", stream, rule="AdamWScheduleFree")
        train(model, optimizer, range(3), fold)
        optimizer.eval()
        averaged = copy.deepcopy(model.state_dict())
        optimizer.train()
        train(model, optimizer, range(3, 5), fold)
        runs.append((model, optimizer, averaged))
    same_bits(*runs)
    assert all(torch.equal(value, runs[1][2][name]) for name, value in runs[0][2].items())


def test_masters(where):
    """fp32 weights are exported and imported, wherever their bf16 weights and residuals live."""
    options = {"dtype": torch.bfloat16, "storage": {"master": "split16"}}
    runs = []
    for stream in (None, Stream()):
        model, optimizer, fold = folded("stack", stream, **options)
        train(model, optimizer, range(3), fold)
        masters = gradfold.export_masters(model, optimizer)
        gradfold.import_masters(model, optimizer, {name: one * 1.5 for name, one in masters.items()})
        train(model, optimizer, range(3, 5), fold)
        runs.append((model, optimizer, masters))
    same_bits(*runs)
    assert all(torch.equal(value, runs[1][2][name]) for name, value in runs[0][2].items())


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["on", "off", "with"])
def test_resume(way, where):
    """A state_dict goes on with a stream or without, to the bit."""
    options = {"dtype": torch.bfloat16, "storage": {"states": "int8", "rounding": "stochastic", "small_size": 0}}
    model, optimizer, fold = folded("llama", None if way == "on" else Stream(), **options)
    train(model, optimizer, range(3), fold)
    weights, states = copy.deepcopy(model.state_dict()), saved(optimizer)
    again, other, its = folded("llama", None if way == "off" else Stream(), seed=9, **options)
    train(again, other, range(1), its)  # so that it has states of its own on the way
    again.load_state_dict(weights)
    other.load_state_dict(states)
    train(model, optimizer, range(3, 6), fold)
    train(again, other, range(3, 6), its)
    same_bits((model, optimizer), (again, other))


def test_states_loaded_before_folding(where):
    """States that the optimizer has already move to the host."""
    plain, theirs, fold = folded("stack")
    train(plain, theirs, range(2), fold)
    model = made("stack", seed=3)
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2)
    model.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(theirs.state_dict())
    its = gradfold.fold(model, optimizer, stream=Stream())
    train(plain, theirs, range(2, 4), fold)
    train(model, optimizer, range(2, 4), its)
    same_bits((plain, theirs), (model, optimizer))


def test_remove(where):
    """After fold.remove() it is a plain model with an ordinary optimizer, and goes on."""
    model, optimizer, fold = folded("llama", Stream())
    kinds = [type(module) for module in made("llama").modules()]
    train(model, optimizer, range(2), fold)
    fold.remove()
    assert [type(module) for module in model.modules()] == kinds
    assert all(param.is_contiguous() and not param.isnan().any() for param in model.parameters())
    plain = made("llama")
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    train(plain, theirs, range(2))
    train(model, optimizer, range(2, 4))
    train(plain, theirs, range(2, 4))
    assert distance(model, plain) <= 1e-7  # transformers takes the loss in fp32


def test_copies_are_plain(where):
    """Copies and pickles of a streamed model, made by their state_dict or whole, stream no more."""
    model, optimizer, fold = folded("stack", Stream())
    train(model, optimizer, range(2), fold)
    if where == "cpu":
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(module) for module in twin.modules()] == [type(module) for module in made("stack").modules()]
            assert distance(twin, model) == 0
            loss_of(twin, 0).backward()
            assert all(param.grad is not None for param in twin.parameters())
    twin = made("stack", seed=4)
    twin.load_state_dict(model.state_dict())
    assert distance(twin, model) == 0


def test_nothing_keeps_the_model_alive():
    """Fold, streamer and copying thread go when the model does."""
    model, optimizer, fold = folded("stack", Stream())
    train(model, optimizer, range(2), fold)
    seen = weakref.ref(model)
    del model, optimizer, fold
    gc.collect()
    assert seen() is None


def test_fold_that_fails_leaves_the_model_as_it_was():
    """An error after the weights have moved moves them back."""
    model = made("llama")
    before = copy.deepcopy(model.state_dict())
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2)
    optimizer.param_groups[0]["states"] = "int8"  # which fp64 weights cannot have
    with pytest.raises(FoldError, match="int8"):
        gradfold.fold(model, optimizer, stream=Stream())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == [type(module) for module in made("llama").modules()]
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(1))


class Lone(nn.Module):
    """A model without a list of layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x))


REFUSALS = {
    "settings": (lambda m: {"stream": "cpu"}, "stream='cpu': give a gradfold.Stream"),
    "offload": (lambda m: {"stream": Stream(offload="gpu")}, "Stream(offload='gpu'): one of 'cpu', 'disk'"),
    "one block": (lambda m: {"stream": Stream(blocks=1)}, "Stream(blocks=1): a whole number from 2"),
    "true": (lambda m: {"stream": Stream(blocks=True)}, "Stream(blocks=True): a whole number from 2"),
    "no folder": (lambda m: {"stream": Stream(offload="disk")}, "Stream(offload='disk', folder=None)"),
    "a folder": (lambda m: {"stream": Stream(folder="x")}, "Stream(offload='cpu', folder='x')"),
    "tiles": (lambda m: {"stream": Stream(tile_bytes=0)}, "Stream(tile_bytes=0): a positive number of bytes"),
    "inputs": (lambda m: {"stream": Stream(activations="disk")}, "Stream(activations='disk'): one of"),
    "a name": (lambda m: {"stream": Stream(layers="layers.*")}, "Stream(layers='layers.*'): give a list"),
    "no such name": (lambda m: {"stream": Stream(layers=["blocks.*"])}, "no module of the model matches 'blocks.*'"),
    "nested": (lambda m: {"stream": Stream(layers=["layers.*", "layers.1.*"])}, "is inside of another one"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    """Wrong settings are named, with the way out, and nothing has changed."""
    options, message = REFUSALS[case]
    model = made("stack")
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2)
    with refuses(message):
        gradfold.fold(model, optimizer, **options(model))
    train(model, optimizer, range(1))


def test_refuses_a_model_without_layers():
    """What could stream must be named."""
    model = Lone()
    optimizer = gradfold.AdamW(model.parameters())
    with refuses("Lone has no nn.ModuleList of layers that could stream"):
        gradfold.fold(model, optimizer, stream=Stream())
    fold = gradfold.fold(model, optimizer, stream=Stream(layers=["a", "b"]))
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert fold.traffic.weights_to_device == 2 * 4 * (64 + 8)


def test_refuses_compiled_blocks_and_graphs():
    """Code that was compiled knows where its weights are."""
    model = made("stack")
    optimizer = gradfold.AdamW(model.parameters())
    model.layers[1].compile(backend="eager")
    with refuses("layers.1 is compiled"):
        gradfold.fold(model, optimizer, stream=Stream())
    other = Stack()
    with refuses("capturable=True"):
        gradfold.fold(other, gradfold.AdamW(other.parameters(), capturable=True), stream=Stream())


def test_refuses_a_full_disk(tmp_path, monkeypatch):
    """No room is said before anything has moved, with how much there is."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = made("stack")
    before = copy.deepcopy(model.state_dict())
    optimizer = gradfold.AdamW(model.parameters())
    with refuses("no room for"):
        gradfold.fold(model, optimizer, stream=Stream(offload="disk", folder=tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_moved_parameters_are_noticed():
    """Other memory for a weight, between its backward and the step, is an error as without a stream."""
    model, optimizer, fold = folded("stack", Stream(), timing="deferred")
    loss_of(model, 0).backward()
    model.layers[0][0].weight.data = torch.zeros(12, 12, dtype=torch.float32)
    with pytest.raises(FoldError, match=r"layers\.0\.0\.weight"):
        optimizer.step()
    assert fold.active
