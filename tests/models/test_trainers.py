"""The trainers of transformers, Accelerate and Lightning themselves, where they are installed: right, or refused."""

import copy
import logging

import pytest
import torch
from torch import nn

import gradfold
from gradfold.head.lazy_logits import LazyLogits
from tests.llama import small_llama
from tests.zoo import distance, same_bits

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.usefixtures("precise"), pytest.mark.filterwarnings("ignore")]
CLOSE = 1e-6  # of the losses, which transformers computes in fp32
GENERATOR = torch.Generator().manual_seed(3)
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(53, (7, 6), generator=GENERATOR)]


def causal():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(small_llama(vocab_size=53, hidden_size=8, num_attention_heads=2)).double()


def optimizer_of(kind, model):
    return kind.SGD(model.parameters(), lr=0.5, momentum=0.9)


# transformers' Trainer ------------------------------------------------------------------------------------------------


class Log(transformers.TrainerCallback):
    def __init__(self):
        self.norms = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))


def trainer(folder, model, optimizer, resume=None, **arguments):
    pytest.importorskip("accelerate")
    transformers.utils.logging.disable_progress_bar()
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        lr_scheduler_type="constant",
        num_train_epochs=2,
        **arguments,
    )
    log = Log()
    optimizers = (optimizer, None) if optimizer is not None else (None, None)
    made = transformers.Trainer(model, arguments, train_dataset=ROWS, optimizers=optimizers, callbacks=[log])
    made.train(resume_from_checkpoint=resume)
    return log.norms


