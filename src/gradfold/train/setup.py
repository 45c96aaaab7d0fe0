"""Put the parts of a run together from a recipe or a checkpoint; hold its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import random
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gradfold
from gradfold._io import LOCK, hold_folder
from gradfold.dist import spread
from gradfold.workset import Rotation, forget_folder

from .checkpoint import FOLDER, REFERENCES, Progress, Saved, list_checkpoints, restore_run
from .data import Data, prepare_data
from .display import Display
from .errors import CheckpointError, DataError, ModelError, RecipeError, one_line
from .hub import check_hub
from .model import (
    ModelSource,
    check_length,
    check_packing,
    check_tokens,
    find_model,
    load_model,
    load_tokenizer,
    quiet_transformers,
    words_of,
)
from .objective import NextToken, Objective
from .optimizer import groups_of, make_optimizer
from .parallel import RunRanks
from .preference import Preference, check_head, precompute
from .readers import find_file
from .recipe import Recipe
from .recipe_file import differing_fields
from .run import Run
from .schedule import Round, make_schedule, uneven_rounds
from .stream import StreamedData, prepare_stream
from .tokens import ENCODING
from .trackers import check_trackers

SLEEPING_STATES = "sleeping-states"  # in the run's folder while it trains, with working_set.offload = disk


def assemble(recipe: Recipe, out: Path, saved: Saved | None, display: Display, ranks: RunRanks | None = None) -> Run:
    """Load and check all parts; with `saved`, in the state they were saved in. `ranks`: the processes that share them.

    Raises TrainError of one kind or another for whatever does not fit. Writes nothing but, with working_set.offload =
    disk, the folder of sleeping states, which `forget_states` removes. That is why the caller holds `out`.
    """
    if saved is not None:
        check_continues(saved, recipe)
    check_out(out, saved)
    check_trackers(recipe)
    check_hub(recipe)
    for path in (*recipe.data, *recipe.text.held_out_data):
        if path != "pydoc":
            find_file(path)  # before the model is loaded
    device = find_device(recipe.device)
    source = find_model(recipe.model) if saved is None else ModelSource(str(saved.path), str(saved.path), None)
    with display.waiting("loading the tokenizer"):
        tokenizer = load_tokenizer(source)
        use_template(tokenizer, recipe, resumed=saved is not None)
    with display.waiting("reading the data"), quiet_transformers():  # it warns of each long text, which is cut anyway
        if saved is not None:
            data = prepare_data_again(saved, recipe, tokenizer)
        else:
            now = None if ranks is None else ranks.same(datetime.now())
            prepare = prepare_stream if recipe.text.streaming else prepare_data
            data = prepare(recipe, tokenizer, now)
    if ranks is not None:
        if ranks.same(data.sha256) != data.sha256:
            raise DataError(f"{', '.join(recipe.data)}: rank {ranks.rank} finds other data than rank 0")
        if data.paired and ranks.kind != "replicas":
            raise RecipeError(f"parallel = {ranks.kind!r} with preferences: only replicas train on these; give that")
    display.unread(data.unread)
    with display.waiting("loading the model"):
        model = load_model(source, recipe, device)
    check_length(model, recipe)
    check_tokens(model, data, tokenizer, recipe)
    if not data.paired:  # preferences are not packed
        check_packing(model, recipe)
    if isinstance(data, StreamedData):
        data.words = words_of(model)
    if ranks is not None:
        model = spread(model, ranks.mesh, ranks.kind)
    steps = recipe.steps or math.ceil((recipe.epochs or 1) * data.steps_per_epoch)
    progress = saved.progress if saved else Progress(data_sha256=data.sha256, encoding=ENCODING)
    progress.rendered_at = data.rendered_at
    if steps < progress.step:
        raise CheckpointError(f"steps = {steps}: the checkpoint is at step {progress.step} already; raise steps")
    try:
        groups = groups_of(model, recipe.optimizer)
        chosen = recipe.optimizer
        if saved is not None and chosen.master is not None and recipe.dtype != "bfloat16":
            chosen = dataclasses.replace(chosen, master=None)  # a run of 0.1, which let it do nothing
        optimizer = make_optimizer(chosen, groups, recipe.seed)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"optimizer: {one_line(error)}") from error
    objective = make_objective(recipe, data, model, device, saved, progress, display)
    fold = make_fold(recipe, model, optimizer, own_folder(out, ranks), device) if recipe.fold else None
    try:
        scheduler = make_schedule(recipe.schedule, optimizer, steps, lambda: rate_is_held_for(fold))
        seed_all(recipe.seed)
        if ranks is not None and ranks.shares > 1:  # dropout of other rows
            torch.manual_seed(recipe.seed + ranks.rank)
        if saved is not None:
            for remark in restore_run(saved, model, optimizer, scheduler, fold):
                display.note(remark)
        if (turn := None if fold is None else fold.working_set) is not None:
            if said := uneven_rounds(steps, (turn.chunks, turn.interval)):
                display.note(said)
    except BaseException:
        forget_states(fold, out)
        raise
    parts = (recipe, out, device, tokenizer, data, model, optimizer, scheduler, fold, steps, progress, objective)
    return Run(*parts, ranks)


def own_folder(out: Path, ranks: RunRanks | None) -> Path:
    """Where this process keeps what no other one reads, as the states of a working set that sleep on disk."""
    return out if ranks is None or ranks.main else out / f"rank-{ranks.rank}"


def use_template(tokenizer: Any, recipe: Recipe, resumed: bool = False) -> None:
    """Give the tokenizer the chat template that the recipe names. A checkpoint's tokenizer has it already.

    Raises RecipeError if there is no such file.
    """
    chosen = recipe.text.chat_template
    if chosen is None:
        return
    if "{" in chosen:
        tokenizer.chat_template = chosen
        return
    try:
        tokenizer.chat_template = Path(chosen).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if not resumed:
            raise RecipeError(
                f"text.chat_template = {chosen!r}: cannot be read ({one_line(error)}); name a jinja file, or give the "
                "template itself"
            ) from None


def prepare_data_again(saved: Saved, recipe: Recipe, tokenizer: Any) -> Data:
    """The data of a run that goes on, with the date it began with. Raises CheckpointError if it is not the same."""
    progress = saved.progress
    now = datetime.fromisoformat(progress.rendered_at) if progress.rendered_at else None
    if recipe.text.streaming:
        try:
            data = prepare_stream(recipe, tokenizer, now, progress.stream)
        except CheckpointError as error:
            raise CheckpointError(f"--resume {saved.path}: {error}") from None
        if data.sha256 == progress.data_sha256:
            return data
        raise CheckpointError(_other_tokens(saved, recipe, ""))
    said = ""
    for encoding in dict.fromkeys(
        (ENCODING, progress.encoding)
    ):  # most rows of 0.1 became the tokens that they become now
        try:
            data = prepare_data(recipe, tokenizer, now, encoding)
        except DataError as error:  # as a row that 0.1 took, and took wrongly
            if progress.encoding == ENCODING:
                raise
            said = said or f" ({error})"
            continue
        if data.sha256 == progress.data_sha256:
            progress.encoding = encoding
            return data
        if data.rendered_at and not progress.rendered_at:
            said = " (its chat template writes the date, and a checkpoint of gradfold 0.1 does not say which it was)"
    raise CheckpointError(_other_tokens(saved, recipe, said))


def _other_tokens(saved: Saved, recipe: Recipe, said: str) -> str:
    return (
        f"--resume {saved.path}: {', '.join(recipe.data)} no longer gives the tokens this run was started with{said}; "
        "restore the files, or start a new run from the checkpoint with --model"
    )


def make_objective(
    recipe: Recipe,
    data: Data,
    model: Any,
    device: torch.device,
    saved: Saved | None,
    progress: Progress,
    display: Display,
) -> Objective:
    """What the run minimizes: the next token's loss, or for data of preferences theirs.

    Raises ModelError for a model whose log-probabilities cannot be had, CheckpointError for another reference than that
    of the run's beginning.
    """
    if not data.paired:
        return NextToken(recipe.text.packing)
    try:
        check_head(model, recipe.head)
    except ModelError as error:
        raise ModelError(f"model {recipe.model}: {error}") from None
    if recipe.preference.reference == "frozen":
        with display.waiting("loading the reference model"):
            plain = dataclasses.replace(recipe, gradient_checkpointing=False)
            frozen = load_model(find_model(recipe.model), plain, device)
        frozen.eval().requires_grad_(False)
        digest = _digest(frozen)
        if progress.reference_sha256 not in ("", digest):
            raise CheckpointError(f"model {recipe.model}: is not the reference that this run began with; restore it")
        progress.reference_sha256 = digest
        return Preference(recipe.preference, recipe.head, frozen)
    if saved is not None:
        found = [saved.tensors.pop(name, None) for name in REFERENCES]
        if found[0] is None or found[1] is None:
            raise CheckpointError(f"checkpoint {saved.path}: has no log-probabilities of the reference model")
        data.references = (found[0].numpy(), found[1].numpy())
    elif any(reference is None for reference in data.references):
        with display.waiting("computing log-probabilities under the reference model"):
            precompute(model, data, recipe.head, device)
    return Preference(recipe.preference, recipe.head)


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b"")
    return digest.hexdigest()


def make_fold(recipe: Recipe, model: Any, optimizer: Any, out: Path, device: torch.device) -> Any:
    """The fold that a recipe asks for.

    Raises RecipeError for a working set that this model cannot have, or blocks that it has not.
    """
    elsewhere = {} if device.type == "cpu" else {"device": device}  # to where the rest of the model goes
    stream = recipe.stream.build(folder=out, **elsewhere)
    working_set = recipe.working_set.build(folder=out / SLEEPING_STATES, seed=recipe.seed)
    made = missing_folders(out / SLEEPING_STATES)
    try:
        return gradfold.fold(
            model,
            optimizer,
            working_set=working_set,
            head=recipe.head,
            stream=stream,
            **recipe.gradient.fold_options(),
        )
    except BaseException as error:
        remove_empty(made)
        if not isinstance(error, gradfold.FoldError):
            raise
        if stream is not None and re.match(r"Stream\(|stream=|folder=", str(error)):
            raise RecipeError(f"stream: {one_line(error)}") from None
        if working_set is None:
            raise
        raise RecipeError(_by_option(str(error))) from None


def rate_is_held_for(fold: Any) -> Round | None:
    """For which rounds the fold's working set holds a learning rate; None: it holds none."""
    turns = None if fold is None else fold._state.turns
    if not isinstance(turns, Rotation) or not turns.rates.hold:
        return None
    return len(turns.chunks), turns.config.interval


