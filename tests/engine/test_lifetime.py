"""From fold to remove and beyond: copies, reloading, refolding, and what keeps what alive."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import gradfold
from gradfold.backends import Reference, Scratch
from tests.zoo import Net, batches, distance, no_gradients, ours, same_bits, torchs, twins

CLOSE = 1e-10
X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def mlp():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False), nn.LayerNorm(6))


def train(model, optimizer, steps=2):
    for _ in range(steps):
        model(X).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rule", ["AdamW", "SGD", "NAdam"])
def test_fold_remove_and_fold_again_in_mid_training(rule):
    plain, model = twins(mlp)
    optimizer, twin = ours(model, rule), torchs(plain, rule)
    train(model, optimizer)
    fold = gradfold.fold(model, optimizer)
    train(model, optimizer)
    fold.remove()
    assert all(type(m) in (nn.Linear, nn.Tanh, nn.LayerNorm) for m in model)
    assert not any("_gradfold_param" in vars(m) for m in model)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    model(X).sum().backward()
    assert not any(p.grad is None for p in model.parameters())
    optimizer.zero_grad()
    train(model, optimizer)
    gradfold.fold(model, optimizer)
    train(model, optimizer)
    train(plain, twin, 8)
    assert distance(model, plain) <= CLOSE


def test_remove_is_harmless_when_repeated():
    _, model = twins(mlp)
    optimizer = ours(model)
    first = gradfold.fold(model, optimizer)
    first.remove()
    first.remove()
    gradfold.fold(model, optimizer)
    first.remove()  # of no concern to the second fold
    train(model, optimizer)
    assert no_gradients(model)


def test_a_graph_made_before_remove_keeps_its_gradient():
    plain, model = twins(mlp)
    optimizer, twin = ours(model), torchs(plain)
    fold = gradfold.fold(model, optimizer)
    value = model(X).pow(2).sum()
    fold.remove()
    value.backward()
    optimizer.step()
    train(plain, twin, 1)
    assert distance(model, plain) <= CLOSE


def test_a_graph_made_before_folding_again():
    plain, model = twins(mlp)
    optimizer, twin = ours(model), torchs(plain)
    fold = gradfold.fold(model, optimizer)
    value = model(X).pow(2).sum()
    fold.remove()
    gradfold.fold(model, optimizer)
    value.backward()
    optimizer.step()
    train(plain, twin, 1)
    assert distance(model, plain) <= CLOSE and no_gradients(model)


def test_remove_with_a_parametrization_over_a_folded_class():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    _, model = twins(mlp)
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Double())
    other = copy.deepcopy(model)
    fold.remove()
    fold = gradfold.fold(model, optimizer)
    train(model, optimizer)
    gradfold.fold(other, ours(other))  # the copy was never in a fold
    fold.remove()
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    gradfold.fold(model, optimizer)
    train(model, optimizer)
    assert no_gradients(model)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch_save": lambda m: torch.load(io.BytesIO(saved(m)), weights_only=False),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_plain_modules(how):
    _, model = twins(lambda: Net("tied"))
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    model.loss(batches(1)[0]).backward()
    optimizer.step()
    copied = COPIES[how](model)
    assert type(copied.embed) is nn.Embedding and type(copied.head) is nn.Linear
    assert copied.head.weight is copied.embed.weight
    assert not any("_gradfold_param" in vars(m) for m in copied.modules())
    assert same_bits(copied, model)
    copied.loss(batches(1)[0]).backward()
    assert copied.embed.weight.grad is not None and no_gradients(model)
    train_copy = ours(copied)
    copied.zero_grad()
    gradfold.fold(copied, train_copy)
    copied.loss(batches(1)[0]).backward()
    assert no_gradients(copied)


def test_a_pickle_loads_where_gradfold_is_not():
    _, model = twins(mlp)
    gradfold.fold(model, ours(model))
    assert b"gradfold" not in pickle.dumps(model)
    assert b"gradfold" not in saved(model)


def test_a_shallow_copy_is_plain_and_shares_its_weights():
    _, model = twins(mlp)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    shallow = copy.copy(model[0])
    assert type(shallow) is nn.Linear and shallow.weight is model[0].weight


def test_dropping_the_fold_object_keeps_folding():
    _, model = twins(mlp)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    gc.collect()
    start = copy.deepcopy(model)
    model(X).pow(2).sum().backward()
    assert no_gradients(model) and distance(model, start) > 0
    optimizer.step()


def test_dropping_everything_frees_the_weights():
    _, model = twins(lambda: Net("tied"))
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer)
    for kind in ("none", "reentrant"):
        model.loss(batches(1)[0], kind).backward()
        optimizer.step()
    refs = [weakref.ref(p) for p in model.parameters()]
    states = [weakref.ref(s) for state in optimizer.state.values() for s in state.values()]
    del model, optimizer, fold
    gc.collect()
    assert not any(ref() is not None for ref in refs + states)


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"timing": "deferred"}, {"clip_norm": 1.0}], ids=lambda options: next(iter(options))
)
def test_dropping_a_step_that_is_open_frees_the_weights(options):
    """What waits for ``optimizer.step()`` is kept without the graph that it came from."""
    _, model = twins(mlp)
    fold = gradfold.fold(model, ours(model), **options)
    model(X[:1]).pow(2).sum().backward()
    refs = [weakref.ref(p) for p in model.parameters()]
    del model, fold
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_load_state_dict_in_place_goes_on():
    plain, model = twins(mlp)
    optimizer, twin = ours(model), torchs(plain)
    gradfold.fold(model, optimizer)
    train(model, optimizer, 1)
    train(plain, twin, 1)
    values = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(values)
    plain.load_state_dict(values)
    train(model, optimizer)
    train(plain, twin)
    assert distance(model, plain) <= CLOSE


def test_weights_set_through_data():
    plain, model = twins(mlp)
    optimizer, twin = ours(model), torchs(plain)
    gradfold.fold(model, optimizer)
    for m, o in ((model, optimizer), (plain, twin)):
        m[0].weight.data = torch.full((6, 6), 0.1, dtype=torch.float64)
        with torch.no_grad():
            m[2].weight.mul_(0.5)
        train(m, o)
    assert distance(model, plain) <= CLOSE


def test_swapped_tensors():
    """``Module.to`` and ``load_state_dict`` can swap a tensor's contents, and lose its hooks."""
    plain, model = twins(mlp)
    optimizer, twin = ours(model), torchs(plain)
    gradfold.fold(model, optimizer)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        values = {name: 2 * value for name, value in model.state_dict().items()}
        model.load_state_dict(values)
        plain.load_state_dict(values)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        train(model, optimizer)
    except gradfold.FoldError as error:  # noticed is enough
        assert "hook was lost" in str(error)
        return
    train(plain, twin)
    assert distance(model, plain) <= CLOSE


