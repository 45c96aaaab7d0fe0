"""transformers' Trainer, folded by one line, ends where it ends with torch's optimizer, and logs the same."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import gradfold
from tests.integrations.runs import IDS, ROWS, USUAL, Run, assert_same, causal, plain_trainer
from tests.zoo import distance, same_bits

transformers = pytest.importorskip("transformers", reason="the framework: pip install transformers")
pytest.importorskip("accelerate", reason="Trainer needs it: pip install accelerate")
pytestmark = [pytest.mark.usefixtures("precise"), pytest.mark.filterwarnings("ignore")]
PLAIN = {"head": "plain"}
LONG = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@functools.cache
def usual(folder):
    """The plain run, with a checkpoint of every second step."""
    return Run(folder, save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    to_fp32 = torch.Tensor.float
    torch.Tensor.float = lambda t: t if t.dtype == torch.float64 else to_fp32(t)
    try:
        return usual(tmp_path_factory.mktemp("plain"))
    finally:
        torch.Tensor.float = to_fp32


# one line -------------------------------------------------------------------------------------------------------------


def test_accumulation_clipping_schedule_and_resume(tmp_path, plain):
    """The norms, losses and rates that it logs are the same, with a short step at the end of each epoch; either one
    resumes from the other's checkpoint."""
    folded = Run(tmp_path, PLAIN, save_strategy="steps", save_steps=2)
    assert_same(folded, plain)
    assert min(log["grad_norm"] for log in folded.logs) > USUAL["max_grad_norm"]
    again = Run(tmp_path, PLAIN, resume=f"{tmp_path}/checkpoint-2")
    assert same_bits(again.model, folded.model) and again.logs == folded.logs[2:]
    theirs = f"{plain.trainer.args.output_dir}/checkpoint-2"
    for resumed in (Run(tmp_path, PLAIN, resume=theirs), Run(tmp_path, resume=f"{tmp_path}/checkpoint-2")):
        assert distance(resumed.model, plain.model) <= 1e-12


def test_its_own_head(tmp_path, plain):
    """transformers computes the loss in fp32 but for this suite's fixture; the folded one takes it from the head."""
    folded = Run(tmp_path, {})
    assert_same(folded, plain)
    (head,) = folded.fold.report().heads
    assert head.how == "folded" and not head.logits
    assert type(folded.trainer).__name__ == "Trainer" and isinstance(folded.trainer, transformers.Trainer)
    assert folded.fold.options.clip_norm == USUAL["max_grad_norm"]


class Mine(gradfold.hf.FoldMixin, transformers.Trainer):
    fold_options = PLAIN


def test_the_mixin(tmp_path, plain):
    make = lambda model, arguments, log: Mine(  # noqa: E731
        model, transformers.TrainingArguments(remove_unused_columns=False, **arguments), callbacks=[log],
        train_dataset=ROWS,
    )  # fmt: skip
    assert_same(Run(tmp_path, make=make), plain)


