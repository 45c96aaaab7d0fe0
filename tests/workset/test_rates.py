"""`WorkingSet(schedule="round")`: what a scheduler says is taken once per round, and all chunks train with it."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gradfold
from tests.workset.sliced import snapshot
from tests.zoo import Net, batches

pytestmark = pytest.mark.usefixtures("precise")

CHUNKS, INTERVAL = 3, 4
ROUND = CHUNKS * INTERVAL


def held(values):
    """The formula of the docs: the values of the scheduler in each step -> those that the steps use."""
    used = []
    first = values[:INTERVAL]
    for t, value in enumerate(values):
        turn, k = divmod(t, INTERVAL)
        if turn >= CHUNKS:
            used.append(values[t - t % ROUND])
        elif turn == 0:
            used.append(value)
        else:
            top = max(values[: t + 1])
            used.append(top if top > max(first) else first[k])
    return used


SCHEDULERS = {
    "constant": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "short warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1, (t + 1) / 3) * (1 - t / 50)),
    "long warm-up": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1, t / 7)),
    "longer than a round": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1, t / 17)),
    "steps": lambda o: lr_scheduler.StepLR(o, 5, 0.5),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=41, pct_start=0.2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=5),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
}


def used_now(fold):
    """The lr and betas that the open step has for its parameters."""
    group = fold._state.step.group_of(next(iter(fold._state.params.values())).param)
    return float(group.hyper["lr"]), tuple(map(float, group.hyper["betas"]))


def run(make_scheduler, steps=30, tensor=False, groups=1, **options):
    """The scheduler's values and the used ones of every step, and the model."""
    torch.manual_seed(0)
    model = Net("untied")
    params = list(model.parameters())
    parts = [params] if groups == 1 else [params[:2], params[2:]]
    lr = torch.tensor(0.01, dtype=torch.float64) if tensor else 0.01
    optimizer = gradfold.AdamW(
        [{"params": part, "lr": lr.clone() if tensor else lr * (i + 1)} for i, part in enumerate(parts)],
        weight_decay=0.1,
    )
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=CHUNKS, interval=INTERVAL, **options))
    scheduler = make_scheduler(optimizer)
    own, used = [], []
    for step in range(steps):
        own.append((float(optimizer.param_groups[0]["lr"]), tuple(map(float, optimizer.param_groups[0]["betas"]))))
        loss = model.loss(batches(20)[step % 20])
        fold.backward(loss)
        used.append(used_now(fold))
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()
    return own, used, model, fold


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_chunk_has_the_values_of_its_round(name):
    own, used, _, _ = run(SCHEDULERS[name])
    wanted = held([lr for lr, _ in own])
    assert [lr for lr, _ in used] == wanted
    by_rate = {}
    for lr, betas in own:  # momentum is cycled with the rate, and is held with it
        by_rate.setdefault(lr, set()).add(betas)
    assert all(betas in by_rate[lr] for lr, betas in used)
    if name in ("one cycle", "cyclic"):
        assert len({betas for _, betas in used}) > 1


def test_the_rate_is_what_the_step_uses():
    """SGD moves a weight by its rate: the formula, seen in the weights."""
    model = nn.Linear(1, 6, bias=False, dtype=torch.float64)
    optimizer = gradfold.SGD(model.parameters(), lr=0.5)
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=CHUNKS, interval=INTERVAL))
    scheduler = SCHEDULERS["cosine"](optimizer)
    own, moved = [], []
    for _ in range(30):
        own.append(optimizer.param_groups[0]["lr"])
        before = model.weight.detach().clone()
        fold.backward(model(torch.ones(1, 1, dtype=torch.float64)).sum())
        optimizer.step()
        scheduler.step()
        moved.append((before - model.weight.detach()).max().item())
    assert moved == pytest.approx(held(own), rel=1e-12)


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_groups_are_held_alike(tensor):
    own, used, _, fold = run(SCHEDULERS["cosine"], groups=2, tensor=tensor)
    assert [lr for lr, _ in used] == held([lr for lr, _ in own])
    rates = fold._state.turns.rates.used[0]
    assert len(rates) == 2 and (tensor or rates[1] == pytest.approx(2 * rates[0]))


def test_step_is_as_before():
    own, used, _, _ = run(SCHEDULERS["cosine"], schedule="step")
    assert used == own
    constant = [run(SCHEDULERS["constant"], schedule=kind)[2] for kind in ("round", "step")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in constant), strict=True))


