"""What a recipe means for memory."""

from __future__ import annotations

from gradfold.errors import FoldError
from gradfold.planner.settings import Settings
from gradfold.train.errors import RecipeError
from gradfold.train.recipe import Recipe
from gradfold.workset import WorkingSet


def settings_of(recipe: Recipe) -> Settings:
    """A recipe as `gradfold.plan` takes it. Raises RecipeError for a working set that cannot be."""
    working_set = None
    if recipe.working_set.used:
        options = recipe.working_set.options()
        if recipe.working_set.offload == "disk":
            options["folder"] = recipe.out or "runs"
        try:
            working_set = WorkingSet(**options)
        except FoldError as error:
            raise RecipeError(f"working_set: {error}") from None
    gradient = {name: value for name, value in recipe.gradient.fold_options().items() if name != "on_nonfinite"}
    return Settings(
        tokens=recipe.sequence_length,
        batch=recipe.batch_size,
        dtype=recipe.dtype,
        fold=recipe.fold,
        optimizer=recipe.optimizer.name,
        options=recipe.optimizer.settings(),
        checkpointing=recipe.gradient_checkpointing,
        head=recipe.head,
        working_set=working_set,
        **recipe.optimizer.storage(),
        **gradient,
    )
