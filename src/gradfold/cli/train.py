"""`gradfold train`: fine-tune every weight of a causal language model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gradfold.train.errors import CheckpointError, RecipeError
from gradfold.train.readers import SUFFIXES
from gradfold.train.recipe import DEFAULTS, Recipe
from gradfold.train.recipe_file import load_fields, unflatten

from .chosen import base_recipe, choose_recipe, overlay, take_shorter
from .flags import given_fields, parsed_again, print_help, quiet_environment, refuse_unwritable

if TYPE_CHECKING:
    from gradfold.train.checkpoint import Saved

RUNS = "runs"
TRAIN_COMMAND = "gradfold train"
FILE_ENDINGS = (*SUFFIXES, ".gguf")


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """Fine-tune every weight of a causal language model, with no gradient ever stored.

    Without --model, --data and --config: SmolLM2-135M-Instruct on Python's own documentation, by the recipe of
    examples/smollm2-pydoc.yaml, a few minutes on two CPU cores.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    config: str | None = None
    """Recipe file (YAML) to start from; other flags override it. See examples/. None: no file."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Recipe file of axolotl or LLaMA-Factory (YAML) to start from; other flags override it. None: no file."""
    resume: str | None = None
    """Continue a run: `latest` (or nothing) for the last checkpoint in --out, or a run's or a checkpoint's folder.
    None: a new run."""
    tokens: int | None = None
    """Tokens per sequence, the same as --sequence-length. None: not given."""
    batch: int | None = None
    """Sequences per micro-batch, the same as --batch-size. None: not given."""


EXTRA = {"config": str | None, "from": str | None, "resume": str | None, "tokens": int | None, "batch": int | None}
"""Flags beside the recipe's."""


def run(arguments: Sequence[str]) -> int:
    """Train; returns the exit code. Raises TrainError."""
    words = _with_latest(arguments)
    if "-h" in words or "--help" in words:
        print_help(TrainCommand, TrainCommand(DEFAULTS), TRAIN_COMMAND)
        return 0
    given = given_fields(words, EXTRA)
    extra = {name: given.pop(name) for name in EXTRA if name in given}
    take_shorter(given, extra)
    config, resume = extra.get("config"), extra.get("resume")
    out = saved = None
    if resume and extra.get("from"):
        raise RecipeError("--from with --resume: a run goes on with its own recipe; leave one of them out")
    if resume:
        in_file = load_fields(config) if config else {}
        saved = _find_saved(resume, {**in_file, **given})
        out = Path(given.get("out") or saved.out())
        recipe = overlay(overlay(saved.recipe, in_file), given)
    else:
        recipe = choose_recipe(config, given, foreign=extra.get("from")).recipe
    if parsed_again(TrainCommand, TrainCommand(recipe), words, TRAIN_COMMAND).recipe != recipe:
        raise RecipeError("the options are ambiguous; give each as --name value")
    out = out or Path(recipe.out or _new_folder(recipe))
    recipe = dataclasses.replace(recipe, out=str(out))
    _check_out(out)

    quiet_environment()
    from gradfold.train.loop import train

    train(recipe, out, saved)
    return 0


def _check_out(out: Path) -> None:
    """Refuse at once what would else be found after the model is loaded. Raises RecipeError."""
    if out.is_symlink() and not out.exists():
        raise RecipeError(f"out = {str(out)!r}: is a link that leads nowhere; name a new folder")
    if out.exists() and not out.is_dir():
        raise RecipeError(f"out = {str(out)!r}: is a file; name a new folder")
    refuse_unwritable(out.absolute(), f"out = {str(out)!r}")


def _find_saved(resume: str, chosen: dict[str, Any]) -> Saved:
    """The checkpoint that --resume names."""
    from gradfold.train.checkpoint import find_checkpoint, read_checkpoint

    if resume != "latest":
        return read_checkpoint(find_checkpoint(Path(resume)))
    named = chosen.get("out") or _last_folder(unflatten(chosen, base_recipe(None, chosen)))
    return read_checkpoint(find_checkpoint(Path(named)))


def _name(recipe: Recipe) -> str:
    """MODEL-DATA, of a path its last part without the file's ending."""
    parts = [Path(part).name[-80:] for part in (recipe.model, recipe.data[0])]
    return "-".join(part.removesuffix(next((end for end in FILE_ENDINGS if part.endswith(end)), "")) for part in parts)


def _new_folder(recipe: Recipe) -> Path:
    """runs/MODEL-DATA, with a number behind if there is one already."""
    first = Path(RUNS) / _name(recipe)
    number = 1
    while (folder := first if number == 1 else Path(f"{first}-{number}")).exists() and any(folder.iterdir()):
        number += 1
    return folder


def _last_folder(recipe: Recipe) -> Path:
    """The folder of that recipe's newest run that has checkpoints."""
    from gradfold.train.checkpoint import FOLDER

    name = _name(recipe)
    folders = Path(RUNS).iterdir() if Path(RUNS).is_dir() else ()
    numbered = re.compile(re.escape(name) + r"(-\d+)?")
    found = [path for path in folders if numbered.fullmatch(path.name) and (path / FOLDER).is_dir()]
    if not found:
        raise CheckpointError(
            f"--resume: there is no run in {Path(RUNS) / name} yet; name one with --resume FOLDER or --out FOLDER"
        )
    return max(found, key=lambda path: (path / FOLDER).stat().st_mtime)


def _with_latest(arguments: Sequence[str]) -> list[str]:
    """`--resume` alone means `--resume latest`."""
    words: list[str] = []
    for word in [*arguments, "--"]:
        if words and words[-1] == "--resume" and word.startswith("--"):
            words.append("latest")
        words.append(word)
    return words[:-1]