def _by_option(said: str) -> str:
    """What a working set says of an argument, said of the recipe's option."""
    found = re.match(r"(?:WorkingSet\()?(chunks|always)=(.+?)\)?: ", said)
    return f"working_set.{found[1]} = {found[2]}: {said[found.end() :]}" if found else one_line(RuntimeError(said))


def forget_states(fold: Any, out: Path) -> None:
    """Delete the files of sleeping states, which no checkpoint needs: those of this fold, or of a run that was killed.

    Only for the run that holds `out`. Files that another working set is using stay.
    """
    turns = fold._state.turns if fold is not None else None
    if isinstance(turns, Rotation):
        turns.close()
    forget_folder(out / SLEEPING_STATES)


@contextlib.contextmanager
def run_folder(out: Path, saved: Saved | None) -> Iterator[None]:
    """A context in which the run's folder is there, and nobody else's. Folders made for it go if nothing is in them.

    Raises RecipeError or CheckpointError if `out` cannot be written to, if another run is writing to it, or if results
    in it would be overwritten.
    """
    check_out(out, saved)
    made = missing_folders(out)
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = hold_folder(out)
        except OSError as error:
            raise RecipeError(
                f"out = {str(out)!r}: cannot be written to ({error.strerror or one_line(error)}); name another --out"
            ) from error
        if lock is None:
            raise CheckpointError(f"out = {str(out)!r}: another gradfold is writing to this folder; wait for it to end")
        with lock:
            check_out(out, saved)  # again: whoever held it until now may have finished, or gone on
            yield
    finally:
        remove_empty(made)


