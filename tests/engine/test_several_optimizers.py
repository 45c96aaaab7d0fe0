"""Several optimizers in one fold: whose each parameter is, and one step() of each."""

import copy
import re

import pytest
import torch
from torch import nn

import gradfold
from tests.zoo import Net, batches, distance, no_gradients, same_bits, twins

X = torch.ones(2, 6, dtype=torch.float64)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def parts(model):
    """The parameters of the first layer, of the second, and of the rest."""
    return [list(model[0].parameters()), list(model[2].parameters()), list(model[4].parameters())]


def make(home, model):
    first, second, third = parts(model)
    return [
        home.AdamW(first, lr=1e-2),
        home.SGD(second, lr=1e-2, momentum=0.9),
        home.Adam(third, lr=1e-3),
    ]


def loss(model, x=X):
    return model(x).square().sum()


def test_beside_torch_with_schedules():
    """Each has its own learning rate schedule, whatever the order of the calls."""
    model = net()
    plain = copy.deepcopy(model)
    runs = []
    for one, home in ((model, gradfold), (plain, torch.optim)):
        optimizers = make(home, one)
        runs.append((optimizers, [torch.optim.lr_scheduler.StepLR(o, i + 1, 0.5) for i, o in enumerate(optimizers)]))
    gradfold.fold(model, runs[0][0])
    for step in range(6):
        for one, (optimizers, schedules) in zip((model, plain), runs, strict=True):
            loss(one, X * (step + 1)).backward()
            order = [0, 1, 2] if step % 2 else [2, 0, 1]
            for index in order:
                optimizers[index].step()
                optimizers[index].zero_grad()
                schedules[index].step()
        assert no_gradients(model)
    assert distance(model, plain) <= 1e-14
    assert [o.param_groups[0]["lr"] for o in runs[0][0]] == [o.param_groups[0]["lr"] for o in runs[1][0]]


def test_one_norm_over_all():
    model, plain = twins(lambda: Net("tied"))
    both = []
    for one, home in ((model, gradfold), (plain, torch.optim)):
        matrices, others = gradfold.muon_groups(one)
        both.append([home.SGD([p for _, p in matrices], lr=0.1), home.AdamW([p for _, p in others], lr=1e-2)])
    fold = gradfold.fold(model, both[0], clip_norm=0.01, accumulate=2)
    for step in range(3):
        for ids in batches(6)[2 * step : 2 * step + 2]:
            model.loss(ids).backward()
            plain.loss(ids).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        for optimizers in both:
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        assert fold.grad_norm == pytest.approx(float(norm), rel=1e-12)
    assert distance(model, plain) <= 1e-10


def test_state_dicts_apart():
    """Each is torch's; a run goes on from both to the bit."""
    model = net()
    optimizers = make(gradfold, model)
    gradfold.fold(model, optimizers)

    def step(one, members):
        loss(one).backward()
        for member in members:
            member.step()

    step(model, optimizers)
    saved = [copy.deepcopy(o.state_dict()) for o in optimizers]
    assert [set(next(iter(s["state"].values()))) for s in saved] == [
        {"step", "exp_avg", "exp_avg_sq"},
        {"momentum_buffer"},
        {"step", "exp_avg", "exp_avg_sq"},
    ]
    for state, torchs in zip(saved, make(torch.optim, copy.deepcopy(model)), strict=True):
        torchs.load_state_dict(state)
    other = copy.deepcopy(net())
    other.load_state_dict(model.state_dict())
    again = make(gradfold, other)
    gradfold.fold(other, again)
    for member, state in zip(again, saved, strict=True):
        member.load_state_dict(state)
    step(model, optimizers)
    step(other, again)
    assert same_bits(model, other)


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("then", ["forward", "backward", "step"])
def test_a_missing_step(missing, then):
    model = net()
    optimizers = make(gradfold, model)
    gradfold.fold(model, optimizers)
    loss(model).backward()
    for index, optimizer in enumerate(optimizers):
        if index != missing:
            optimizer.step()
    before = copy.deepcopy(model)
    name = type(optimizers[missing]).__name__
    with pytest.raises(gradfold.FoldError, match=rf"without {name}\.step\(\): the fold has AdamW and SGD and Adam"):
        if then == "step":
            optimizers[2].step()
        elif then == "forward":
            loss(model)
        else:  # no folded module is called
            (model[0].bias * 2).sum().backward()
    assert same_bits(model, before)
    optimizers[missing].step()
    loss(model).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert not same_bits(model, before)


def test_steps_without_a_backward():
    """They close nothing, so that none is owed."""
    model = net()
    optimizers = make(gradfold, model)
    gradfold.fold(model, optimizers)
    optimizers[0].step()
    optimizers[0].step()
    loss(model).backward()
    for optimizer in optimizers:
        optimizer.step()