def label_smoothed(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own, of the logits."""
    logits = outputs["logits"][:, :-1].transpose(1, 2)
    loss = F.cross_entropy(logits, labels[:, 1:], label_smoothing=0.2, reduction="sum")
    return loss / num_items_in_batch


def optimizer_of(kind):
    """Two groups, and a scheduler that is made before the Trainer is."""

    def make(model, arguments, log):
        matrices = [p for p in model.parameters() if p.dim() > 1]
        groups = [{"params": matrices}, {"params": [p for p in model.parameters() if p.dim() < 2], "lr": 1e-3}]
        optimizer = kind(groups, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return plain_trainer(model, arguments, log, optimizers=(optimizer, scheduler))

    return make


def with_loss(model, arguments, log):
    return plain_trainer(model, arguments, log, compute_loss_func=label_smoothed)


def with_class(model, arguments, log):
    made = (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.5})
    return plain_trainer(model, arguments, log, optimizer_cls_and_kwargs=made)


CHECKPOINTS = {"gradient_checkpointing": True}
SAVED = {"save_strategy": "steps", "save_steps": 2}
ONE = {"gradient_accumulation_steps": 1}
FREE = {"max_grad_norm": 0.0}
# arguments of Trainer, options of the fold, how Trainer is made
FEATURES = {
    "no clipping": (FREE, {}, None),
    "one batch a step, no clipping": (ONE | FREE, {}, None),
    "two_pass": (ONE, {"clip": "two_pass"}, None),
    "deferred": (ONE | FREE, {"timing": "deferred"}, None),
    "tape on the host": ({}, {"tape": "host"}, None),
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}, None),
    "compute_loss_func": ({}, {}, with_loss),
    "NEFTune": ({"neftune_noise_alpha": 5.0, "seed": 3}, {}, None),
    "torch's optimizer and scheduler": ({}, {}, optimizer_of(torch.optim.AdamW)),
    "gradfold's optimizer": ({}, {}, optimizer_of(gradfold.AdamW)),
    "optimizer_cls_and_kwargs": ({}, {}, with_class),
    "sgd": ({"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"}, {}, None),
    "reentrant checkpoints": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {},
        None,
    ),
    "plateau": ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "warmup_steps": 0}, {}, None),
    "adagrad": ({"optim": "adagrad", "optim_args": "lr_decay=0.1"}, {}, None),
    "rmsprop": ({"optim": "rmsprop", "optim_args": "momentum=0.5,centered=True", "learning_rate": 1e-3}, {}, None),
    "adamw_torch": ({"optim": "adamw_torch", "adam_beta2": 0.9, "adam_epsilon": 1e-6}, {}, None),
    "paged": ({"optim": "paged_adamw_32bit"}, {}, None),
    "checkpoints": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {},
        None,
    ),
    "linear": ({"lr_scheduler_type": "linear", "warmup_steps": 0}, {}, None),
    "a long step": ({"gradient_accumulation_steps": 9}, {}, None),
    "every batch alone": (ONE, {}, None),
    "average tokens off": ({"average_tokens_across_devices": False}, {}, None),
    "max_steps": ({"max_steps": 4}, {}, None),
}


def both(tmp_path, arguments, options, make):
    # the plain run of names that need other packages takes torch's AdamW; gradfold's own optimizers exist unfolded, too
    plainly = {"optim": "adamw_torch"} if str(arguments.get("optim", "")).startswith("paged") else {}
    evaluated = {"eval_dataset": ROWS[:4]} if "eval_strategy" in arguments else {}
    made = functools.partial(make or plain_trainer, **evaluated)
    theirs = Run(tmp_path / "plain", make=made, **{**arguments, **plainly})
    mine = Run(tmp_path / "folded", {**PLAIN, **options}, make=made, **arguments)
    assert_same(mine, theirs)
    assert distance(mine.model, causal()) > 1e-3
    return mine


QUICK = ("no clipping", "two_pass", "NEFTune", "torch's optimizer and scheduler", "sgd")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=LONG) for name in FEATURES])
def test_features(tmp_path, name):
    arguments, options, make = FEATURES[name]
    both(tmp_path, arguments, options, make)


def test_stored_states_follow_from_optim(tmp_path):
    """And ``optim_args`` say the same as ``fold_trainer``; a run resumes to the bit with random rounding."""
    model = {"hidden_size": 64, "num_attention_heads": 2}
    named = {"optim": "adamw_bnb_8bit", "optim_args": "rounding=stochastic,small_size=0", "max_steps": 4}
    runs = [
        Run(
            tmp_path / "named",
            {},
            model=causal(**model).to(torch.float32),
            save_strategy="steps",
            save_steps=2,
            **named,
        ),
        Run(
            tmp_path / "told",
            {"states": "int8", "rounding": "stochastic", "small_size": 0},
            model=causal(**model).to(torch.float32),
            max_steps=4,
        ),
    ]
    runs.append(
        Run(tmp_path, {}, model=causal(**model).to(torch.float32), resume=f"{tmp_path}/named/checkpoint-2", **named)
    )
    assert same_bits(runs[0].model, runs[1].model) and same_bits(runs[0].model, runs[2].model)
    states = {row.states for row in runs[0].fold.report().rows}
    assert states == {"int8"}


NAMES = {
    "lion_8bit": (gradfold.Lion, "int8"),
    "lion_32bit": (gradfold.Lion, None),
    "adamw_torch_4bit": (gradfold.AdamW, "int4"),
    "rmsprop_bnb_32bit": (gradfold.RMSprop, None),
}


@LONG
@pytest.mark.parametrize("name", NAMES)
def test_other_names(tmp_path, name):
    kind, states = NAMES[name]
    run = Run(tmp_path, {}, model=causal().to(torch.float32), optim=name, max_steps=1)
    optimizer = run.trainer.optimizer.optimizer
    assert type(optimizer) is kind and optimizer.param_groups[0].get("states") == states
    if kind is gradfold.Lion:
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@LONG
def test_delayed_clipping_resumes(tmp_path):
    options = {"clip": "delayed", **PLAIN}
    whole = Run(tmp_path, options, save_strategy="steps", save_steps=4, **ONE)
    again = Run(tmp_path, options, resume=f"{tmp_path}/checkpoint-4", **ONE)
    assert same_bits(whole.model, again.model)


# working sets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [None, pytest.param("disk", marks=LONG)])
def test_a_working_set(tmp_path, offload):
    """It accumulates, clips and resumes; every chunk has had its turn."""
    runs = []
    for folder, resume in (("whole", None), ("again", f"{tmp_path}/whole/checkpoint-2")):
        set_up = functools.partial(gradfold.hf.working_set, chunks=3, interval=1, offload=offload, head="plain")
        runs.append(Run(tmp_path / folder, make=lambda *a, f=set_up: f(plain_trainer(*a)), resume=resume,
                        save_strategy="steps", save_steps=2))  # fmt: skip
    whole, again = runs
    assert whole.fold.working_set.chunks == 3 and same_bits(whole.model, again.model)
    before = dict(causal().named_parameters())
    assert all((p != before[name]).any() for name, p in whole.model.named_parameters())
    assert all(log["grad_norm"] > 0 for log in whole.logs)
    assert (tmp_path / "whole/working_set").exists() == (offload == "disk")


def test_a_working_set_of_one_chunk_is_the_whole(tmp_path, plain):
    settings = gradfold.hf.working_set(chunks=1, interval=2)
    assert isinstance(settings, gradfold.WorkingSet)
    assert_same(Run(tmp_path, {"working_set": settings, **PLAIN}), plain)


# what trains more than once -------------------------------------------------------------------------------------------


@LONG
def test_auto_find_batch_size_begins_again(tmp_path):
    """A batch that runs out of memory, in its second backward, has moved nothing."""

    def short_of_memory(trainer):
        plainly, calls = trainer.accelerator.backward, []

        def backward(loss, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                loss.register_hook(lambda g: None)
                plainly(loss, **kwargs)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            plainly(loss, **kwargs)

        trainer.accelerator.backward = backward

    for clip in (0.0, 0.5):
        arguments = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_grad_norm": clip}
        plainly = Run(tmp_path / "a", before=short_of_memory, **arguments)
        folded = Run(tmp_path / "b", PLAIN, before=short_of_memory, **arguments)
        assert plainly.trainer.state.train_batch_size < 4
        assert_same(folded, plainly)


@LONG
def test_best_model_and_second_training(tmp_path):
    arguments = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the first is the best
    }
    made = functools.partial(plain_trainer, eval_dataset=ROWS[:4])
    runs = [Run(tmp_path / str(fold), fold, make=made, **arguments) for fold in (None, PLAIN)]
    assert distance(runs[1].model, runs[0].model) <= 1e-12
    assert runs[1].trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    first = runs[1].fold
    for run in runs:
        run.trainer.args.learning_rate = 1e-3
        run.trainer.train()
    assert distance(runs[1].model, runs[0].model) <= 1e-12 and runs[1].fold is first


@LONG
def test_arguments_that_change_between_two_trainings(tmp_path):
    runs = [Run(tmp_path / str(fold), fold) for fold in (None, PLAIN)]
    before = runs[1].fold
    for run in runs:
        run.trainer.args.max_grad_norm = 0.1
        run.trainer.train()
    assert distance(runs[1].model, runs[0].model) <= 1e-12
    assert runs[1].fold is not before and runs[1].fold.options.clip_norm == 0.1


@LONG
def test_folded_after_it_has_trained(tmp_path):
    """The states of the first training go on, and so does a model that Accelerate has prepared."""
    runs = [Run(tmp_path / str(index), num_train_epochs=1) for index in range(2)]
    gradfold.hf.fold_trainer(runs[1].trainer, **PLAIN)
    for run in runs:
        run.trainer.train()
    assert distance(runs[1].model, runs[0].model) <= 1e-12
    before = runs[1].fold
    before.remove()
    assert type(runs[1].model.lm_head) is torch.nn.Linear and not before.active
    for run in runs:  # it is folded again
        run.trainer.train()
    assert distance(runs[1].model, runs[0].model) <= 1e-12 and runs[1].fold.active


@LONG
def test_model_init(tmp_path):
    def begin():
        return causal()

    def make(model, arguments, log):
        return plain_trainer(None, arguments, log, model_init=begin)

    runs = [Run(tmp_path / str(fold), fold, make=make) for fold in (None, PLAIN)]
    assert_same(runs[1], runs[0])
    for run in runs:
        run.trainer.train()
    assert_same(runs[1], runs[0])


def test_interrupted_and_begun_again(tmp_path):
    """Ctrl-C between a backward that has stepped weights and ``optimizer.step()`` leaves a model that trains on."""

    class Interrupt(transformers.TrainerCallback):
        on = True

        def on_pre_optimizer_step(self, *args, **kwargs):
            if self.on:
                raise KeyboardInterrupt

    run = Run.__new__(Run)
    callback = Interrupt()
    with pytest.raises(KeyboardInterrupt):
        run.__init__(tmp_path, PLAIN, before=lambda t: t.add_callback(callback), **ONE, **FREE)
    callback.on = False
    run.trainer.train()
    assert run.trainer.state.global_step == 18


# fp16, adapters, other models -----------------------------------------------------------------------------------------


def scaled(trainer):
    """What Trainer has with fp16 on a GPU; one step overflows."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
    plainly, calls = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        calls.append(1)
        return plainly(*args, **kwargs) * (float("inf") if len(calls) == 4 else 1.0)

    trainer.compute_loss = compute_loss


def test_fp16(tmp_path, monkeypatch):
    """Weights wait for the scaler, which skips the same step and keeps the same scale."""
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t.to(torch.float32))  # as the scaler needs it
    runs = []
    for fold in (None, PLAIN):
        # torch's fused AdamW steps with zeros where others are skipped, so that its scheduler moves on
        arguments = {"gradient_accumulation_steps": 2, "optim": "adamw_torch"}
        run = Run(tmp_path / str(fold), fold, before=scaled, **arguments)
        run.trainer.accelerator.state._mixed_precision = "no"
        runs.append(run)
    assert runs[1].fold.options.timing == "deferred"
    scales = [run.trainer.accelerator.scaler.get_scale() for run in runs]
    assert scales[0] == scales[1] != 2.0**10
    assert_same(runs[1], runs[0], weights=1e-7)


