"""`WorkingSet(rest=...)`: what sleeps above the lowest awake weight steps by its gradient alone, in plain loops."""

import math

import pytest
import torch
from torch import nn

import gradfold
from tests.models.test_models import MODELS
from tests.pairs import each_pair
from tests.workset.sliced import SlicedTorch, active_slices, snapshot, untouched
from tests.zoo import Net, batches, distance, no_gradients, ours, twins

pytestmark = pytest.mark.usefixtures("precise")

each_rest = pytest.mark.parametrize("rest", ["sgd", "sign"])


def resting_slices(fold):
    """The slices that rest: those of sleeping chunks, from the first parameter in model order that is awake."""
    rotation = fold._state.turns
    names = [name for name, _ in fold.model.named_parameters()]
    lowest = min(names.index(name) for name, *_ in active_slices(fold))
    asleep = [chunk for index, chunk in enumerate(rotation.chunks) if index != rotation.schedule.index]
    return [tuple(slice_) for chunk in asleep for slice_ in chunk if names.index(slice_.name) >= lowest]


def rest_step(model, slices, rest, rate):
    """The formula, element by element.

    Returns the elements whose gradient is rounding noise where it is 0 (of a key's bias, say): they go anywhere.
    """
    named = dict(model.named_parameters())
    least = 1e-11 * max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
    noise = []
    for name, dim, start, stop in slices:
        if named[name].grad is None:
            continue
        weight = named[name].detach().narrow(dim, start, stop - start)
        grad = named[name].grad.narrow(dim, start, stop - start)
        squares = sum(value * value for value in grad.flatten().tolist())
        rms = math.sqrt(squares / grad.numel())
        moves = [
            rate * (value / rms if rms else 0.0) if rest == "sgd" else rate * ((value > 0) - (value < 0))
            for value in grad.flatten().tolist()
        ]
        weight -= torch.tensor(moves, dtype=weight.dtype).view(weight.shape)
        noise.append(((name, dim, start, stop), grad.abs() < (least if rest == "sign" or rms < least else 0.0)))
    return noise


def check(make, loss, steps, rest="sgd", rule="AdamW", rest_scale=0.1, fold_options=None, **options):
    """Every step changes what is awake as the oracle does, what rests by the formula, and nothing else."""
    fold_options = fold_options or {}
    plain, folded = twins(make)
    oracle, optimizer = SlicedTorch(plain, rule), ours(folded, rule)
    settings = {"interval": 1, "rest": rest, "rest_scale": rest_scale} | options
    fold = gradfold.fold(folded, optimizer, working_set=gradfold.WorkingSet(**settings), **fold_options)
    count, rested = fold_options.get("accumulate", 1), 0
    for step in range(steps):
        active, resting, before = active_slices(fold), resting_slices(fold), snapshot(folded)
        for i in range(count):
            loss(plain, step * count + i).backward()
            fold.backward(loss(folded, step * count + i))
            assert no_gradients(folded)
        noise = rest_step(plain, resting, rest, optimizer.param_groups[0]["lr"] * rest_scale)
        norm = oracle.step(active, fold_options.get("clip_norm"))
        optimizer.step()
        optimizer.zero_grad()
        assert untouched(before, folded, active + resting)
        for (name, dim, start, stop), where in noise:
            mine, theirs = (
                dict(model.named_parameters())[name].detach().narrow(dim, start, stop - start)
                for model in (plain, folded)
            )
            mine[where] = theirs[where]
        assert fold.grad_norm == pytest.approx(norm, rel=1e-9)
        rested += len(resting)
    assert rested and distance(folded, plain) <= 1e-10
    return fold


def net_loss(model, step):
    return model.loss(batches(20)[step % 20])


@each_pair(name=["llama", "llama_tied", "gpt2"], rest=["sgd", "sign"], axis=["out", "in"])
def test_models(name, rest, axis):
    make, loss = MODELS[name]
    check(lambda: make().train(), loss, 5, rest, chunks=4, axis=axis)


@pytest.mark.slow
@each_pair(name=["t5", "bert", "vit", "cnn", "lstm", "attention", "albert"], rest=["sgd", "sign"], chunks=[2, 7])
def test_other_models(name, rest, chunks):
    make, loss = MODELS[name]
    check(lambda: make().train(), loss, chunks + 1, rest, chunks=chunks)


@each_pair(
    rest=["sgd", "sign"],
    order=["forward", "backward", "random", "importance", "sampled"],
    by=["bytes", "bands", "layer", "module"],
    options=[{}, {"accumulate": 3}, {"clip_norm": 0.05}, {"accumulate": 2, "clip_norm": 0.05}, {"clip_value": 1e9}],
)
def test_orders_cuts_and_options(rest, order, by, options):
    chunks = None if by == "layer" else 4 if by == "bytes" else 2
    check(lambda: Net("untied"), net_loss, 9, rest, fold_options=options, order=order, by=by, chunks=chunks)