def missing_folders(path: Path) -> list[Path]:
    """The folders that making `path` would make, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders in which nothing is."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_continues(saved: Saved, recipe: Recipe) -> None:
    """Raises CheckpointError naming the fields in which `recipe` is another run than the saved one."""
    differing = differing_fields(saved.recipe, recipe)
    if differing:
        changes = ", ".join(f"{name} (was {old!r}, now {new!r})" for name, (old, new) in differing.items())
        raise CheckpointError(
            f"--resume {saved.path}: the recipe has changed: {changes}; resume with the old values, "
            "or start a new run from the checkpoint with --model"
        )


def check_out(out: Path, saved: Saved | None) -> None:
    """Raises RecipeError or CheckpointError if results in `out` would be overwritten."""
    if saved is not None and not saved.path.is_dir():
        raise CheckpointError(f"--resume {saved.path}: another gradfold has deleted it meanwhile; resume the latest")
    if saved is not None and saved.is_of(out):
        latest = list_checkpoints(out / FOLDER)[-1]
        if latest.name != saved.path.resolve().name:
            raise CheckpointError(
                f"--resume {saved.path}: the run has gone on from there, to {latest.name}; "
                "name another --out to branch off, or resume the latest"
            )
        return
    if out.exists() and not out.is_dir():
        raise RecipeError(f"out = {str(out)!r}: is a file; name a new folder")
    if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        way_out = (
            "continue it with --resume, or name another --out" if (out / FOLDER).is_dir() else "name another --out"
        )
        raise RecipeError(f"out = {str(out)!r}: the folder is not empty; {way_out}")


def find_device(name: str) -> torch.device:
    """The device a recipe names. Raises ModelError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device = {name!r}: cannot be used ({one_line(error)})") from None
    return device


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
