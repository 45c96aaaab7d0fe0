"""The Recipe: everything that decides what a training run does, typed, frozen and checked when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from gradfold._options import BATCH_SIZE, MAX_BATCH, MAX_TOKENS, SEQUENCE_LENGTH, Dtype, Head, Parallel

from .columns import check_columns
from .errors import RecipeError
from .recipe_groups import (
    CheckpointRecipe,
    EvaluationRecipe,
    GradientRecipe,
    OptimizerRecipe,
    PreferenceRecipe,
    ScheduleRecipe,
    TextRecipe,
)
from .recipe_stream import StreamRecipe
from .recipe_working_set import WorkingSetRecipe
from .validate import conform_fields, refused, require_at_least, require_at_most

if TYPE_CHECKING:
    from gradfold.planner.settings import Settings


MOST_WEIGHT = 1000.0
ReportTo = Literal["wandb", "tensorboard", "trackio"]
DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu)(:[0-9]{1,3})?")
"""The devices that a recipe may name; whether there is one is seen when the run begins."""


@dataclass(frozen=True)
class Recipe:
    """One training run. Raises RecipeError naming the field, its value and the way out."""

    GROUP: ClassVar[str] = ""

    model: str = "smollm2"
    """Model: a folder, a .gguf file, a hub id, or `smollm2` (SmolLM2-135M-Instruct, from a package)."""
    data: tuple[str, ...] = ("pydoc",)
    """Training data: files (.jsonl .json .csv .parquet .txt), or `pydoc` (Python's own documentation, 465 KB)."""
    data_weights: tuple[float, ...] = ()
    """How often each row of each file is seen in an epoch (2: twice; 0.5: in every other). With streaming, the parts
    of the mixture. Empty: once."""
    columns: tuple[str, ...] = ()
    """Data with other names: OURS=THEIRS, as in prompt=question completion=answer; role= and content= for messages."""
    out: str | None = None
    """Output folder; must be new or empty. None: a new folder under runs/."""
    fold: bool = True
    """Fold the optimizer step into backward. --no-fold: the same optimizer with stored gradients."""
    head: Head = "fold"
    """Loss head. fold: linear cross-entropy without whole logits or a whole gradient. plain: the model's own."""
    steps: int | None = None
    """Number of optimizer steps. None: as many as `epochs` takes."""
    epochs: float | None = None
    """Number of passes over the data, where `steps` is not given. None: 1."""
    batch_size: int = BATCH_SIZE
    """Sequences per micro-batch; one step uses `gradient.accumulate` of them."""
    sequence_length: int = SEQUENCE_LENGTH
    """Tokens per sequence."""
    dtype: Dtype = "float32"
    """Dtype of weights and arithmetic, and of optimizer states unless optimizer.states is given."""
    device: str = "auto"
    """Device to train on: cpu, cuda, cuda:1, ... auto: cuda if available."""
    parallel: Parallel | None = None
    """On several processes that torchrun has started, how they share the model. fsdp: each holds a part of every weight
    (FSDP2). tp: tensor parallelism. replicas: each holds a copy. None: there is one process."""
    gradient_checkpointing: bool = False
    """Gradient (activation) checkpointing: recompute activations in backward instead of keeping them."""
    seed: int = 0
    """Random seed for the held-out split, data order and dropout."""
    report_to: tuple[ReportTo, ...] = ()
    """Also log metrics to wandb, tensorboard or trackio, each a package of its own. Empty: only to metrics.jsonl."""
    push_to_hub: str | None = None
    """Hub id, ORG/NAME, to which the model goes when the run has ended, with a model card. None: it stays here."""
    text: TextRecipe = field(default_factory=TextRecipe)
    preference: PreferenceRecipe = field(default_factory=PreferenceRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    gradient: GradientRecipe = field(default_factory=GradientRecipe)
    working_set: WorkingSetRecipe = field(default_factory=WorkingSetRecipe)
    stream: StreamRecipe = field(default_factory=StreamRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if not self.model:
            raise refused(self, "model", "name a folder, a .gguf file or a hub id")
        if not self.data or not all(self.data):
            raise refused(self, "data", "name at least one file, or `pydoc`")
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise RecipeError(
                f"data_weights = {list(self.data_weights)!r}: {len(self.data_weights)} weights for {len(self.data)} "
                "files in data; give one for each"
            )
        if not all(0 < weight <= MOST_WEIGHT for weight in self.data_weights):
            raise refused(self, "data_weights", f"give numbers above 0, up to {MOST_WEIGHT:,}")
        check_columns(self.columns)
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise refused(self, "push_to_hub", "give a hub id, ORG/NAME")
        if self.checkpoint.keep_best and not self.evaluation.interval_steps:
            raise RecipeError(
                "checkpoint.keep_best = True: there is no evaluation while training to tell the best; give "
                "evaluation.interval_steps"
            )
        if (self.checkpoint.keep_best or self.evaluation.patience) and not (
            self.text.held_out or self.text.held_out_data
        ):
            raise RecipeError(
                "text.held_out = 0 with checkpoint.keep_best or evaluation.patience: nothing is measured; hold rows out"
            )
        if self.text.streaming and self.steps is None:
            raise RecipeError(
                "text.streaming = True: how many steps an epoch has is not known before all is read; give steps, "
                "not epochs"
            )
        if self.text.streaming and not self.text.held_out_data and self.text.held_out and not self.evaluation.sequences:
            raise RecipeError(
                "evaluation.sequences = 0 with text.streaming = True: held-out rows are looked for before training; "
                "say how many sequences, or give text.held_out_data"
            )
        if self.out == "":
            raise refused(self, "out", "name a folder, or leave it out")
        if self.steps is not None and self.epochs is not None:
            raise RecipeError(
                f"steps = {self.steps} and epochs = {self.epochs:g}: both say how long to train; keep one"
            )
        if self.steps is not None:
            require_at_least(self, 1, "steps")
        if self.epochs is not None and not self.epochs > 0:
            raise refused(self, "epochs", "give a number above 0")
        if self.epochs is not None:
            require_at_most(self, 1_000_000, "epochs")
        require_at_least(self, 1, "batch_size", most=MAX_BATCH)
        require_at_least(self, 2, "sequence_length", most=MAX_TOKENS)
        if not DEVICE.fullmatch(self.device):
            raise refused(self, "device", "cannot be used; give auto, cpu, cuda or one of several, as in cuda:1")
        if not self.fold and self.gradient.clip != "exact":
            raise RecipeError(
                f"gradient.clip = {self.gradient.clip!r} with fold = False: stored gradients are there to be measured, "
                "so that clipping is exact; leave gradient.clip out, or fold"
            )
        if not self.fold and self.working_set.used:
            raise RecipeError(
                "working_set with fold = False: only a folded model has one; leave working_set out, or fold"
            )
        if self.stream.used and not self.fold:
            raise RecipeError(
                "stream.offload with fold = False: only a folded model streams; leave stream.offload out, or fold"
            )
        if self.stream.used and self.parallel is not None:
            raise RecipeError(
                f"stream.offload with parallel = {self.parallel!r}: one process streams; leave one of them out"
            )
        if not self.fold and self.head != "fold":
            raise refused(
                self, "head", "does nothing with fold = False, where every head is plain; leave one of them out"
            )
        if not 0 <= self.seed < 2**32:
            raise refused(self, "seed", "give a whole number from 0 to 2**32 - 1")

    def plan_settings(self) -> Settings:
        """The recipe as `gradfold.plan` takes it: on preferences, if the first row of its data is one.

        Raises:
            RecipeError: a working set that cannot be.
        """
        from gradfold.planner.settings import Settings

        from .readers import holds_preferences

        paired = not self.text.streaming and holds_preferences(self.data[0], self.columns)
        return Settings(
            tokens=self.sequence_length,
            batch=self.batch_size,
            dtype=self.dtype,
            fold=self.fold,
            optimizer=self.optimizer.name,
            options=self.optimizer.settings(),
            checkpointing=self.gradient_checkpointing,
            head=self.head,
            working_set=self.working_set.build(folder=self.out or "runs"),
            stream=self.stream.build(folder=self.out or "runs"),
            packing=self.text.packing,
            parallel=self.parallel,
            preference=self.preference.reference if paired else None,
            **self.optimizer.storage_options(),
            **self.gradient.gradient_options(),
        )


DEFAULTS = Recipe(gradient=GradientRecipe(clip_norm=1.0))
"""What `gradfold train` and `gradfold plan` begin with, and a recipe file of theirs: clipped, as in other trainers."""

DEMO = Recipe(
    model="smollm2",
    data=("pydoc",),
    steps=20,
    batch_size=1,
    sequence_length=256,
    gradient_checkpointing=True,
    text=TextRecipe(held_out=0.1),
    optimizer=OptimizerRecipe(lr=1e-4, weight_decay=0.01),
    schedule=ScheduleRecipe(warmup=0.1, final=0.1),
    evaluation=EvaluationRecipe(interval_steps=10, sequences=6, sample_tokens=40),
    checkpoint=CheckpointRecipe(keep=1),
)
"""What `gradfold train` does when neither a model, nor data, nor a recipe file is named; minutes on two CPU cores."""