# of the Trainer, of the fold
RIGHT = {
    "plain": ({"max_grad_norm": 0.0}, {}),
    "clip": ({"max_grad_norm": 0.3}, {"clip_norm": 0.3}),
    "accumulate": ({"max_grad_norm": 0.3, "gradient_accumulation_steps": 3}, {"clip_norm": 0.3, "accumulate": 3}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_transformers_trainer(name, tmp_path):
    """With the norms that it logs, and a short step at the end of each epoch."""
    arguments, options = RIGHT[name]
    plain, model, again = causal(), causal(), causal()
    theirs = trainer(tmp_path / "plain", plain, optimizer_of(torch.optim, plain), **arguments)
    optimizer = optimizer_of(gradfold, model)
    gradfold.fold(model, optimizer, **options)
    mine = trainer(tmp_path / "folded", model, optimizer, **arguments)
    assert distance(model, plain) < CLOSE and mine == pytest.approx(theirs, rel=1e-5)
    optimizer = optimizer_of(gradfold, again)
    gradfold.fold(again, optimizer, **options)
    trainer(tmp_path / "folded", again, optimizer, resume=str(tmp_path / "folded/checkpoint-2"), **arguments)
    assert same_bits(again, model)


WRONG = {
    "its default": ({}, {}, r"max_grad_norm=1.0\).*clip_norm=None: pass clip_norm=1.0 to gradfold.fold, or set max_g"),
    "another": ({"max_grad_norm": 0.3}, {"clip_norm": 1.0}, "clip_norm=1.0: pass clip_norm=0.3"),
    "accumulate": (
        {"max_grad_norm": 0.0, "gradient_accumulation_steps": 3},
        {},
        "gradient_accumulation_steps=3, and the fold accumulate=1",
    ),
    "fold's": ({"max_grad_norm": 0.0}, {"accumulate": 2}, "gradient_accumulation_steps=1, and the fold accumulate=2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_transformers_trainer_that_differs(name, tmp_path):
    arguments, options, message = WRONG[name]
    start, model = causal(), causal()
    optimizer = optimizer_of(gradfold, model)
    gradfold.fold(model, optimizer, **options)
    with pytest.raises(gradfold.FoldError, match=f"transformers' Trainer.*{message}"):
        trainer(tmp_path, model, optimizer, **arguments)
    assert same_bits(model, start)


def test_transformers_trainer_with_an_optimizer_of_its_own(tmp_path):
    start, model = causal(), causal()
    gradfold.fold(model, optimizer_of(gradfold, model))
    with pytest.raises(gradfold.FoldError, match=r"steps an optimizer of its own \(AdamW\).*optimizers=\(optimizer"):
        trainer(tmp_path, model, None, max_grad_norm=0.0)
    assert same_bits(model, start)


# Accelerate -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    found = pytest.importorskip("accelerate")
    yield found
    for state in (found.state.AcceleratorState, found.state.GradientState):
        state._reset_state()


def accelerated(model, optimizer, accelerator, clip=None):
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(ROWS, batch_size=2))
    norms = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients and clip:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
            optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("late", [False, True])
def test_accelerate(accelerate, steps, late):
    plain, model = causal(), causal()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
    theirs = accelerated(plain, optimizer_of(torch.optim, plain), accelerator, clip=0.3)
    optimizer = optimizer_of(gradfold, model)
    if late:
        model, optimizer = accelerator.prepare(model, optimizer)
    gradfold.fold(model, optimizer, accumulate=steps, clip_norm=0.3)
    mine = accelerated(model, optimizer, accelerator, clip=0.3)
    assert distance(model, plain) < CLOSE and mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_accelerate_that_differs(accelerate, clip):
    start, model = causal(), causal()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=1 if clip else 3)
    optimizer = optimizer_of(gradfold, model)
    gradfold.fold(model, optimizer, timing="deferred")
    message = r"clip_grad_norm_\(max_norm=0.3\)" if clip else "Accelerate has gradient_accumulation_steps=3"
    with pytest.raises(gradfold.FoldError, match=message):
        accelerated(model, optimizer, accelerator, clip)
    assert same_bits(model, start)


def test_accelerates_autocast_is_no_replaced_forward(accelerate):
    """The head folds as well after ``prepare`` as before it, and the model can be copied, unwrapped and unfolded."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    models, plain = [causal().float(), causal().float()], causal().float()
    for model, late in zip(models, (False, True), strict=True):
        optimizer = optimizer_of(gradfold, model)
        if late:
            model, optimizer = accelerator.prepare(model, optimizer)
        fold = gradfold.fold(model, optimizer)
        if not late:
            model, optimizer = accelerator.prepare(model, optimizer)
        assert [row.how for row in fold.report().heads] == ["folded"]
        for row in ROWS:
            batch = {key: value[None] for key, value in row.items()}
            out = model(**batch)
            assert isinstance(out.logits, LazyLogits) and out.logits._made is None
            accelerator.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
        copied = copy.deepcopy(model)
        assert vars(copied)["forward"].__self__ is copied and type(copied) is transformers.LlamaForCausalLM
        assert not isinstance(copied(**batch).logits, LazyLogits)
        fold.remove()
        assert vars(model)["forward"].__func__.__globals__["__name__"].startswith("accelerate.")
        assert not any("gradfold" in key for key in vars(model)) and not isinstance(model(**batch).logits, LazyLogits)
    assert same_bits(*models)
    assert not same_bits(models[0], plain)


def test_a_forward_that_was_replaced_before_accelerates_autocast(accelerate):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    for before in (True, False):
        model = causal()
        optimizer = optimizer_of(gradfold, model)
        if not before:
            model, optimizer = accelerator.prepare(model, optimizer)
        forward = model.forward
        model.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)
        if before:
            model, optimizer = accelerator.prepare(model, optimizer)
        (row,) = gradfold.fold(model, optimizer).report().heads
        assert row.how == "plain" and row.why == "its model's forward was replaced"


# Lightning ------------------------------------------------------------------------------------------------------------

X = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def lightning_module(lightning, kind, manual=False, clip=None, late=False, **options):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
            self.start = copy.deepcopy(self.net).requires_grad_(False)
            self.automatic_optimization = not manual
            self.folded = kind is not gradfold

        def training_step(self, batch, index):
            loss = (self.net(batch[0]) - batch[0].flip(1)).square().sum()
            if not manual:
                return loss
            optimizer = self.optimizers()
            if not self.folded:
                gradfold.fold(self.net, optimizer, **options)
                self.folded = True
            optimizer.zero_grad()
            self.manual_backward(loss)
            if clip:
                self.clip_gradients(optimizer, gradient_clip_val=clip, gradient_clip_algorithm="norm")
            optimizer.step()
            assert repr(optimizer) and optimizer.state_dict()
            self.lr_schedulers().step()

        def configure_optimizers(self):
            optimizer = kind.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
            if not self.folded and not late:
                gradfold.fold(self.net, optimizer, **options)
                self.folded = True
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]

    return Module()


def fit(lightning, module, **arguments):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    made = lightning.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet, **arguments)
    made.fit(module, loader)
    return module.net


VALUE = {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"}
# of the Trainer, of the module, of the fold
LIGHTNING = {
    "plain": ({}, {}, {}),
    "clip": ({"gradient_clip_val": 0.5}, {}, {"clip_norm": 0.5}),
    "value": (VALUE, {}, {"clip_value": 0.3}),
    "accumulate": ({"accumulate_grad_batches": 3}, {}, {"accumulate": 3}),
    "manual": ({}, {"manual": True}, {}),
    "manual, late": ({}, {"manual": True, "late": True}, {}),
    "manual, clip": ({}, {"manual": True, "clip": 0.5}, {"clip_norm": 0.5}),
}


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightning(name):
    lightning = pytest.importorskip("lightning")
    arguments, how, options = LIGHTNING[name]
    plain = fit(lightning, lightning_module(lightning, torch.optim, **how), **arguments)
    model = fit(lightning, lightning_module(lightning, gradfold, **how, **options), **arguments)
    assert distance(model, plain) < 1e-12


REFUSED = {
    "clip": ({"gradient_clip_val": 0.5}, {}, {}, r"gradient_clip_val=0.5\).*clip_norm=None: pass clip_norm=0.5"),
    "value": (VALUE, {}, {}, "gradient_clip_algorithm='value'.*clip_value=None: pass clip_value=0.3"),
    "accumulate": ({"accumulate_grad_batches": 3}, {}, {}, "accumulate_grad_batches=3, and the fold accumulate=1"),
    "manual, clip": ({}, {"manual": True, "clip": 0.5}, {"timing": "deferred"}, r"clip_grad_norm_\(max_norm=0.5\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lightning_that_differs(name):
    lightning = pytest.importorskip("lightning")
    arguments, how, options, message = REFUSED[name]
    module = lightning_module(lightning, gradfold, **how, **options)
    with pytest.raises(gradfold.FoldError, match=message):
        fit(lightning, module, **arguments)
    assert same_bits(module.net, module.start)