def test_one_chunk_is_as_without():
    model = Net("untied")
    optimizer = gradfold.AdamW(model.parameters(), lr=0.01)
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=1, interval=4))
    scheduler = SCHEDULERS["cosine"](optimizer)
    for step in range(10):
        fold.backward(model.loss(batches(20)[step]))
        assert used_now(fold)[0] == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_by_hand():
    """Without a scheduler the same holds: a rate set within a round counts from the next one on."""
    values = iter([0.01] * 13 + [0.002] * 40)

    class ByHand:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.param_groups[0]["lr"] = next(values)

    own, used, _, _ = run(ByHand)
    assert [lr for lr, _ in used] == held([lr for lr, _ in own])
    assert used[ROUND + 5][0] == 0.01 and used[2 * ROUND][0] == 0.002


def test_a_new_group_has_its_own_rate_until_the_next_round():
    _, _, model, fold = run(SCHEDULERS["constant"], steps=ROUND + 1)
    extra = nn.Parameter(torch.ones(3))
    model.extra = extra
    fold._state.optimizer.add_param_group({"params": [extra], "lr": 0.3})
    rates = fold._state.turns.rates.of(fold._state.optimizer.groups)
    assert [float(group["lr"]) for group in rates] == [0.01, 0.3]


@pytest.mark.parametrize("stop", [2, 4, 6, 13, 17])
@pytest.mark.parametrize("name", ["long warm-up", "short warm-up", "one cycle"])
def test_resume_in_a_round(name, stop):
    steps = 26

    def begin():
        torch.manual_seed(0)
        model = Net("untied")
        optimizer = gradfold.AdamW(model.parameters(), lr=0.01)
        working_set = gradfold.WorkingSet(chunks=CHUNKS, interval=INTERVAL)
        fold = gradfold.fold(model, optimizer, working_set=working_set)
        return model, optimizer, fold, SCHEDULERS[name](optimizer)

    def go(model, optimizer, fold, scheduler, steps):
        for step in steps:
            fold.backward(model.loss(batches(20)[step % 20]))
            optimizer.step()
            scheduler.step()

    whole = begin()
    go(*whole, range(steps))
    first = begin()
    go(*first, range(stop))
    saved = first[0].state_dict(), first[1].state_dict(), first[3].state_dict()
    second = begin()
    second[0].load_state_dict(saved[0])
    second[1].load_state_dict(saved[1])
    second[3].load_state_dict(saved[2])
    go(*second, range(stop, steps))
    before, after = snapshot(whole[0]), snapshot(second[0])
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_earlier_checkpoint_goes_on_by_step():
    _, _, _, fold = run(SCHEDULERS["cosine"], steps=5)
    saved = fold._state.optimizer.state_dict()
    del saved["working_set"]["rates"], saved["working_set"]["schedule"]["steps"]
    with pytest.warns(UserWarning, match=r"schedule='round'\).*'step' it was made with, before schedule="):
        fold._state.optimizer.load_state_dict(saved)
    assert fold._state.turns.rates.kind == "step" and fold._state.turns.steps == 5
    assert "rates by step" in fold.describe_working_set()


def test_damaged_rates_are_refused():
    _, _, model, fold = run(SCHEDULERS["cosine"], steps=5)
    saved, before = fold._state.optimizer.state_dict(), snapshot(model)
    saved["working_set"]["rates"]["first"] = [[{"betas": 3}]]
    with pytest.raises(ValueError, match="damaged rates"):
        fold._state.optimizer.load_state_dict(saved)
    assert all(torch.equal(before[key], value) for key, value in snapshot(model).items())


def test_report_tells_the_rates():
    _, used, _, fold = run(SCHEDULERS["cosine"], steps=ROUND + 3)
    report = fold.report()
    assert report.chunks[0].rate == f"{used[-1][0]:.4g}" and report.chunks[2].rate == f"{used[ROUND - 1][0]:.4g}"
    said = fold.describe_working_set()
    assert f"rates by round: lr {used[-1][0]:.4g} (param_groups: " in said
    first, top = fold._state.turns.rates.first, fold._state.turns.rates.top
    fold.report()
    assert (first, top) == (fold._state.turns.rates.first, fold._state.turns.rates.top)


@pytest.mark.parametrize(
    "bad", [{"schedule": "epoch"}, {"rest": "adam"}, {"rest_scale": 0.2}, {"rest": "sgd", "rest_scale": 0}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(gradfold.FoldError, match=next(reversed(bad))):
        gradfold.WorkingSet(chunks=2, **bad)


def test_presets():
    quality, memory = gradfold.WorkingSet.for_quality(8), gradfold.WorkingSet.for_memory(8, interval=7)
    assert (quality.chunks, quality.schedule, quality.rest, quality.rest_scale) == (8, "round", "sgd", 0.1)
    assert quality.states == "reset"
    assert (memory.rest, memory.offload, memory.interval) == (None, "cpu", 7)
    assert gradfold.WorkingSet.for_quality(8, rest=None, states="keep") == gradfold.WorkingSet(chunks=8)
