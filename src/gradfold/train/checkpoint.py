"""Checkpoints: the model as `save_pretrained` writes it and all that continuing bit-identically needs, in one folder.

    checkpoints/step-000500/
        config.json, model.safetensors, tokenizer.json, ...   loads in plain transformers
        optimizer.safetensors      states by parameter name, random-number states
        trainer.json               the rest: param groups, scheduler, fold, progress
        recipe.yaml, manifest.json every file's size and SHA-256

A folder of that name is complete: it is written beside and renamed (`_io.write_folder`). It holds what its manifest
lists, and nothing else: another file, which transformers might read in place of ours, is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gradfold import _io
from gradfold.errors import FoldError

from .errors import CheckpointError, RecipeError, one_line
from .model import quiet_transformers
from .recipe import Recipe
from .recipe_file import dump_recipe, load_recipe
from .state import pack, pack_optimizer, pack_random, restore_random, unpack, unpack_optimizer

if TYPE_CHECKING:
    from .parallel import RunRanks

FORMAT, VERSION = "gradfold-checkpoint", 1
FOLDER = "checkpoints"
STATES, TRAINER, RECIPE = "optimizer.safetensors", "trainer.json", "recipe.yaml"
REFERENCES = ("preference/reference", "preference/reference_held_out")
NAME = r"step-\d{6,}"


@dataclass
class Progress:
    """How far a run is.

    `before`: held-out loss and sample from before training. `metrics_lines`: of metrics.jsonl. `rendered_at`: the time
    that the chat template was told, empty if it does not ask. `encoding`: which way rows became tokens
    (`tokens.ENCODING`); checkpoints of 0.1 do not say. `stream`: the place in data that is streamed.
    `reference_sha256`: of a frozen reference model. `best`: step and held-out loss of the lowest so far; `worse`:
    evaluations since.
    """

    step: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_sha256: str = ""
    rendered_at: str = ""
    encoding: int = 1
    metrics_lines: int = 0
    peak_rss_bytes: int = 0
    peak_cuda_bytes: int = 0
    before: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    worse: int = 0
    reference_sha256: str = ""


@dataclass(frozen=True)
class Saved:
    """A checkpoint read from disk and found whole; `restore_run` puts it into a model's optimizer."""

    path: Path
    recipe: Recipe
    progress: Progress
    trainer: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that saved it; None for a checkpoint that was copied out of its run."""
        path = self.path.resolve()
        in_place = path.parent.name == FOLDER and re.fullmatch(NAME, path.name)
        return path.parent.parent if in_place else None

    def is_of(self, out: Path) -> bool:
        """Whether the run in `out` saved it."""
        return self.run_folder is not None and out.resolve() == self.run_folder

    def out(self) -> str:
        """Where the run goes on if nothing else is said. Raises CheckpointError for one that was copied out."""
        if self.run_folder is None:
            raise CheckpointError(f"--resume {self.path}: is not in a run's folder; name one to go on in with --out")
        near = os.path.relpath(self.run_folder)
        return str(self.run_folder) if near.startswith(os.pardir) else near


def save_checkpoint(
    folder: Path,
    model: Any,
    tokenizer: Any,
    optimizer: Any,
    scheduler: Any,
    recipe: Recipe,
    progress: Progress,
    fold: Any = None,
    references: tuple[Any, Any] = (None, None),
    ranks: RunRanks | None = None,
) -> Path:
    """Write `folder`/step-N and return it. Older ones beyond recipe.checkpoint.keep go once it is complete.

    `fold`: None where the model is not folded. `references`: log-probabilities under a reference model. `ranks`: the
    processes that share the model, all of which call this; the first writes what one process would. Raises
    CheckpointError if it cannot be written; nothing has changed then.
    """
    target = folder / f"step-{progress.step:06d}"
    tensors, optimizer_tree = pack_optimizer(optimizer, model)
    random_tensors, random_tree = pack_random(model.device)
    scheduler_tree = pack(scheduler.state_dict(), "scheduler", tensors)
    tensors |= random_tensors
    for name, values in zip(REFERENCES, references, strict=True):
        if values is not None:
            tensors[name] = torch.from_numpy(values).clone()
    trainer = {
        "progress": asdict(progress),
        "optimizer": optimizer_tree,
        "scheduler": scheduler_tree,
        "fold": pack(fold.state_dict(), "fold", tensors) if fold else None,
        "random": random_tree,
    }

    weights = None if ranks is None else gathered_weights(model)
    if ranks is not None:
        with ranks.together("saving"):
            if ranks.main:
                _write(folder, target, model, tokenizer, weights, tensors, trainer, recipe, progress)
        return target
    _write(folder, target, model, tokenizer, None, tensors, trainer, recipe, progress)
    return target


def gathered_weights(model: Any) -> dict[str, Any]:
    """The whole model's state_dict in host memory, on the first rank; all ranks call this."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once  # under their first name already
    return {name: tensor for name, tensor in found.items() if name not in tied}


