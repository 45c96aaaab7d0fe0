"""Several folds in one backward: refused before any weight moves, unless it is meant, or weights wait anyway."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold import FoldError
from tests.zoo import distance, ours, torchs

CLOSE = 1e-12


def net(*sizes):
    layers = [layer for m, n in itertools.pairwise(sizes) for layer in (nn.Linear(m, n), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Checkpointed(nn.Module):
    """A network in one reentrant segment, or in one that keeps its graph."""

    def __init__(self, body, reentrant):
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x):
        if self.reentrant and not x.requires_grad:  # it hands gradients on only to inputs that require grad
            x = x.clone().requires_grad_()
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


def pair(first, second):
    """Two networks, and a copy of both for plain torch."""
    torch.manual_seed(0)
    made = nn.ModuleList([first(), second()]).double()
    return made, copy.deepcopy(made)


def noise(step, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step), dtype=torch.double)


def values(models):
    return [p.detach().clone() for p in models.parameters()]


def unmoved(models, before):
    return all(torch.equal(p, b) for p, b in zip(models.parameters(), before, strict=True))


# loops: (models, optimizers, step) ------------------------------------------------------------------------------------


def gan(models, optimizers, step, freeze=False):
    generator, discriminator = models
    optimizers[1].zero_grad()
    fake = generator(noise(step, 5, 4))
    real = discriminator(noise(100 + step, 5, 8))
    (F.softplus(-real).mean() + F.softplus(discriminator(fake.detach())).mean()).backward()
    optimizers[1].step()
    discriminator.requires_grad_(not freeze)
    optimizers[0].zero_grad()
    F.softplus(-discriminator(fake)).mean().backward()
    optimizers[0].step()
    discriminator.requires_grad_(True)


def actor_critic(models, optimizers, step, freeze=False):
    """DDPG: the critic's own loss, then the actor's through the critic."""
    actor, critic = models
    states = noise(step, 5, 4)
    critic(actor(states).detach()).pow(2).mean().backward()
    optimizers[1].step()
    optimizers[1].zero_grad()
    critic.requires_grad_(not freeze)
    (-critic(actor(states)).mean()).backward()
    optimizers[0].step()
    optimizers[0].zero_grad()
    critic.requires_grad_(True)
    optimizers[1].zero_grad()


def reward(models, optimizers, step, freeze=False):
    """A policy's reward comes from a model that is folded, too."""
    policy, judge = models
    judge.requires_grad_(not freeze)
    (-judge(policy(noise(step, 5, 4))).mean()).backward()
    optimizers[0].step()
    optimizers[0].zero_grad()
    judge.requires_grad_(True)


def towers(models, optimizers, step, freeze=False):
    """One loss that trains both."""
    left, right = models
    scores = left(noise(step, 5, 4)).sum(1) * right(noise(100 + step, 5, 8)).sum(1)
    scores.pow(2).mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


THROUGH = {"gan": gan, "actor_critic": actor_critic, "reward": reward}
BODIES = {
    "plain": net,
    "reentrant": lambda *sizes: nn.Sequential(Checkpointed(net(*sizes), True)),
    "kept": lambda *sizes: nn.Sequential(Checkpointed(net(*sizes), False)),
}


def run(models, plain, loop, options, steps=3, **more):
    theirs = [torchs(plain[0]), torchs(plain[1], "SGD")]
    mine = [ours(models[0]), ours(models[1], "SGD")]
    for model, optimizer, chosen in zip(models, mine, options, strict=True):
        gradfold.fold(model, optimizer, **chosen)
    for step in range(steps):
        loop(plain, theirs, step, **more)
        loop(models, mine, step, **more)
    return distance(models, plain)


# refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [reward, towers])
@pytest.mark.parametrize("body", ["plain", "kept"])
@pytest.mark.parametrize(
    "options", [({}, {}), ({"joint": True}, {}), ({}, {"joint": True}), ({"timing": "deferred"}, {})]
)
def test_before_any_weight_moves(loop, body, options):
    models, _ = pair(lambda: BODIES[body](4, 6, 8), lambda: BODIES[body](8, 6, 1))
    optimizers = [ours(models[0]), ours(models[1], "SGD")]
    for model, optimizer, chosen in zip(models, optimizers, options, strict=True):
        gradfold.fold(model, optimizer, **chosen)
    before = values(models)
    with pytest.raises(FoldError, match=r"two folds.*AdamW.*SGD|two folds.*SGD.*AdamW") as caught:
        loop(models, optimizers, 0)
    assert unmoved(models, before)
    for way in ("requires_grad_(False)", "joint=True", "timing='deferred'"):
        assert way in str(caught.value)


@pytest.mark.parametrize("name", THROUGH)
def test_a_loss_that_passes_through(name):
    models, _ = pair(lambda: net(4, 6, 8), lambda: net(8, 6, 1))
    optimizers = [ours(models[0]), ours(models[1], "SGD")]
    for model, optimizer in zip(models, optimizers, strict=True):
        gradfold.fold(model, optimizer)
    with pytest.raises(FoldError, match="one backward reaches two folds"):
        THROUGH[name](models, optimizers, 0)


