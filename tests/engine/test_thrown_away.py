"""Backwards whose gradients are thrown away: refused where weights have stepped in them, as torch's where they wait."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from gradfold import FoldError
from tests.pairs import each_pair
from tests.zoo import Net, batches, distance, no_gradients, ours, same_bits, torchs, twins

WAITING = {
    "deferred": {"timing": "deferred"},
    "clipped": {"clip_norm": 0.05},
    "micro-batch": {"accumulate": 2},
}


def mlp():
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 4))


def pair(seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(3, 6, generator=rng, dtype=torch.double), torch.randint(4, (3,), generator=rng)


def loss_of(model, seed):
    x, y = pair(seed)
    return F.cross_entropy(model(x), y)


class Around(torch.optim.Optimizer):
    """As SAM's own, Lookahead and others: it has the same groups, and does not call the other's zero_grad."""


def outer(model):
    """A module around the folded one, with a weight of its own."""
    return nn.ModuleList([model, nn.Linear(2, 2).double()])


CLEARS = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "model": lambda model, optimizer: model.zero_grad(),
    "a module around it": lambda model, optimizer: outer(model).zero_grad(),
    "its parts": lambda model, optimizer: [part.zero_grad() for part in model],
    "an optimizer around it": lambda model, optimizer: Around(optimizer.param_groups, {}).zero_grad(),
    "super().zero_grad": lambda model, optimizer: nn.Module.zero_grad(model),
}
clears = pytest.mark.parametrize("clear", CLEARS.values(), ids=CLEARS.keys())


# refused ----------------------------------------------------------------------------------------------------------


@clears
@pytest.mark.parametrize("options", [{}, {"accumulate": 1, "clip_value": 0.1}, {"clip": "delayed", "clip_norm": 1.0}])
def test_a_backward_that_no_step_closed(clear, options):
    _, model = twins(mlp)
    optimizer = ours(model)
    gradfold.fold(model, optimizer, **options)
    loss_of(model, 0).backward()
    moved = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FoldError, match=r"weight.*fold\.paused\(\).*timing='deferred'.*step\(\)"):
        clear(model, optimizer)
    optimizer.step()  # the step is still there to be kept
    clear(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), moved, strict=True))


def test_the_error_names_the_call_and_a_weight():
    _, model = twins(mlp)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    loss_of(model, 0).backward()
    for call, name in ((optimizer, "optimizer"), (model, "Sequential"), (model[3], "Linear")):
        with pytest.raises(FoldError, match=rf"{name}\.zero_grad\(\) after a backward.*(0|3)\.weight and \d more"):
            call.zero_grad()


def test_micro_batches_may_be_dropped_until_the_last_has_stepped():
    _, model = twins(mlp)
    optimizer = ours(model)
    gradfold.fold(model, optimizer, accumulate=2)
    loss_of(model, 0).backward()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    loss_of(model, 2).backward()
    with pytest.raises(FoldError, match="no optimizer.step"):
        optimizer.zero_grad()


def test_two_passes_that_have_stepped():
    _, model = twins(mlp)
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer, clip_norm=0.1, clip="two_pass")
    fold.backward(loss_of(model, 0))
    with pytest.raises(FoldError, match="no optimizer.step"):
        model.zero_grad()


def test_a_working_set_with_slices():
    _, model = twins(mlp)
    optimizer = ours(model)
    gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=3))
    loss_of(model, 0).backward()
    with pytest.raises(FoldError, match="no optimizer.step"):
        model.zero_grad()


# as torch's -------------------------------------------------------------------------------------------------------


@each_pair(clear=CLEARS, waiting=WAITING, rule=["AdamW", "SGD"])
def test_gradients_that_wait_are_dropped(clear, waiting, rule):
    clear, options = CLEARS[clear], WAITING[waiting]
    plain, folded = twins(mlp)
    theirs, mine = torchs(plain, rule), ours(folded, rule)
    gradfold.fold(folded, mine, **options)
    for step in range(3):
        for model, optimizer in ((plain, theirs), (folded, mine)):
            loss_of(model, step).backward()
            clear(model, optimizer)
            for micro in range(options.get("accumulate", 1)):
                loss_of(model, 10 * step + micro).backward()
            if "clip_norm" in options and model is plain:
                nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-12


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_micro_batches_of_accumulating_are_dropped(clear):
    plain, folded = twins(mlp)
    theirs, mine = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, mine)
    for model, optimizer, adding in ((plain, theirs, contextlib.nullcontext), (folded, mine, fold.accumulating)):
        with adding():
            for seed in range(3):
                loss_of(model, seed).backward()
        CLEARS[clear](model, optimizer)
        with adding():
            loss_of(model, 4).backward()
        loss_of(model, 5).backward()
        optimizer.step()
    assert distance(folded, plain) <= 1e-12


@pytest.mark.parametrize("part", [0, 2, 3])
def test_the_gradients_of_one_part_are_dropped(part):
    """The others keep theirs."""
    plain, folded = twins(mlp)
    theirs, mine = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, mine, timing="deferred")
    for model, optimizer, adding in ((plain, theirs, contextlib.nullcontext), (folded, mine, fold.accumulating)):
        for step in range(3):
            with adding():
                loss_of(model, step).backward()
            model[part].zero_grad()
            loss_of(model, 10 + step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-12


def test_the_gradients_of_one_part_alone_do_not_step():
    plain, folded = twins(mlp)
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine, timing="deferred")
    for model, optimizer in ((plain, theirs), (folded, mine)):
        loss_of(model, 0).backward()
        model[0].zero_grad()
        optimizer.step()
    assert distance(folded, plain) <= 1e-12
    assert torch.equal(folded[0].weight, twins(mlp)[0][0].weight)


class Branches(nn.Module):
    """Of its two branches each step uses one, and in some steps none."""

    def __init__(self):
        super().__init__()
        self.stem, self.branches = nn.Linear(6, 5), nn.ModuleList(nn.Linear(5, 4) for _ in range(2))

    def loss(self, seed):
        x, y = pair(seed)
        x = torch.tanh(self.stem(x))
        return F.cross_entropy(x[:, :4] if seed % 3 == 2 else self.branches[seed % 3](x), y)


@each_pair(rule=["AdamW", "SGD", "Adam", "RMSprop"], how=["plain", *WAITING], who=["optimizer", "model", "in turn"])
def test_gradients_filled_with_zeros(rule, how, who):
    """What a backward does not reach steps with zeros, once it has had a gradient."""
    options = WAITING.get(how, {})
    plain, folded = twins(Branches)
    theirs, mine = torchs(plain, rule), ours(folded, rule)
    gradfold.fold(folded, mine, **options)
    for step in range(9):
        for model, optimizer in ((plain, theirs), (folded, mine)):
            for micro in range(options.get("accumulate", 1)):
                model.loss(step + micro).backward()
            if "clip_norm" in options and model is plain:
                nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
            if step == 6:
                model.branches[0].requires_grad_(False)  # torch steps it all the same
            optimizer.step()
            one = model if who == "model" or (who != "optimizer" and step % 2) else optimizer
            one.zero_grad(set_to_none=step == 4)
            if step == 7:
                model.branches[0].requires_grad_(True)
    assert distance(folded, plain) <= 1e-12


@pytest.mark.parametrize("options", WAITING.values(), ids=WAITING)
def test_a_dropped_gradient_leaves_zeros(options):
    plain, folded = twins(Branches)
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine, **options)
    for model, optimizer in ((plain, theirs), (folded, mine)):
        model.loss(0).backward()
        optimizer.zero_grad(set_to_none=False)
        for micro in range(options.get("accumulate", 1)):
            model.loss(1 + 3 * micro).backward()
        if "clip_norm" in options and model is plain:
            nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
        optimizer.step()
    assert distance(folded, plain) <= 1e-12
    assert not torch.equal(folded.branches[0].weight, twins(Branches)[0].branches[0].weight)  # it has decayed


def test_a_step_without_a_backward_takes_the_zeros():
    plain, folded = twins(mlp)
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine)
    for model, optimizer in ((plain, theirs), (folded, mine)):
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
    assert distance(folded, plain) <= 1e-12


@pytest.mark.parametrize("paused", ["steps", "probes", "clears"])
def test_zeros_and_a_pause(paused):
    plain, folded = twins(Branches)
    theirs, mine = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, mine)
    for step in range(8):
        for model, optimizer, pause in ((plain, theirs, contextlib.nullcontext), (folded, mine, fold.paused)):
            if step % 2:
                with pause():
                    if paused == "steps":
                        model.loss(step).backward()
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    elif paused == "clears":
                        optimizer.zero_grad()
            model.loss(step + 1).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert distance(folded, plain) <= 1e-12


@clears
def test_a_backward_that_raised_may_be_run_again(clear):
    _, model = twins(mlp)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    handle = model[0].register_full_backward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("says the test")))
    x, y = pair(0)
    with pytest.raises(MemoryError):
        F.cross_entropy(model(x.requires_grad_()), y).backward()
    handle.remove()
    clear(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    assert no_gradients(model)


def test_a_batch_that_did_not_fit_is_tried_again_in_parts():
    """As accelerate's find_executable_batch_size does: what the first part left is cleared by the model."""
    plain, folded = twins(mlp)
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine, accumulate=2)
    for model, optimizer in ((plain, theirs), (folded, mine)):
        loss_of(model, 0).backward()  # and the second micro-batch runs out of memory in its forward
        model.zero_grad()
        loss_of(model, 1).backward()
        loss_of(model, 2).backward()
        optimizer.step()
    assert distance(folded, plain) <= 1e-12


