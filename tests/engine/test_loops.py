"""A framework's loop is found while it runs; where it would clip or accumulate otherwise than the fold, nothing moves.

The loops here have the shape of transformers', Lightning's and Accelerate's; tests/models/test_trainers.py has theirs.
"""

import contextlib
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.engine.loops import unwrapped
from tests.zoo import distance, ours, same_bits, torchs, twins

CLOSE = 1e-12
INF = float("inf")
BATCHES = torch.randn(7, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def mlp():
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False))


def norms():
    """No module of it is folded, so that only the backward is seen."""
    return nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6))


class Reentrant(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x.requires_grad_() if x.is_leaf else x, use_reentrant=True)
        return x


def reentrant():
    return Reentrant(*mlp())


MODELS = {"mlp": mlp, "norms": norms, "reentrant": reentrant}


class TransformersTrainer:
    """transformers.Trainer, as far as gradients go."""

    def __init__(self, model, optimizer, accumulate=1, clip=0.0, around=contextlib.nullcontext):
        self.model, self.optimizer, self.around = model, optimizer, around
        self.args = types.SimpleNamespace(max_grad_norm=clip, gradient_accumulation_steps=accumulate)
        self.accelerator = types.SimpleNamespace(sync_gradients=True)
        self.norms = []

    def train(self):
        return self._inner_training_loop()

    def _inner_training_loop(self):
        steps = self.args.gradient_accumulation_steps
        for index, batch in enumerate(BATCHES, 1):
            last = self.accelerator.sync_gradients = index % steps == 0 or index == len(BATCHES)
            loss = self.training_step(batch)
            with contextlib.nullcontext() if last else self.around():
                loss.backward()
            if last:
                self.norms.append(self._clip_grad_norm(self.model).item())
                self.optimizer.step()
                self.optimizer.zero_grad()

    def training_step(self, batch):
        return self.model(batch).pow(2).sum() / 10

    def _clip_grad_norm(self, model):
        return clip_grad_norm_(model.parameters(), self.args.max_grad_norm or INF)


class LightningTrainer:
    """lightning.pytorch.Trainer, as far as gradients go."""

    def __init__(self, model, optimizer, accumulate=1, clip=None, around=contextlib.nullcontext, by="norm"):
        self.lightning_module, self.optimizers, self.around = model, [optimizer], around
        self.gradient_clip_val, self.gradient_clip_algorithm = clip, types.SimpleNamespace(value=by)
        self.accumulate_grad_batches = accumulate
        self.fit_loop = types.SimpleNamespace(_should_accumulate=lambda: not self.last)

    def fit(self):
        self._run()

    def _run(self):
        (optimizer,) = self.optimizers
        for index, batch in enumerate(BATCHES, 1):
            self.last = index % self.accumulate_grad_batches == 0 or index == len(BATCHES)

            def closure(batch=batch):
                loss = self.lightning_module(batch).pow(2).sum() / 10
                with contextlib.nullcontext() if self.last else self.around():
                    loss.backward()
                if self.last and self.gradient_clip_val:
                    clip = clip_grad_value_ if self.gradient_clip_algorithm.value == "value" else clip_grad_norm_
                    clip(self.lightning_module.parameters(), self.gradient_clip_val)

            if not self.last:
                closure()
            else:
                optimizer.step(closure)
                optimizer.zero_grad()


FRAMEWORKS = {
    "transformers": ("transformers.trainer", TransformersTrainer, "train"),
    "lightning": ("lightning.pytorch.trainer.trainer", LightningTrainer, "fit"),
    "pytorch_lightning": ("pytorch_lightning.trainer.trainer", LightningTrainer, "fit"),
}
each_framework = pytest.mark.parametrize("framework", FRAMEWORKS)


@pytest.fixture(autouse=True)
def frameworks(monkeypatch):
    for module, trainer, _ in FRAMEWORKS.values():
        found = types.ModuleType(module)
        found.Trainer = trainer
        monkeypatch.setitem(sys.modules, module, found)