@pytest.mark.parametrize("order", [0, 1])
def test_through_a_reentrant_segment(order):
    """Its weights are not in the outer graph, but its node is."""
    bodies = [lambda: net(4, 6, 8), lambda: BODIES["reentrant"](8, 6, 1)]
    models, _ = pair(*bodies)
    optimizers = [ours(model) for model in models]
    for index in (order, 1 - order):
        gradfold.fold(models[index], optimizers[index])
    before = values(models)
    with pytest.raises(FoldError, match="two folds"):
        models[1](models[0](noise(0, 5, 4))).sum().backward()
    assert unmoved(models, before)


@pytest.mark.parametrize("hooked", [False, True])
def test_where_both_are_in_segments(hooked):
    """No outermost backward is seen of either; they are told to be of one by the tensor that it began at."""
    body = (lambda *_: nn.Sequential(Checkpointed(nn.LayerNorm(8), True))) if hooked else BODIES["reentrant"]
    models, _ = pair(lambda: BODIES["reentrant"](4, 6, 8), lambda: body(8, 6, 8))
    for model in models:
        gradfold.fold(model, ours(model))
    before = values(models)
    with pytest.raises(FoldError, match="two folds"):
        models[1](models[0](noise(0, 5, 4))).sum().backward()
    assert unmoved(models, before)


@pytest.mark.parametrize("three", [0, 1, 2])
def test_one_of_three(three):
    torch.manual_seed(0)
    models = nn.ModuleList(net(4, 4) for _ in range(3)).double()
    for index, model in enumerate(models):
        gradfold.fold(model, ours(model), joint=index != three)
    before = values(models)
    with pytest.raises(FoldError, match="two folds"):
        models[2](models[1](models[0](noise(0, 5, 4)))).sum().backward()
    assert unmoved(models, before)


def test_two_passes_cannot_be_joint():
    models, _ = pair(lambda: net(4, 8), lambda: net(8, 1))
    fold = gradfold.fold(models[0], ours(models[0]), clip_norm=1.0, clip="two_pass", joint=True)
    gradfold.fold(models[1], ours(models[1]), joint=True)
    before = values(models)
    with pytest.raises(FoldError, match=r"two_pass.*clip='exact'"):
        fold.backward(models[1](models[0](noise(0, 5, 4))).sum())
    assert unmoved(models, before)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_weight_of_two_folds(hooked):
    shared = nn.LayerNorm(4) if hooked else nn.Linear(4, 4)
    first, second = nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(shared, nn.Linear(4, 4))
    gradfold.fold(first, ours(first))
    with pytest.raises(FoldError, match="already"):
        gradfold.fold(second, ours(second))


# exact ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THROUGH)
@pytest.mark.parametrize("body", BODIES)
def test_frozen_for_the_pass(name, body):
    models, plain = pair(lambda: net(4, 6, 8), lambda: BODIES[body](8, 6, 1))
    assert run(models, plain, THROUGH[name], [{}, {}], freeze=True) <= CLOSE


@pytest.mark.parametrize("name", ["gan", "actor_critic"])
@pytest.mark.parametrize(
    "options",
    [
        [{"timing": "deferred"}, {"timing": "deferred"}],
        [{"clip_norm": 1e9}, {"timing": "deferred"}],
        [{"timing": "deferred"}, {"clip_norm": 1e9}],
    ],
    ids=str,
)
def test_weights_that_wait(name, options):
    """What the other's loss brought is cleared by zero_grad, as torch's gradients are."""
    models, plain = pair(lambda: net(4, 6, 8), lambda: net(8, 6, 1))
    assert run(models, plain, THROUGH[name], options) <= CLOSE


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(
    "options",
    [[{"joint": True}] * 2, [{"joint": True}, {"timing": "deferred"}], [{"joint": True, "clip_norm": 1e9}] * 2],
    ids=str,
)
def test_a_loss_that_trains_both(body, options):
    models, plain = pair(lambda: BODIES[body](4, 6, 8), lambda: BODIES[body](8, 6, 1))
    assert run(models, plain, towers, options) <= CLOSE


def test_folds_one_after_the_other_do_not_meet():
    models, plain = pair(lambda: net(4, 8), lambda: net(8, 1))

    def alone(models, optimizers, step):
        for model, width in zip(models, (4, 8), strict=True):
            model(noise(step, 5, width)).pow(2).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    assert run(models, plain, alone, [{}, {}]) <= CLOSE


def test_a_removed_or_paused_fold_is_none():
    models, _ = pair(lambda: net(4, 8), lambda: net(8, 1))
    folds = [gradfold.fold(model, ours(model)) for model in models]
    loss = lambda: models[1](models[0](noise(0, 5, 4))).sum()  # noqa: E731
    with folds[1].paused():
        loss().backward()
    models[1].zero_grad()
    folds[0]._state.optimizer.step()
    models[1].zero_grad()
    folds[1].remove()
    before = values(models[1:])
    loss().backward()
    assert unmoved(models[1:], before) and models[1][0].weight.grad is not None