@each_rest
@pytest.mark.parametrize("rule", ["SGD", "RMSprop"])
def test_beside_other_rules(rule, rest):
    check(lambda: Net("tied"), net_loss, 8, rest, rule, chunks=3, rest_scale=0.5, interval=2)


@each_rest
def test_two_pass(rest):
    options = {"clip": "two_pass", "clip_norm": 0.05}
    check(lambda: Net("untied"), net_loss, 6, rest, fold_options=options, chunks=3)


@each_rest
def test_always_awake_at_the_bottom(rest):
    """With the lowest parameter always awake, everything that sleeps rests."""
    first = next(name for name, _ in Net("untied").named_parameters())
    fold = check(lambda: Net("untied"), net_loss, 4, rest, chunks=3, always=[first])
    asleep = sum(len(chunk) for i, chunk in enumerate(fold._state.turns.chunks) if i != fold.working_set.chunk)
    assert len(resting_slices(fold)) == asleep


@each_rest
def test_a_norm_that_is_asked_for_counts_what_is_awake(rest):
    plain, model = twins(lambda: Net("untied"))
    optimizer = ours(model)
    fold = gradfold.fold(
        model,
        optimizer,
        timing="deferred",
        working_set=gradfold.WorkingSet(chunks=3, interval=1, rest=rest),
    )
    for step in range(4):
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        net_loss(plain, step).backward()
        active, resting = active_slices(fold), resting_slices(fold)
        norm = SlicedTorch(plain).step(active)
        plain.load_state_dict(model.state_dict())
        net_loss(plain, step).backward()
        rest_step(plain, resting, rest, 1e-3)
        fold.backward(net_loss(model, step))
        found = [fold.clip_grad_norm_(1e-3), torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)]
        assert float(found[0]) == pytest.approx(norm, rel=1e-10)
        assert float(found[1]) == pytest.approx(min(norm, 1e-3), rel=1e-2)
        optimizer.step()
        named, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
        for name, dim, start, stop in resting:
            one, other = (found[name].detach().narrow(dim, start, stop - start) for found in (named, theirs))
            assert torch.allclose(one, other, rtol=0, atol=1e-12)


@each_rest
def test_paused_and_removed(rest):
    """Inside ``paused()`` what rests steps by the same rule from ``.grad``; after ``remove()`` everything trains."""
    plain, model = twins(lambda: Net("untied"))
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=3, interval=1, rest=rest))
    resting = resting_slices(fold)
    with fold.paused():
        net_loss(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    net_loss(plain, 0).backward()
    rest_step(plain, resting, rest, 1e-3)
    named, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    for name, dim, start, stop in resting:
        one, other = (found[name].detach().narrow(dim, start, stop - start) for found in (named, theirs))
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
    fold.backward(net_loss(model, 1))
    optimizer.step()
    fold.remove()
    assert all(param.requires_grad for param in model.parameters())


def test_what_lies_below_sleeps_as_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    fold = gradfold.fold(
        model,
        gradfold.AdamW(model.parameters()),
        working_set=gradfold.WorkingSet(by="layer", interval=1, rest="sign"),
    )
    assert [p.requires_grad for p in model.parameters()] == [True] * 6  # the first layer is awake: all run
    assert {row.route for row in fold.report().rows[2:]} == {"resting"}
    for _ in range(2):
        fold.backward(model(torch.randn(3, 4)).sum())
        fold._state.optimizer.step()
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2


def test_nothing_is_kept():
    """No gradient and no state: memory in the optimizer is that of what is awake."""
    kept = []
    for rest in (None, "sgd"):
        model = Net("untied")
        optimizer = gradfold.AdamW(model.parameters())
        fold = gradfold.fold(
            model, optimizer, working_set=gradfold.WorkingSet(chunks=4, interval=1, offload="cpu", rest=rest)
        )
        for step in range(4):
            fold.backward(net_loss(model, step))
            assert no_gradients(model)
            optimizer.step()
        kept.append(sum(t.numel() for states in optimizer.state.values() for t in states.values()))
        assert fold.tape_tensors() == []
    assert kept[0] == kept[1]


@each_rest
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_loss_scale_changes_nothing(rest, scale):
    """The steps at rest have no scale of their own."""
    ends = []
    for factor in (1.0, scale):
        model = twins(lambda: Net("untied"))[0]
        optimizer = gradfold.AdamW(model.parameters(), lr=1e-2, eps=1e-30)
        fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=3, interval=1, rest=rest))
        for step in range(4):
            fold.backward(net_loss(model, step) * factor)
            optimizer.step()
        ends.append(model)
    assert distance(*ends) <= 1e-10


@each_rest
@pytest.mark.parametrize("clip_norm", [None, 1.0], ids=["inside backward", "waiting"])
def test_a_gradient_that_is_not_finite_moves_nothing_at_rest(rest, clip_norm):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(
        model,
        optimizer,
        clip_norm=clip_norm,
        working_set=gradfold.WorkingSet(by="layer", interval=4, rest=rest),
        on_nonfinite="skip",
    )
    before = snapshot(model)
    x = model[1](model[0](torch.randn(5, 3, dtype=torch.float64)))
    fold.backward((model[2](x) * torch.tensor([1.0, math.inf], dtype=torch.float64)).sum())
    optimizer.step()
    after = snapshot(model)
    for name in before:
        assert torch.equal(before[name], after[name])
    assert math.isnan(fold.grad_norm)