class Told(Reference):
    """A backend of somebody's own, which gets from elsewhere what it does not have itself."""

    def __getattr__(self, name):
        if name == "route":
            return lambda *given: "a way of its own"
        raise AttributeError(name)


def test_a_backend_whose_route_comes_from_elsewhere_names_it():
    """On every Python: from 3.12 on, isinstance with a protocol does not ask __getattr__."""
    model = mlp().double()
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer, backend=Told(Scratch(2**16)))
    train(model, optimizer)
    assert "reference: 5 in a way of its own" in str(fold.report())


def test_report_tells_routes_and_bytes(capsys):
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.MultiheadAttention(5, 1), nn.Embedding(3, 4))
    model[3].requires_grad_(False)
    report = gradfold.fold(model, ours(model)).report()
    routes = {row.name: row.route for row in report.rows}
    assert routes == {
        "0.weight": "folded",
        "0.bias": "hooked",
        "1.weight": "hooked",
        "1.bias": "hooked",
        "2.in_proj_weight": "hooked",
        "2.in_proj_bias": "hooked",
        "2.out_proj.weight": "hooked",  # MultiheadAttention reads it and never calls out_proj
        "2.out_proj.bias": "hooked",
        "3.weight": "frozen",
    }
    row = report.rows[0]
    assert row.weight_bytes == 6 * 5 * 4
    assert 0 <= row.state_bytes - 2 * 6 * 5 * 4 <= 8  # the two moments, and a step count
    assert not capsys.readouterr().out  # it is the caller's to print, once
    print(report)
    assert capsys.readouterr().out == f"{report}\n" == f"{report!r}\n" and "0.weight" in str(report)