def train(framework, model, optimizer, **options):
    _, trainer, run = FRAMEWORKS[framework]
    made = trainer(model, optimizer, **options)
    getattr(made, run)()
    return made


# what is the same -----------------------------------------------------------------------------------------------------

# options of the loop, of the fold
RIGHT = {
    "plain": ({}, {}),
    "clip": ({"clip": 0.5}, {"clip_norm": 0.5}),
    "clip, deferred": ({"clip": 0.5}, {"clip_norm": 0.5, "timing": "deferred"}),
    "accumulate": ({"accumulate": 3}, {"accumulate": 3}),  # with a short step at the end
    "both": ({"accumulate": 2, "clip": 0.5}, {"accumulate": 2, "clip_norm": 0.5}),
}


@each_framework
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", RIGHT)
def test_a_loop_that_does_what_the_fold_does(framework, model, name):
    loop, fold = RIGHT[name]
    plain, folded = twins(MODELS[model])
    optimizers = torchs(plain, "SGD"), ours(folded, "SGD")
    gradfold.fold(folded, optimizers[1], **fold)
    theirs, mine = (train(framework, m, o, **loop) for m, o in zip((plain, folded), optimizers, strict=True))
    assert distance(folded, plain) < CLOSE
    if framework == "transformers":  # the norm that it logs
        assert mine.norms == pytest.approx(theirs.norms, rel=CLOSE)


@each_framework
def test_accumulating_around_all_but_the_last(framework):
    plain, folded = twins(mlp)
    optimizers = torchs(plain, "SGD"), ours(folded, "SGD")
    fold = gradfold.fold(folded, optimizers[1], clip_norm=0.5)
    train(framework, plain, optimizers[0], accumulate=3, clip=0.5)
    train(framework, folded, optimizers[1], accumulate=3, clip=0.5, around=fold.accumulating)
    assert distance(folded, plain) < CLOSE


@each_framework
def test_the_fold_may_clip_where_the_loop_does_not(framework):
    plain, folded = twins(mlp)
    optimizers = torchs(plain, "SGD"), ours(folded, "SGD")
    gradfold.fold(folded, optimizers[1], clip_norm=0.5, clip_value=0.3)
    train(framework, folded, optimizers[1])
    for batch in BATCHES:
        (plain(batch).pow(2).sum() / 10).backward()
        clip_grad_norm_(plain.parameters(), 0.5)
        clip_grad_value_(plain.parameters(), 0.3)
        optimizers[0].step()
        optimizers[0].zero_grad()
    assert distance(folded, plain) < CLOSE


def test_lightning_clips_values():
    plain, folded = twins(mlp)
    optimizers = torchs(plain, "SGD"), ours(folded, "SGD")
    gradfold.fold(folded, optimizers[1], clip_value=0.3)
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        train("lightning", model, optimizer, clip=0.3, by="value")
    assert distance(folded, plain) < CLOSE


# what differs ---------------------------------------------------------------------------------------------------------

OWN = {"clip_norm": 0.5}
# options of the loop, of the fold, keys of its groups, and what the message says of them
WRONG = {
    "clip": ({"clip": 0.5}, {}, {}, "=0.5.*fold has clip_norm=None: pass clip_norm=0.5 to gradfold.fold, or set "),
    "deferred": ({"clip": 0.5}, {"timing": "deferred"}, {}, "clip_norm=None: pass clip_norm=0.5"),
    "another clip": ({"clip": 0.5}, {"clip_norm": 0.4}, {}, "clip_norm=0.4: pass clip_norm=0.5"),
    "value": ({"clip": 0.5}, {"clip_value": 0.5}, {}, "clip_norm=None: pass clip_norm=0.5"),
    "order": ({"clip": 0.5}, {"clip_norm": 0.5, "norm_type": 1}, {}, "clip_norm=0.5, norm_type=1: pass"),
    "delayed": ({"clip": 0.5}, {"clip_norm": 0.4, "clip": "delayed"}, {}, "clip_norm=0.4: pass clip_norm=0.5"),
    "groups": ({"clip": 0.5}, {"clip_norm": 0.5}, {"clip_norm": None}, "clip_norm=0.5 and param_groups with their own"),
    "accumulate": ({"accumulate": 4}, {}, {}, "=4, and the fold accumulate=1.*pass accumulate=4 to gradfold.fold, or"),
    "less": ({"accumulate": 2}, {"accumulate": 4}, {}, "=2, and the fold accumulate=4"),
    "one": ({}, {"accumulate": 2}, {}, "=1, and the fold accumulate=2"),
}


