"""Recipe fields as command-line flags: which were given, and whether they exist and fit."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from gradfold.train.errors import RecipeError
from gradfold.train.recipe_file import field_types
from gradfold.train.validate import did_you_mean, from_words, shown

ELSEWHERE = {
    "bf16": "--dtype bfloat16",
    "bfloat16": "--dtype bfloat16",
    "pure_bf16": "--dtype bfloat16",
    "fp16": "--dtype bfloat16 (16-bit training without a loss scaler)",
    "half": "--dtype bfloat16",
    "fp32": "--dtype float32",
    "torch_dtype": "--dtype float32, bfloat16 or float64",
    "model_name_or_path": "--model",
    "base_model": "--model",
    "dataset": "--data, with files",
    "dataset_name": "--data, with files",
    "train_file": "--data",
    "datasets": "--data",
    "eval_dataset": "--text.held-out-data",
    "validation_file": "--text.held-out-data",
    "val_size": "--text.held-out",
    "val_set_size": "--text.held-out",
    "output_dir": "--out",
    "cutoff_len": "--sequence-length",
    "sequence_len": "--sequence-length",
    "max_seq_length": "--sequence-length",
    "max_seq_len": "--sequence-length",
    "micro_batch_size": "--batch-size",
    "num_epochs": "--epochs",
    "optim": "--optimizer.name, and --optimizer.states int8 for the 8-bit ones",
    "lr_scheduler_type": "--schedule.name",
    "lr_scheduler": "--schedule.name",
    "sample_packing": "--text.packing",
    "train_on_inputs": "--text.loss-on all",
    "completion_only_loss": "--text.loss-on completions",
    "assistant_only_loss": "--text.loss-on completions",
    "chat_template_path": "--text.chat-template",
    "eval_steps": "--evaluation.interval-steps",
    "eval_strategy": "--evaluation.interval-steps",
    "save_steps": "--checkpoint.interval-steps",
    "save_strategy": "--checkpoint.interval-steps",
    "save_total_limit": "--checkpoint.keep",
    "load_best_model_at_end": "--checkpoint.keep-best",
    "early_stopping_patience": "--evaluation.patience",
    "hub_model_id": "--push-to-hub ORG/NAME",
    "logging_steps": "metrics.jsonl, which has every step",
    "dpo_beta": "--preference.beta",
    "pref_beta": "--preference.beta",
    "load_in_8bit": "--optimizer.states int8, as weights are trained in their own dtype",
    "load_in_4bit": "--optimizer.states int4, as weights are trained in their own dtype",
    "use_peft": "--working-set.chunks, as every weight is trained, if memory is short",
    "lora": "--working-set.chunks, as every weight is trained, if memory is short",
    "qlora": "--working-set.chunks, as every weight is trained, if memory is short",
    "deepspeed": "left out: one device is used",
    "fsdp": "left out: one device is used",
    "resume_from_checkpoint": "--resume",
    "activation_checkpointing": "--gradient-checkpointing",
}
"""Words of other trainers that no name of ours is near to -> what says the same here."""
MOST_FLAGS = 3  # in one message


def flag_of(dotted: str) -> str:
    """The flag of a recipe's field: `optimizer.weight_decay` -> `--optimizer.weight-decay`."""
    return f"--{dotted.replace('_', '-')}"


def with_flags(message: str) -> str:
    """A message with the flags of the recipe's fields that it names, where it does not name them itself."""
    flags = []
    for dotted in field_types():
        flag = flag_of(dotted)
        if flag == f"--{dotted}" and "." not in dotted:  # nobody misses the flag of `steps`
            continue
        named = re.search(rf"(?<![\w.-]){re.escape(dotted)}(?![\w-]|\.\w)", message)
        if named and not re.search(rf"{flag}\b", message):
            flags.append(flag)
    if not flags or len(flags) > MOST_FLAGS:
        return message
    return f"{message} ({'flag' if len(flags) == 1 else 'flags'} {', '.join(flags)})"


def given_fields(words: Sequence[str], extra: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> typed value of every flag in `words`; `extra`: names and types of flags beside the recipe's.

    The option parser accepts the same words, but says less clearly what is wrong with them. Raises RecipeError.
    """
    types = {**field_types(), **extra}
    found: dict[str, Any] = {}
    for flag, values in _split_flags(words):
        dotted = flag.removeprefix("--").replace("-", "_")
        group, _, leaf = dotted.rpartition(".")
        positive = f"{group}.{leaf.removeprefix('no_')}".lstrip(".")
        if leaf.startswith("no_") and types.get(positive) is bool and dotted not in types:
            dotted, values = positive, [*values, "false"]
        elif types.get(dotted) is bool:
            values = [*values, "true"]
        if dotted not in types and (ours := ELSEWHERE.get(dotted.lower())) is not None:
            raise RecipeError(f"unknown option {shown(flag)[1:-1]}; here it is {ours}")
        if dotted not in types:
            hint = did_you_mean(flag.removeprefix("--"), [name.replace("_", "-") for name in types])
            hint = hint.replace("'", "'--", 1)
            raise RecipeError(f"unknown option {shown(flag)[1:-1]}{hint}; see --help")
        if dotted in found:
            raise RecipeError(f"{flag} is given twice; keep one")
        found[dotted] = from_words(types[dotted], values, dotted)
        if dotted in extra and found[dotted] == "":
            raise RecipeError(f"{flag} got nothing: name a file or a value, or leave it out")
    return found


def print_help(command: Any, default: Any, prog: str) -> None:
    """Print what the option parser says of a command's flags."""
    width = shutil.get_terminal_size().columns  # tyro wraps all but the description
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    about = "\n\n".join(textwrap.fill(" ".join(paragraph.split()), max(width, 20)) for paragraph in paragraphs)
    print(f"{about}\n")
    with contextlib.suppress(SystemExit):
        tyro.cli(command, default=default, args=["--help"], prog=prog, description="")


def parsed_again(command: Any, default: Any, words: Sequence[str], prog: str) -> Any:
    """What the option parser behind --help makes of the words, so that the two can never disagree in silence.

    Raises RecipeError where it cannot read them.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, default=default, args=list(words), prog=prog)
    except SystemExit:
        lines = [line.strip(" │╭╮╰╯─-") for line in said.getvalue().splitlines()]
        message = " ".join(line for line in lines if line)
        raise RecipeError(f"{message or 'the options cannot be read'}") from None


def _split_flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(flag, its words); `--lr=1` is one word for two."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags.append((flag, [value] if equals else []))
        elif not flags:
            word = shown(word)[1:-1]
            raise RecipeError(f"{word}: options begin with --, as in --data {word}")
        else:
            flags[-1][1].append(word)
    return flags


def refuse_unwritable(folder: Path, what: str) -> None:
    """Raise RecipeError, before an hour of work, if no file can be made in a folder or the nearest one above it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # it has no name that could be left behind
            pass
    except OSError as error:
        why = error.strerror or "no file can be made"
        raise RecipeError(f"{what}: nothing can be written in {folder} ({why}); name another folder") from None


def quiet_environment() -> None:
    """Settings that libraries read when they load."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
