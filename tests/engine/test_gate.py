"""When a weight steps, and when it must not: dropped forwards, partial backwards, freezing, pausing, threads."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from tests.zoo import (
    CHECKPOINTS,
    Net,
    batches,
    compare,
    distance,
    no_gradients,
    ours,
    recorded,
    same_bits,
    torchs,
    twins,
)

CLOSE = 1e-10
X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
KINDS = pytest.mark.parametrize("kind", ["none", "reentrant", "non_reentrant"])


def mlp(layers=3):
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(layers)])


def folded_mlp(layers=3):
    _, model = twins(lambda: mlp(layers))
    optimizer = ours(model)
    return model, optimizer, gradfold.fold(model, optimizer)


# when -----------------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("drop", [False, True])
def test_each_weight_fires_before_earlier_layers_run_backward(kind, drop):
    _, model = twins(lambda: nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(4)]))
    recorder, optimizer = recorded(model)
    for layer_index, layer in enumerate(model):
        layer.register_full_backward_pre_hook(lambda m, g, i=layer_index: recorder.order.append(f"backward {i}"))

    def forward():
        x = X.clone().requires_grad_()
        for index, layer in enumerate(model):
            x = CHECKPOINTS[kind](layer, x, index)
        return x.sum()

    for _ in range(2):
        recorder.order.clear()
        recorder.grads.clear()
        if drop:
            forward()
        forward().backward()
        optimizer.step()
        fired = [entry for entry in recorder.order if entry.endswith("weight")]
        assert fired == ["3.weight", "2.weight", "1.weight", "0.weight"]
        for index in (3, 2, 1):
            assert recorder.order.index(f"{index}.weight") < recorder.order.index(f"backward {index - 1}")


def test_a_tied_weight_fires_after_its_first_use_has_run():
    _, model = twins(lambda: Net("tied"))
    recorder, _ = recorded(model)
    model.loss(batches(1)[0]).backward()
    assert recorder.order[-1] == "embed.weight" and len(recorder.order) == len(set(recorder.order))


def test_activations_are_freed_as_weights_step():
    _, model = twins(lambda: nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)]))
    gradfold.fold(model, ours(model))
    inputs = {}
    for index, layer in enumerate(model):
        layer.register_forward_hook(lambda m, args, y, i=index: inputs.__setitem__(i, weakref.ref(args[0])))
    alive = []
    x = X.clone().requires_grad_()
    x.register_hook(lambda grad: alive.extend(inputs[i]() is not None for i in (1, 2)))
    model(x).sum().backward()
    assert alive == [False, False]


@KINDS
def test_dropped_forwards_leave_nothing_behind(kind):
    _, model = twins(lambda: Net("tied"))
    gradfold.fold(model, ours(model))
    outputs = []
    for ids in batches(5):
        outputs.append(weakref.ref(model.loss(ids, kind)))
    gc.collect()
    step = model.embed.__dict__["_gradfold_param"].fold.step
    assert not any(ref() is not None for ref in outputs)
    assert not step.waiting and not any(backward.terms for backward in step.backwards.values())


@KINDS
@pytest.mark.parametrize("scene", ["untied", "tied", "bptt"])
def test_backwards_that_want_something_else_step_nothing(kind, scene):
    plain, model = twins(lambda: Net(scene))
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    ids = batches(1)[0]
    noise = torch.zeros(2, 5, 6, dtype=torch.float64, requires_grad=True)

    def losses(model):
        hidden = model.embed(ids) + noise
        for index, block in enumerate(model.blocks):
            hidden = CHECKPOINTS[kind](block, hidden, index)
        return model.head(hidden).pow(2).sum()

    if kind != "reentrant":  # which torch itself refuses with inputs
        wanted = [noise, model.blocks[1].up.weight, model.head.weight, model.blocks[0].norm.bias, model.embed.weight]
        theirs = [
            noise,
            *(
                plain.get_parameter(n)
                for n in (
                    "blocks.1.up.weight",
                    "head.weight" if scene != "tied" else "embed.weight",
                    "blocks.0.norm.bias",
                    "embed.weight",
                )
            ),
        ]
        for ours_, theirs_ in zip(wanted, theirs, strict=True):
            (got,) = torch.autograd.grad(losses(model), ours_)
            (expected,) = torch.autograd.grad(losses(plain), theirs_)
            assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)
        losses(model).backward(inputs=[noise])
        noise.grad = None
    assert same_bits(model, plain) and no_gradients(model)
    optimizer.step()
    assert same_bits(model, plain)
    losses(model).backward()
    optimizer.step()
    twin = torchs(plain)
    noise.grad = None
    losses(plain).backward()
    twin.step()
    noise.grad = None
    assert distance(model, plain) <= CLOSE


def test_gradients_first_then_backward_on_one_graph():
    def run(model, optimizer, step):
        x = X.clone().requires_grad_()
        y = model(x).pow(2).sum()
        torch.autograd.grad(y, x, retain_graph=True)
        torch.autograd.grad(y, model[1].weight, retain_graph=True)
        y.backward()

    assert compare(mlp, run) <= CLOSE


@pytest.mark.parametrize("names", [["0.weight"], ["2.weight", "1.bias"], ["1.weight", "0.weight", "0.bias"]], ids=str)
def test_backward_with_inputs_steps_those_alone(names):
    def run(model, optimizer, step):
        model(X).pow(2).sum().backward(inputs=[model.get_parameter(n) for n in names])

    assert compare(mlp, run) <= CLOSE


def test_two_backwards_with_nothing_in_common():
    def run(model, optimizer, step):
        model[0](X).pow(2).sum().backward()
        model[1](X).pow(2).sum().backward()

    assert compare(mlp, run) <= CLOSE


def test_backward_from_many_roots_and_with_a_gradient():
    def run(model, optimizer, step):
        y = model(X)
        torch.autograd.backward([y, model[0](X).sum()], [torch.linspace(-1, 1, 18, dtype=y.dtype).view(3, 6), None])

    assert compare(mlp, run) <= CLOSE


# frozen ---------------------------------------------------------------------------------------------------------------

FREEZE = {
    "from_the_start": lambda m, when: when == "make" and freeze(m, "0.weight", "1.bias"),
    "then_thawed": lambda m, when: (
        (when == "make" and freeze(m, "0.weight", "1.bias")) or (when == "1 start" and thaw(m))
    ),
    "frozen_later": lambda m, when: when == "1 start" and freeze(m, "1.weight", "2.bias"),
    "for_one_step": lambda m, when: (
        (when == "1 start" and freeze(m, "1.weight", "0.bias")) or (when == "2 start" and thaw(m))
    ),
    "between_forward_and_backward": lambda m, when: when == "1 between" and freeze(m, "1.weight", "2.bias"),
    "thawed_between": lambda m, when: (
        (when == "make" and freeze(m, "1.weight", "2.bias")) or (when == "1 between" and thaw(m))
    ),
    "frozen_and_thawed_between": lambda m, when: when == "1 between" and (freeze(m, "1.weight", "2.bias"), thaw(m)),
    "thawed_after_a_dropped_forward": lambda m, when: (
        (when == "make" and freeze(m, "1.weight", "2.bias")) or (when == "1 start" and (m(X), thaw(m)))
    ),
    "all_but_one": lambda m, when: (
        when == "make" and freeze(m, *(n for n, _ in m.named_parameters() if n != "1.weight"))
    ),
}


def freeze(model, *names):
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def thaw(model):
    model.requires_grad_(True)


@pytest.mark.parametrize("how", FREEZE)
def test_freezing(how):
    def make():
        model = mlp()
        FREEZE[how](model, "make")
        return model

    def run(model, optimizer, step):
        FREEZE[how](model, f"{step} start")
        y = model(X).pow(2).sum()
        FREEZE[how](model, f"{step} between")
        y.backward()

    assert compare(make, run, 4) <= CLOSE


def test_frozen_and_unused_parameters_keep_every_bit_and_no_state():
    model, optimizer, _ = folded_mlp()
    freeze(model, "1.weight")
    start = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(2):
        model[1](model[0](X)).sum().backward()
        optimizer.step()
    still = {"1.weight", "2.weight", "2.bias"}
    assert {name for name, p in model.named_parameters() if torch.equal(p, start[name])} == still
    assert optimizer.state[model[2].weight]["step"] == 0


# paused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward_in", [True, False])
@pytest.mark.parametrize("step_in", [True, False])
@KINDS
def test_paused(forward_in, step_in, kind):
    """A gradient written inside steps there, or is taken by the next backward outside, as plain torch adds it up."""
    plain, model = twins(lambda: Net("tied"))
    optimizer, twin = ours(model), torchs(plain)
    fold = gradfold.fold(model, optimizer)
    first, second = batches(2)
    with fold.paused() if forward_in else contextlib.nullcontext():
        value = model.loss(first, kind)
    with fold.paused():
        value.backward()
        assert not no_gradients(model)
        assert same_bits(model, plain)
        if step_in:
            optimizer.step()
            optimizer.zero_grad()
    plain.loss(first, kind).backward()
    if step_in:
        twin.step()
        twin.zero_grad()
    for m, o in ((model, optimizer), (plain, twin)):
        m.loss(second, kind).backward()
        o.step()
    assert distance(model, plain) <= CLOSE and no_gradients(model)


@pytest.mark.parametrize("forward_in", [True, False])
def test_gradient_penalty_with_pause(forward_in):
    plain, model = twins(mlp)
    optimizer, twin = ours(model), torchs(plain)
    fold = gradfold.fold(model, optimizer)

    def penalty(model, inside, outside):
        x = X.clone().requires_grad_()
        with inside if forward_in else outside:
            y = torch.tanh(model(x)).sum()
        with inside:
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
            return y + grad.pow(2).sum()

    class Again:  # a context that may be entered twice
        def __init__(self, make):
            self.make = make

        def __enter__(self):
            self.open = self.make()
            self.open.__enter__()

        def __exit__(self, *error):
            return self.open.__exit__(*error)

    nothing = contextlib.nullcontext()
    for _ in range(3):
        penalty(model, Again(fold.paused), nothing).backward()
        penalty(plain, nothing, nothing).backward()
        for o in (optimizer, twin):
            o.step()
            o.zero_grad()
    assert distance(model, plain) <= CLOSE


def test_paused_survives_an_exception():
    model, _, fold = folded_mlp()
    with pytest.raises(ValueError), fold.paused():
        raise ValueError
    model(X).sum().backward()
    assert no_gradients(model)


# side by side ---------------------------------------------------------------------------------------------------------


def test_threads_with_folds_of_their_own():
    plains, models = zip(*(twins(lambda: Net("tied")) for _ in range(4)), strict=True)
    errors = []

    def work(model, kind):
        try:
            optimizer = ours(model)
            gradfold.fold(model, optimizer)
            for ids in batches(4):
                model.loss(ids, kind).backward()
                optimizer.step()
        except Exception as error:
            errors.append(error)

    kinds = ["none", "reentrant", "non_reentrant", "selective"]
    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, kinds, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for plain, model in zip(plains, models, strict=True):
        twin = torchs(plain)
        for ids in batches(4):
            plain.loss(ids).backward()
            twin.step()
            twin.zero_grad()
        assert distance(model, plain) <= CLOSE


def test_direct_use_only():
    def run(model, optimizer, step):
        F.linear(X, model[0].weight, model[1].bias).pow(2).sum().backward()

    assert compare(mlp, run) <= CLOSE


def test_the_other_hook_of_autograd(monkeypatch):
    """Where a post-accumulate hook does not run without a gradient, the node's own hook is the gate."""
    monkeypatch.setattr("gradfold.engine.gate.hook_fires_without_gradient", lambda: False)
    for scene in ("untied", "tied", "direct"):
        assert compare(lambda: Net(scene), lambda m, o, step: m.loss(batches(3)[step]).backward()) <= CLOSE  # noqa: B023