@each_framework
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", WRONG)
def test_a_loop_that_does_something_else(framework, model, name):
    loop, fold, keys, message = WRONG[name]
    start, folded = twins(MODELS[model])
    optimizer = ours(folded)
    optimizer.param_groups[0].update(keys)
    gradfold.fold(folded, optimizer, **fold)
    said = "transformers' Trainer" if framework == "transformers" else "Lightning's Trainer"
    with pytest.raises(gradfold.FoldError, match=f"{said}.*{message}"):
        train(framework, folded, optimizer, **loop)
    assert same_bits(folded, start) and all("step" not in s or s["step"] == 0 for s in optimizer.state.values())


@pytest.mark.parametrize("fold", [{}, {"clip_norm": 0.5}, {"clip_value": 0.4}], ids=str)
def test_lightning_clips_values_otherwise(fold):
    start, folded = twins(mlp)
    optimizer = ours(folded)
    gradfold.fold(folded, optimizer, **fold)
    with pytest.raises(gradfold.FoldError, match="by value.*gradient_clip_algorithm='value'.*pass clip_value=0.5"):
        train("lightning", folded, optimizer, clip=0.5, by="value")
    assert same_bits(folded, start)


@each_framework
def test_it_is_looked_at_in_every_step(framework):
    """A callback may change what is clipped."""
    _, folded = twins(mlp)
    optimizer = ours(folded)
    gradfold.fold(folded, optimizer)
    _, trainer, run = FRAMEWORKS[framework]
    made = trainer(folded, optimizer)
    getattr(made, run)()
    if framework == "transformers":
        made.args.max_grad_norm = 1.0
    else:
        made.gradient_clip_val = 1.0
    _, before = twins(lambda: folded)
    with pytest.raises(gradfold.FoldError, match="clips gradients by their norm"):
        getattr(made, run)()
    assert same_bits(folded, before)


@each_framework
def test_a_subclass_of_the_trainer(framework, monkeypatch):
    module, trainer, run = FRAMEWORKS[framework]

    class Theirs(trainer):
        def training_step(self, batch):
            return super().training_step(batch)

    monkeypatch.setitem(FRAMEWORKS, framework, (module, Theirs, run))
    _, folded = twins(mlp)
    optimizer = ours(folded)
    gradfold.fold(folded, optimizer)
    with pytest.raises(gradfold.FoldError, match="clips gradients by their norm"):
        train(framework, folded, optimizer, clip=1.0)


@each_framework
def test_a_part_of_its_model_is_folded(framework):
    start, model = twins(mlp)
    optimizer = ours(model[0])
    gradfold.fold(model[0], optimizer)
    with pytest.raises(gradfold.FoldError, match="clips gradients by their norm"):
        train(framework, model, optimizer, clip=1.0)
    assert same_bits(model, start)


@each_framework
def test_a_loop_that_steps_an_optimizer_of_its_own(framework):
    start, folded = twins(mlp)
    gradfold.fold(folded, ours(folded))
    with pytest.raises(gradfold.FoldError, match=r"an optimizer of its own \(AdamW\).*never calls step\(\)"):
        train(framework, folded, torchs(folded))
    assert same_bits(folded, start)


# what is none of its business -----------------------------------------------------------------------------------------


