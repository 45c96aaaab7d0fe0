"""The same Trainer run twice, plain and folded, on tiny models in fp64: where they end, and what they log."""

import contextlib
import io

import pytest
import torch

import gradfold
from tests.llama import small_llama
from tests.zoo import distance

EXACT = 1e-12
IDS = torch.randint(4, 53, (18, 6), generator=torch.Generator().manual_seed(3))
ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]
# two epochs of nine batches: with four a step, the last of each epoch sums one
USUAL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_grad_norm": 0.5,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def causal(**changes):
    """A Llama of two thousand parameters."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": 53, "hidden_size": 8, "num_attention_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(small_llama(**(settings | changes))).double()


class Run:
    """A trainer that has trained, or has raised.

    Attributes:
        model: its model.
        logs: what it logged of each step, all numbers but times.
        trainer: itself.
    """

    def __init__(self, folder, fold=None, *, make=None, resume=None, model=None, before=None, **arguments):
        transformers = pytest.importorskip("transformers")
        logs = self.logs = []

        class Log(transformers.TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                if "train_runtime" not in logs:
                    kept = {
                        key: value
                        for key, value in logs.items()
                        if not key.endswith(("_time", "runtime", "_per_second"))
                    }
                    self.kept.append(kept)

        log = Log()
        log.kept = logs
        arguments = {"output_dir": str(folder), **USUAL, **arguments}
        self.model = causal() if model is None else model
        self.trainer = (make or plain_trainer)(self.model, arguments, log)
        self.model = self.trainer.model
        if before is not None:
            before(self.trainer)
        if fold is not None:
            self.trainer = gradfold.hf.fold_trainer(self.trainer, **fold)
        with contextlib.redirect_stdout(io.StringIO()):
            self.trainer.train(resume_from_checkpoint=resume)
        self.model = self.trainer.model

    @property
    def fold(self):
        return self.trainer.fold


def plain_trainer(model, arguments, log, **others):
    """Make transformers' own Trainer."""
    from transformers import Trainer, TrainingArguments

    others = {"train_dataset": ROWS, **others}
    arguments = TrainingArguments(remove_unused_columns=False, **arguments)
    return Trainer(model, arguments, callbacks=[log], **others)


def assert_same(folded, plain, weights=EXACT, logs=None):
    """Compare where two runs ended, and all that they logged."""
    logs = logs or max(weights, 1e-12)
    moved = distance(folded.model, plain.model)
    assert moved <= weights, moved
    assert len(folded.logs) == len(plain.logs) and plain.logs
    for mine, theirs in zip(folded.logs, plain.logs, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=logs, abs=logs, nan_ok=True), key