def test_gradients_that_were_not_finite_may_be_thrown_away():
    """No weight has moved."""
    plain, folded = twins(mlp)
    mine = ours(folded)
    gradfold.fold(folded, mine, on_nonfinite="skip")
    (loss_of(folded, 0) * torch.nan).backward()
    mine.zero_grad()
    assert same_bits(folded, plain)


def test_plain_modules_clear_as_before():
    plain, folded = twins(mlp)
    fold = gradfold.fold(folded, ours(folded))
    loss_of(plain, 0).backward()
    plain.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in plain.parameters())
    with fold.paused():
        loss_of(folded, 0).backward()
        folded.zero_grad(set_to_none=False)
        assert all(not p.grad.any() for p in folded.parameters())
        folded.zero_grad()
    fold.remove()
    loss_of(folded, 0).backward()
    folded.zero_grad()
    assert no_gradients(folded)


# weights that are moved in between ------------------------------------------------------------------------------------


def add(param):
    param.add_(0.01)


def copy(param):
    param.copy_(param + 0.01)


def replace(param):
    param.data = param.data + 0.01


@pytest.mark.parametrize("change", [add, copy, replace])
@pytest.mark.parametrize("part", [0, 2, 3])
def test_a_weight_changed_before_step_is_named(change, part):
    _, model = twins(mlp)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    loss_of(model, 0).backward()
    with torch.no_grad():
        change(model[part].weight)
    with pytest.raises(FoldError, match=rf"{part}\.weight: changed between.*SAM.*timing='deferred'"):
        optimizer.step()
    loss_of(model, 1).backward()  # the step is closed
    optimizer.step()


@pytest.mark.parametrize("back", [add, replace])
def test_sam_without_deferred_steps(back):
    _, model = twins(mlp)
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer)
    with fold.paused():
        loss_of(model, 0).backward()
        optimizer.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    loss_of(model, 0).backward()
    with torch.no_grad():
        for p in model.parameters():
            back(p)
    with pytest.raises(FoldError, match="changed between.*SAM"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["none", "reentrant", "non_reentrant", "nested_reentrant", "mixed"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip_norm": 0.1}], ids=str)
def test_steps_do_not_look_like_changes(kind, options):
    model = Net("tied_and_direct")
    optimizer = ours(model)
    gradfold.fold(model, optimizer, **options)
    for ids in batches(2):
        for _ in range(options.get("accumulate", 1)):
            model.loss(ids, kind).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_weights_that_wait_may_be_changed():
    plain, folded = twins(mlp)
    theirs, mine = torchs(plain), ours(folded)
    gradfold.fold(folded, mine, timing="deferred")
    for model, optimizer in ((plain, theirs), (folded, mine)):
        for step in range(3):
            loss_of(model, step).backward()
            with torch.no_grad():
                add(model[0].weight)
                replace(model[3].weight)
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-12