@each_framework
def test_a_loop_that_trains_another_model(framework):
    """As a discriminator that is folded, and trains inside of somebody's training_step."""
    plain, other = twins(mlp)
    inner_plain, inner = twins(mlp)
    optimizers = torchs(inner_plain), ours(inner)
    gradfold.fold(inner, optimizers[1])
    for model, inside, optimizer in ((plain, inner_plain, optimizers[0]), (other, inner, optimizers[1])):

        class Both(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, x, inside=inside, optimizer=optimizer):
                inside(x).pow(2).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                return self.model(x)

        train(framework, Both(model), torchs(model), clip=1.0, accumulate=2)
    assert distance(inner, inner_plain) < CLOSE and distance(other, plain) < CLOSE


@each_framework
def test_a_paused_fold_is_trained_as_ever(framework):
    plain, folded = twins(mlp)
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1])
    train(framework, plain, optimizers[0], clip=0.5, accumulate=2)
    with fold.paused():
        train(framework, folded, optimizers[1], clip=0.5, accumulate=2)
    assert distance(folded, plain) < CLOSE


def test_a_trainer_whose_clipping_was_taken_over(monkeypatch):
    class Mine(TransformersTrainer):
        def _clip_grad_norm(self, model):
            return fold.clip_grad_norm_(self.args.max_grad_norm)

    plain, folded = twins(mlp)
    optimizers = torchs(plain, "SGD"), ours(folded, "SGD")
    fold = gradfold.fold(folded, optimizers[1], timing="deferred")
    TransformersTrainer(plain, optimizers[0], clip=0.5).train()
    Mine(folded, optimizers[1], clip=0.5).train()
    assert distance(folded, plain) < CLOSE
    trainer = TransformersTrainer(folded, optimizers[1], clip=0.4)
    trainer.accelerator.clip_grad_norm_ = trainer._clip_grad_norm = lambda *_: fold.clip_grad_norm_(0.4)
    trainer.train()


def test_a_lightning_module_that_clips_by_itself():
    class Module(nn.Sequential):
        def configure_gradient_clipping(self, *args):
            """As a LightningModule's."""

    class Own(Module):
        def configure_gradient_clipping(self, *args):
            """In its own way."""

    for kind, refused in ((Module, True), (Own, False)):
        _, folded = twins(lambda kind=kind: kind(*mlp()))
        optimizer = ours(folded)
        gradfold.fold(folded, optimizer)
        with pytest.raises(gradfold.FoldError, match="Lightning's Trainer" if refused else "torch.nn.utils"):
            train("lightning", folded, optimizer, clip=1.0)


def test_manual_optimization_is_the_modules_own():
    _, folded = twins(mlp)
    optimizer = ours(folded)
    folded.automatic_optimization = False
    gradfold.fold(folded, optimizer, clip_norm=0.5)
    train("lightning", folded, optimizer, clip=0.5)


# Accelerate -----------------------------------------------------------------------------------------------------------


class GradientState:
    _shared_state: dict = {}

    def __init__(self):
        self.__dict__ = self._shared_state


@pytest.fixture
def accelerate(monkeypatch):
    """Accelerate's state for ``accumulate()``, which all of its objects share."""
    found = types.ModuleType("accelerate.state")
    found.GradientState = GradientState
    monkeypatch.setitem(sys.modules, "accelerate.state", found)
    monkeypatch.setattr(GradientState, "_shared_state", {"num_steps": 3, "sync_gradients": True})
    return GradientState()


def accelerated(model, optimizer, state):
    for index, batch in enumerate(BATCHES, 1):
        state.sync_gradients = index % 3 == 0 or index == len(BATCHES)
        (model(batch).pow(2).sum() / 30).backward()
        if state.sync_gradients:
            optimizer.step()
            optimizer.zero_grad()


def test_accelerates_accumulation(accelerate):
    plain, folded = twins(mlp)
    folded._is_accelerate_prepared = True
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1], accumulate=3)
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        accelerated(model, optimizer, accelerate)
    assert distance(folded, plain) < CLOSE


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerates_accumulation_differs(accelerate, model, accumulate):
    start, folded = twins(MODELS[model])
    folded._is_accelerate_prepared = True
    optimizer = ours(folded)
    gradfold.fold(folded, optimizer, accumulate=accumulate)
    with pytest.raises(gradfold.FoldError, match="Accelerate has gradient_accumulation_steps=3.*pass accumulate=3"):
        accelerated(folded, optimizer, accelerate)
    assert same_bits(folded, start)