def test_adapters(tmp_path):
    """PEFT's, put on the model before the Trainer is made; the base model is frozen."""
    peft = pytest.importorskip("peft", reason="adapters: pip install peft")

    def adapted():
        config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False)
        torch.manual_seed(1)
        return peft.get_peft_model(causal(), config).double()

    runs = [Run(tmp_path / str(fold), fold, model=adapted()) for fold in (None, PLAIN)]
    assert_same(runs[1], runs[0])
    trained = [row for row in runs[1].fold.report().rows if row.route != "frozen"]
    assert trained and all("lora" in row.name or "lm_head" in row.name for row in trained)


@LONG
def test_seq2seq(tmp_path):
    config = transformers.T5Config(
        vocab_size=53, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.1, decoder_start_token_id=0
    )

    def make(model, arguments, log):
        arguments = transformers.Seq2SeqTrainingArguments(
            predict_with_generate=True, generation_max_length=4, **arguments
        )
        return transformers.Seq2SeqTrainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[log])

    runs = []
    for fold in (None, PLAIN):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config).double()
        start = copy.deepcopy(model)
        options = {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 2}  # evaluation draws a seed
        runs.append(Run(tmp_path / str(fold), fold, make=make, model=model, **options))
    assert_same(runs[1], runs[0])
    again = Run(tmp_path, PLAIN, make=make, model=start, resume=f"{tmp_path}/{PLAIN}/checkpoint-2", **options)
    assert same_bits(again.model, runs[1].model)


@LONG
def test_compiled(tmp_path):
    """The model is one region, whose weights step when its backward has ended."""
    arguments = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    runs = [Run(tmp_path / str(fold), fold, **arguments) for fold in (None, PLAIN)]
    assert_same(runs[1], runs[0])


def test_data_is_untouched():
    assert torch.equal(torch.stack([row["input_ids"] for row in ROWS]), IDS)