def _write(
    folder: Path,
    target: Path,
    model: Any,
    tokenizer: Any,
    weights: dict[str, Any] | None,
    tensors: dict[str, torch.Tensor],
    trainer: dict[str, Any],
    recipe: Recipe,
    progress: Progress,
) -> None:
    """Write the files, and remove older checkpoints. `weights`: the model's state_dict, if it is spread over ranks."""

    def fill(place: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(place, **({} if weights is None else {"state_dict": weights}))
            tokenizer.save_pretrained(place)
        save_file(tensors, place / STATES)
        (place / TRAINER).write_text(json.dumps(trainer), encoding="utf-8")
        (place / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")

    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    needed_bytes = sum(sizes.values()) + sum(t.numel() * t.element_size() for t in tensors.values()) + 2**20
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < needed_bytes:
            raise _full(folder, target, needed_bytes)
        _io.write_folder(target, fill, {"format": FORMAT, "version": VERSION, "step": progress.step})
    except Exception as error:
        if _io.is_disk_full(error):  # safetensors and tokenizers raise kinds of their own
            raise _full(folder, target, needed_bytes) from error
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise CheckpointError(
            f"checkpoint {target}: cannot be written ({one_line(error)}){_last_intact(folder)}"
        ) from error
    best = progress.best.get("step") if recipe.checkpoint.keep_best else None
    older = [
        path
        for path in list_checkpoints(folder)
        if _step_of(path) < progress.step and _step_of(path) != best and _is_ours(path)
    ]
    for old in older[: -(recipe.checkpoint.keep - 1) or None]:
        with contextlib.suppress(OSError):  # the new one is complete; the next save tries again
            _io.remove_folder(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of one run, oldest step first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch(NAME, path.name)]
    return sorted(found, key=_step_of)


def find_checkpoint(named: Path) -> Path:
    """The checkpoint that a path names: itself, or the latest of a run's folder. Raises CheckpointError."""
    if not named.is_dir():
        raise CheckpointError(
            f"--resume {named}: no such folder (a run that is stopped before its first step leaves none); start it "
            "anew, without --resume"
        )
    if (named / _io.MANIFEST).exists():
        return named
    found = list_checkpoints(named / FOLDER)
    if found:
        return found[-1]
    if not (named / FOLDER).is_dir() and not (named / RECIPE).is_file():
        return named
    raise CheckpointError(
        f"--resume {named}: the run there was stopped before its first checkpoint, so there is nothing to go on from; "
        "start it anew, without --resume, with another --out or after deleting that folder"
    )


def read_checkpoint(path: Path) -> Saved:
    """Read a checkpoint, every byte checked against its manifest. Raises CheckpointError; changes nothing."""
    manifest = _read_manifest(path)
    try:
        for name, facts in manifest["files"].items():
            _check_file(path, name, facts["bytes"], facts["sha256"])
        if strange := _strange_files(path, manifest):
            raise _damaged(path, f"{strange[0]} is not in its manifest", "move that file out of the folder")
        trainer = json.loads((path / TRAINER).read_text(encoding="utf-8"))
        return Saved(
            path=path,
            recipe=load_recipe(path / RECIPE),
            progress=Progress(**trainer["progress"]),
            trainer=trainer,
            tensors=load_file(path / STATES),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RecipeError) as error:
        raise _damaged(path, one_line(error)) from error


def _strange_files(path: Path, manifest: dict[str, Any]) -> list[str]:
    """Files in a checkpoint that its manifest does not list."""
    return [name for name in _io.files_below(path) if name != _io.MANIFEST and name not in manifest["files"]]


def _is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint that a run has written, and that nobody has put anything into since."""
    try:
        manifest = _read_manifest(path)
        return not path.is_symlink() and manifest.get("step") == _step_of(path) and not _strange_files(path, manifest)
    except (CheckpointError, OSError):
        return False


def _check_file(path: Path, name: str, nbytes: int, sha256: str) -> None:
    file = path / name
    if Path(name).is_absolute() or os.pardir in Path(name).parts:
        raise _damaged(path, f"its manifest lists {name}, which is not inside of it")
    if not file.is_file():
        raise _damaged(path, f"{name} is missing")
    if file.stat().st_size != nbytes:
        raise _damaged(path, f"{name} has {file.stat().st_size} bytes instead of {nbytes}")
    if _io.sha256(file) != sha256:
        raise _damaged(path, f"{name} has changed since it was written")


def restore_run(saved: Saved, model: Any, optimizer: Any, scheduler: Any, fold: Any = None) -> list[str]:
    """Put the saved states into the optimizer, the scheduler and the fold, and then into the random-number generators.

    Lets go of the saved tensors. Returns what is to be said of it, as of states that an earlier gradfold wrote. Raises
    CheckpointError if they are not of this model and optimizer.
    """
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.load_state_dict(unpack_optimizer(saved.tensors, saved.trainer["optimizer"], optimizer, model))
        scheduler.load_state_dict(unpack(saved.trainer["scheduler"], saved.tensors))
        # Checkpoints from before gradients could be clipped have none; a step then took nothing from the one before.
        if fold and saved.trainer.get("fold"):
            fold.load_state_dict(unpack(saved.trainer["fold"], saved.tensors))
        restore_random(saved.tensors, saved.trainer["random"], model.device)
        saved.tensors.clear()
        # What the schedule says, also if the run has been made longer since; the same bits if it has not.
        for group, lr, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = lr * factor(scheduler.last_epoch)
        return [f"{saved.path}: {warning.message}" for warning in said]
    except FoldError as error:  # of the place the states go to, as when its disk is full
        raise CheckpointError(f"checkpoint {saved.path}: cannot be continued from: {error}") from error
    except (CheckpointError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(saved.path, f"its states do not fit the model: {one_line(error)}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _io.MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"--resume {path}: is not a checkpoint of gradfold (no {_io.MANIFEST})") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{_io.MANIFEST} cannot be read: {one_line(error)}") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        raise CheckpointError(f"--resume {path}: is not a checkpoint of gradfold (another kind of {_io.MANIFEST})")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"--resume {path}: has format version {manifest.get('version')}, this gradfold reads {VERSION}; "
            "resume it with the gradfold that wrote it"
        )
    return manifest


def _damaged(path: Path, what: str, instead: str | None = None) -> CheckpointError:
    """The error of a checkpoint that cannot be continued from. `instead`: a way out beside an earlier checkpoint."""
    earlier = [other for other in list_checkpoints(path.parent) if _step_of(other) < _step_of(path)]
    ways_out = [instead] if instead else []
    ways_out += [f"delete it to resume from {earlier[-1].name}"] if earlier else []
    way_out = ", or ".join(ways_out) or "there is no earlier one to resume from"
    return CheckpointError(f"checkpoint {path} is damaged: {what}; {way_out}")


def _full(folder: Path, target: Path, needed_bytes: int) -> CheckpointError:
    free_bytes = shutil.disk_usage(folder).free
    return CheckpointError(
        f"checkpoint {target}: the disk is full ({needed_bytes / 1e9:.2f} GB needed, {free_bytes / 1e9:.2f} GB free)"
        f"{_last_intact(folder)}; free some space, then --resume"
    )


def _last_intact(folder: Path) -> str:
    found = list_checkpoints(folder)
    return f"; the last one, {found[-1]}, is intact" if found else "; there is none before it"


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1