def test_a_model_that_accelerate_has_not_prepared(accelerate):
    _, folded = twins(mlp)
    optimizer = ours(folded)
    gradfold.fold(folded, optimizer)
    accelerate.sync_gradients = False
    folded(BATCHES[0]).sum().backward()
    optimizer.step()


# wrapped optimizers ---------------------------------------------------------------------------------------------------


class AcceleratedOptimizer(torch.optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad()


class LightningOptimizer:
    """It takes over the class of what it wraps, and forwards what it does not have itself."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None, **kwargs):
        return self._optimizer.step(closure=closure, **kwargs)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


WRAPPERS = {
    "accelerate.optimizer": AcceleratedOptimizer,
    "lightning.pytorch.core.optimizer": LightningOptimizer,
    "pytorch_lightning.core.optimizer": LightningOptimizer,
}


@pytest.fixture(params=WRAPPERS)
def wrapper(request, monkeypatch):
    kind = WRAPPERS[request.param]
    for module, theirs in WRAPPERS.items():
        found = types.ModuleType(module)
        if module == request.param:
            setattr(found, theirs.__name__, theirs)
        monkeypatch.setitem(sys.modules, module, found)
    return kind


@pytest.mark.parametrize("early", [True, False])
def test_a_wrapped_optimizer(wrapper, early):
    """It is folded as what it holds, and steps as before, whether it was folded before it was wrapped or after."""
    plain, folded = twins(mlp)
    theirs, optimizer = torchs(plain), ours(folded)
    wrapped = wrapper(optimizer)
    if wrapper is AcceleratedOptimizer:  # which may be prepared again
        wrapped = wrapper(wrapped)
    assert unwrapped(wrapped) is optimizer
    fold = gradfold.fold(folded, optimizer if early else wrapped)
    for batch in BATCHES:
        for model, one in ((plain, theirs), (folded, wrapped)):
            one.zero_grad()
            model(batch).pow(2).sum().backward()
            one.step()
        assert wrapped.param_groups is optimizer.param_groups and repr(wrapped)
    theirs.zero_grad()
    assert distance(folded, plain) < CLOSE and fold._state.optimizer is optimizer
    with pytest.raises(gradfold.FoldError, match="folded into a model already"):
        gradfold.fold(folded, wrapped)


def test_a_wrapped_optimizer_saves_and_schedules():
    _, folded = twins(mlp)
    optimizer = ours(folded)
    wrapped = LightningOptimizer(optimizer)
    assert wrapped.state_dict().keys() == optimizer.state_dict().keys()
    torch.optim.lr_scheduler.StepLR(wrapped, 1, gamma=0.5)
    assert not hasattr(object.__new__(type(optimizer)), "param_groups")


def test_a_wrapped_optimizer_of_torch_is_refused(wrapper):
    _, folded = twins(mlp)
    wrapped = wrapper(torchs(folded))
    with pytest.raises(gradfold.FoldError, match="holds AdamW, and AdamW is not one of gradfold's; use gradfold.AdamW"):
        gradfold.fold(folded, wrapped)
    assert type(folded[0]) is nn.Linear


@pytest.mark.parametrize("kind", [AcceleratedOptimizer, LightningOptimizer])
def test_a_wrapper_that_nobody_knows_is_refused(kind):
    """It may change what a step does, as Lookahead does."""
    _, folded = twins(mlp)
    with pytest.raises(
        gradfold.FoldError, match=r"a wrapper around gradfold.AdamW.*fold\(model, optimizer.optimizer\)"
    ):
        gradfold.fold(folded, kind(ours(folded)))
    assert type(folded[0]) is nn.Linear
