"""`push_to_hub`: the trained model on the hub, with a card that holds the run's recipe and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import RECIPE, STATES, TRAINER
from .errors import RecipeError, TrainError, one_line
from .recipe import Recipe
from .recipe_file import dump_recipe

CARD = "README.md"
NOT_THE_MODEL = [STATES, TRAINER, "manifest.json"]
"""Files of a checkpoint that only a resumed run needs."""


def check_hub(recipe: Recipe) -> None:
    """Raises RecipeError if the model could not be pushed: before an hour of training, not after it."""
    if recipe.push_to_hub is None:
        return
    from huggingface_hub import constants, get_token

    name = f"push_to_hub = {recipe.push_to_hub!r}"
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(f"{name}: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or leave it out")
    if not get_token():
        raise RecipeError(f"{name}: there is no token; run `hf auth login`, or set HF_TOKEN, or leave push_to_hub out")


def model_card(recipe: Recipe, summary: dict[str, Any]) -> str:
    """The card: metadata, what was trained on what, its figures and its recipe."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["gradfold"], **_base(recipe.model)
    )
    rows = [
        ("steps", f"{summary['steps']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        ("optimizer", f"{summary['optimizer']}, lr {recipe.optimizer.lr:g}"),
        ("weights", f"{summary['parameters']:,}, {recipe.dtype}"),
        *_change("held-out loss", summary["held_out_loss"]),
        *_change("held-out perplexity", summary["held_out_perplexity"]),
        ("peak memory of a step", _bytes(summary)),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    name = Path(recipe.model).name
    return (
        f"---\n{data}\n---\n\n# {name}, fine-tuned\n\nEvery weight of `{name}` was trained with "
        f"[gradfold](https://pypi.org/project/gradfold/) on {', '.join(Path(path).name for path in recipe.data)}.\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Recipe\n\n```yaml\n{dump_recipe(recipe)}```\n"
    )


def push(recipe: Recipe, checkpoint: Path, card: str) -> str:
    """Upload a checkpoint without what only a resume needs. Returns its address; raises TrainError."""
    from huggingface_hub import HfApi

    assert recipe.push_to_hub is not None
    api = HfApi()
    try:
        address = api.create_repo(recipe.push_to_hub, exist_ok=True)
        api.upload_folder(
            repo_id=recipe.push_to_hub,
            folder_path=str(checkpoint),
            ignore_patterns=[*NOT_THE_MODEL, RECIPE],
            commit_message="Add the trained model",
        )
        api.upload_file(
            repo_id=recipe.push_to_hub,
            path_or_fileobj=card.encode(),
            path_in_repo=CARD,
            commit_message="Add the model card",
        )
    except Exception as error:  # of the hub, the network, the disk
        raise TrainError(
            f"push_to_hub = {recipe.push_to_hub!r}: the run has ended and its model is in {checkpoint}, but it could "
            f"not be pushed ({one_line(error)}); --resume the run to try again"
        ) from error
    return str(address)


def _base(model: str) -> dict[str, Any]:
    """The model's hub id, where it is one."""
    return {"base_model": model} if "/" in model and not Path(model).exists() else {}


def _change(name: str, pair: dict[str, float | None]) -> list[tuple[str, str]]:
    if pair["after"] is None:
        return []
    before = "" if pair["before"] is None else f"{pair['before']:.4f} -> "
    return [(name, f"{before}{pair['after']:.4f}")]


def _bytes(summary: dict[str, Any]) -> str:
    from gradfold.planner.bytes import format_bytes

    memory = summary["step_memory"].get("folded")
    return format_bytes(memory["peak_bytes"]) if memory else ""