def test_a_gradient_that_is_not_finite():
    """No weight moves, and the next batch goes on, though only the first step() was reached."""
    model = net()
    optimizers = make(gradfold, model)
    gradfold.fold(model, optimizers, timing="deferred")
    before = copy.deepcopy(model)
    loss(model, X * float("nan")).backward()
    with pytest.raises(gradfold.errors.NonFiniteError):
        optimizers[0].step()
    assert same_bits(model, before)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss(model).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert not same_bits(model, before)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale):
    """One overflow leaves out the step of all; else it is torch's."""
    model = net()
    plain = copy.deepcopy(model)
    runs = [make(gradfold, model), make(torch.optim, plain)]
    gradfold.fold(model, runs[0], timing="deferred")
    for step in range(4):
        x = X * (float("inf") if step == 1 else 1 + step)
        for one, optimizers in zip((model, plain), runs, strict=True):
            if step == 0:
                optimizers[0].scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            scaler = optimizers[0].scaler
            scaler.scale(one(x).square().sum() + (x.sum() * one[4].bias).sum()).backward()
            for optimizer in optimizers if unscale else ():
                scaler.unscale_(optimizer)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad()
        if step == 1:  # torch steps those whose own gradients are finite: here there are none such
            assert runs[0][0].scaler.get_scale() == runs[1][0].scaler.get_scale() == 4.0
    assert distance(model, plain) <= 1e-12


def test_zero_grad_of_one_drops_its_own():
    model = net()
    optimizers = make(gradfold, model)
    plain = copy.deepcopy(model)
    theirs = make(torch.optim, plain)
    gradfold.fold(model, optimizers, timing="deferred")
    for one, members in ((model, optimizers), (plain, theirs)):
        loss(one).backward()
        members[0].zero_grad()
        for member in members:
            member.step()
    assert distance(model, plain) <= 1e-14


def test_paused_and_removed():
    model = net()
    optimizers = make(gradfold, model)
    plain = copy.deepcopy(model)
    theirs = make(torch.optim, plain)
    fold = gradfold.fold(model, optimizers)

    def step():
        for one, members in ((model, optimizers), (plain, theirs)):
            loss(one).backward()
            for member in members:
                member.step()
                member.zero_grad()

    step()
    with fold.paused():
        step()
    step()
    fold.remove()
    assert all(optimizer._fold is None for optimizer in optimizers)
    step()
    assert distance(model, plain) <= 1e-14


def test_report_and_groups_that_are_added():
    model = net()
    model[4].requires_grad_(False)
    optimizers = make(gradfold, model)[:2]
    fold = gradfold.fold(model, optimizers)
    states = {row.name: row.state_bytes for row in fold.report().rows}
    assert states["0.weight"] >= 2 * 36 * 8 and states["2.weight"] == 36 * 8
    assert {row.route for row in fold.report().rows if row.name.startswith("4")} == {"frozen"}
    model[4].requires_grad_(True)
    with pytest.raises(gradfold.FoldError, match="4.weight: requires grad but is not in the optimizer"):
        loss(model).backward()
        optimizers[0].step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    optimizers[1].add_param_group({"params": list(model[4].parameters()), "lr": 0.1})
    before = copy.deepcopy(model)
    loss(model).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert not torch.equal(model[4].weight, before[4].weight)
    with pytest.raises((gradfold.FoldError, ValueError), match=r"0\.weight is in the fold's AdamW already"):
        optimizers[1].add_param_group({"params": [model[0].weight]})
    assert len(optimizers[1].param_groups) == 2


def _refused(optimizers, model, **options):
    before = copy.deepcopy(model)
    with pytest.raises(gradfold.FoldError) as raised:
        gradfold.fold(model, optimizers, **options)
    assert same_bits(model, before) and type(model[0]) is nn.Linear
    return str(raised.value)


def test_refusals():
    model = net()
    first, second, third = parts(model)
    one, two = gradfold.AdamW(first + second), gradfold.SGD(second + third)
    said = _refused([one, two], model)
    assert "2.weight: is in two of the optimizers, optimizer[0] (AdamW) and optimizer[1] (SGD)" in said
    said = _refused([gradfold.AdamW(first), gradfold.SGD(second)], model)
    assert re.search(r"4\.weight: requires grad but is not in the optimizer.*fold\(model, \[first, second\]\)", said)
    said = _refused([gradfold.AdamW(first), torch.optim.SGD(second + third)], model)
    assert "SGD is not one of gradfold's; use gradfold.SGD" in said
    same = gradfold.AdamW(model.parameters())
    assert "is in two of the optimizers" in _refused([same, same], model)
    assert "give one of gradfold's optimizers, or a list" in _refused([], model)
    assert "give one of gradfold's optimizers, or a list" in _refused({"all": same}, model)
    several = [gradfold.AdamW(first), gradfold.SGD(second + third)]
    assert "several optimizers (AdamW and SGD) with working_set=" in _refused(
        several, model, working_set=gradfold.WorkingSet(chunks=2)
    )
    gradfold.fold(model, several)
    other = net()
    with pytest.raises(gradfold.FoldError, match="folded into a model already"):
        gradfold.fold(other, several)


def test_a_list_of_one():
    model = net()
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(model, [optimizer], working_set=gradfold.WorkingSet(chunks=2))
    assert fold._state.optimizer is optimizer


def test_stepped_by_adamw_and_muon_in_any_order():
    """The order of the calls does not matter: the first closes the step of both."""
    models = []
    for order in (1, -1):
        model, _ = twins(lambda: Net("untied"))
        matrices, others = gradfold.muon_groups(model)
        both = [gradfold.Muon(matrices, lr=0.02), gradfold.AdamW(others)]
        gradfold.fold(model, both)
        for ids in batches(3):
            model.loss(ids).backward()
            for optimizer in both[::order]:
                optimizer.step()
        models.append(model)
    assert same_bits(*models)