def test_ranks_are_named(monkeypatch):
    from gradfold.workset import Rotation

    model = Net("untied")
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(model, optimizer)
    with pytest.raises(gradfold.FoldError, match="rest='sgd'.*many ranks"):
        Rotation(gradfold.WorkingSet(chunks=2, rest="sgd"), fold._state, rank=0)


def test_a_frozen_weight_does_not_rest():
    model = Net("untied")
    names = [name for name, _ in model.named_parameters()]
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=3, interval=1, rest="sign"))
    last = dict(model.named_parameters())[names[-1]]
    assert last.requires_grad
    last.requires_grad_(False)
    before = last.detach().clone()
    for step in range(3):
        fold.backward(net_loss(model, step))
        optimizer.step()
        assert torch.equal(last, before) and not last.requires_grad


# storage ----------------------------------------------------------------------------------------------------------

STORED = {
    "bf16": {},
    "bf16, stochastic": {"rounding": "stochastic"},
    "split8": {"master": "split8"},
    "split16": {"master": "split16"},
    "split16, int8": {"master": "split16", "states": "int8", "small_size": 0},
    "fp32, int8": {"states": "int8", "small_size": 0},
}


def stored_run(kind, rest, offload=None, states="keep", axis="out"):
    dtype = torch.float32 if kind.startswith("fp32") else torch.bfloat16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).to(dtype)
    optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-2, **STORED[kind])
    fold = gradfold.fold(
        model,
        optimizer,
        working_set=gradfold.WorkingSet(
            chunks=3, interval=2, rest=rest, offload=offload, states=states, axis=axis, order="random"
        ),
    )
    return model, optimizer, fold, dtype


def stored_steps(model, optimizer, fold, dtype, steps):
    for step in steps:
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(step)).to(dtype)
        fold.backward(model(x).float().pow(2).mean())
        optimizer.step()


@each_pair(kind=list(STORED), rest=["sgd", "sign"], offload=[None, "cpu"], states=["keep", "reset"], axis=["out", "in"])
def test_resume_is_bit_identical(kind, rest, offload, states, axis):
    """Weights at rest in every storage; random bits go on where they were, in the middle of a turn and of a round."""
    whole = stored_run(kind, rest, offload, states, axis)
    stored_steps(*whole, range(9))
    first = stored_run(kind, rest, offload, states, axis)
    stored_steps(*first, range(5))
    saved = first[0].state_dict(), first[1].state_dict()
    second = stored_run(kind, rest, offload, states, axis)
    second[0].load_state_dict(saved[0])
    second[1].load_state_dict(saved[1])
    stored_steps(*second, range(5, 9))
    one, other = snapshot(whole[0]), snapshot(second[0])
    assert all(torch.equal(one[name], other[name]) for name in one)
    mine, theirs = whole[1].state_dict(), second[1].state_dict()
    for index, states_ in mine["state"].items():
        for key, value in states_.items():
            assert torch.equal(value, theirs["state"][index][key]), (index, key)


@each_rest
@pytest.mark.parametrize("master", ["split8", "split16"])
def test_a_master_moves_at_rest(master, rest):
    """Steps far below the last place of bf16 add up in the master's bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)).to(torch.bfloat16)
    optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-5, master=master, small_size=0, rounding="nearest")
    fold = gradfold.fold(
        model, optimizer, working_set=gradfold.WorkingSet(by="layer", interval=100, rest=rest, rest_scale=1.0)
    )
    weight = model[1].weight
    key = "weight.residual"
    fold.backward(model(torch.ones(2, 128, dtype=torch.bfloat16)).float().sum())
    optimizer.step()
    before = optimizer.state[weight][key].clone()
    for _ in range(10):
        fold.backward(model(torch.ones(2, 128, dtype=torch.bfloat16)).float().sum())
        optimizer.step()
    assert set(optimizer.state[weight]) == {key}
    assert not torch.equal(before, optimizer.state[weight][key])


@each_rest
def test_stochastic_rounding_moves_in_the_mean(rest):
    """A bf16 weight at rest moves by steps of a hundredth of its last place, in the mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64, bias=False), nn.Linear(64, 512, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.fill_(1.0)
    optimizer = gradfold.SGD(model.named_parameters(), lr=1e-4, rounding="stochastic")
    fold = gradfold.fold(
        model, optimizer, working_set=gradfold.WorkingSet(by="layer", interval=100, rest=rest, rest_scale=1.0)
    )
    for _ in range(20):
        fold.backward(-model(torch.ones(2, 4, dtype=torch.bfloat16)).float().sum())
        optimizer.step()
    moved = (model[1].weight.float() - 1.0).mean().item()
    assert moved == pytest.approx(20 * 1e-4, rel=0.15)
