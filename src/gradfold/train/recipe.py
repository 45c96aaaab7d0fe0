"""The Recipe: everything that decides what a training run does, typed, frozen and checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gradfold._options import BATCH_SIZE, INTERVAL, SEQUENCE_LENGTH
from gradfold.errors import FoldError
from gradfold.train.conform import conform_fields
from gradfold.train.errors import RecipeError

if TYPE_CHECKING:
    from gradfold.planner.settings import Settings
    from gradfold.workset import WorkingSet

OPTIMIZER_SETTINGS: dict[str, tuple[str, ...]] = {
    "AdamW": ("betas", "eps", "amsgrad", "maximize"),
    "Adam": ("betas", "eps", "amsgrad", "decoupled_weight_decay", "maximize"),
    "SGD": ("momentum", "dampening", "nesterov", "maximize"),
    "Lion": ("betas", "maximize"),
    "RMSprop": ("alpha", "eps", "momentum", "centered", "maximize"),
    "Adagrad": ("lr_decay", "initial_accumulator_value", "eps", "maximize"),
    "NAdam": ("betas", "eps", "momentum_decay", "decoupled_weight_decay", "maximize"),
    "RAdam": ("betas", "eps", "decoupled_weight_decay", "maximize"),
}
"""Which settings each optimizer has beside `lr` and `weight_decay`, which all have."""
STORAGE_SETTINGS = ("states", "rounding", "master", "small_size")
"""How weights and states are stored: settings of every optimizer here, of none in torch."""


def _bad(group: Any, name: str, way_out: str) -> RecipeError:
    dotted = f"{group.GROUP}.{name}" if group.GROUP else name
    return RecipeError(f"{dotted} = {getattr(group, name)!r}: {way_out}")


def _at_least(group: Any, low: int, *names: str) -> None:
    for name in names:
        if getattr(group, name) < low:
            raise _bad(group, name, f"give a whole number, {low} or more")


@dataclass(frozen=True)
class TextRecipe:
    """How rows become sequences of tokens."""

    GROUP: ClassVar[str] = "text"

    packing: bool = True
    """Put several rows into one sequence. They never attend to each other: position ids restart at each row."""
    loss_on: Literal["completions", "all"] = "completions"
    """Which tokens are learned: completions and assistant turns, or prompts too. `text` rows are learned whole."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with a prompt/completion or messages row longer than sequence_length. `text` rows are cut."""
    held_out: float = 0.05
    """Fraction of the rows kept away from training, to measure the loss on. 0: none."""
    held_out_data: tuple[str, ...] = ()
    """Files to measure the loss on, instead of a fraction of the data."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if not 0 <= self.held_out < 1:
            raise _bad(self, "held_out", "give a fraction from 0 (nothing held out) to below 1")


@dataclass(frozen=True)
class OptimizerRecipe:
    """The optimizer. A setting left at None takes the optimizer's own default, which is torch's."""

    GROUP: ClassVar[str] = "optimizer"

    name: Literal["AdamW", "Adam", "SGD", "Lion", "RMSprop", "Adagrad", "NAdam", "RAdam"] = "AdamW"
    """Which of gradfold's optimizers."""
    lr: float = 2e-5
    """Learning rate, after warm-up."""
    weight_decay: float = 0.0
    """Decay of every weight but norms and biases, as each optimizer defines it."""
    betas: tuple[float, float] | None = None
    """Decay rates of the moments."""
    eps: float | None = None
    """Term in the denominator."""
    momentum: float | None = None
    """SGD and RMSprop: momentum factor."""
    dampening: float | None = None
    """SGD: dampening of the momentum."""
    nesterov: bool | None = None
    """SGD: Nesterov momentum."""
    alpha: float | None = None
    """RMSprop: smoothing constant."""
    centered: bool | None = None
    """RMSprop: divide by the variance."""
    lr_decay: float | None = None
    """Adagrad: decay of the learning rate."""
    initial_accumulator_value: float | None = None
    """Adagrad: where the sums of squares start."""
    momentum_decay: float | None = None
    """NAdam: decay of the momentum."""
    decoupled_weight_decay: bool | None = None
    """Adam, NAdam, RAdam: decay as AdamW does it."""
    amsgrad: bool | None = None
    """Adam and AdamW: keep the largest second moment."""
    maximize: bool | None = None
    """Climb instead of descend."""
    states: Literal["fp32", "bf16", "int8", "int4"] | None = None
    """How the states are stored; None: in the weights' dtype, as torch does."""
    rounding: Literal["nearest", "stochastic"] | None = None
    """How 16-bit weights and states are rounded; None: states stochastically where that helps, weights to nearest."""
    master: Literal["split8", "split16"] | None = None
    """What bf16 weights keep of what bf16 drops: 8 or 16 bits each."""
    small_size: int | None = None
    """Weights of fewer elements (default 4,096), and norms and biases, keep fp32 states."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if not self.lr > 0:
            raise _bad(self, "lr", "give a number above 0")
        if self.weight_decay < 0:
            raise _bad(self, "weight_decay", "give 0 or more")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise _bad(self, "betas", "give two numbers from 0 to below 1")
        if self.eps is not None and self.eps < 0:
            raise _bad(self, "eps", "give 0 or more")
        if self.small_size is not None:
            _at_least(self, 0, "small_size")
        known = OPTIMIZER_SETTINGS[self.name]
        for name in self.settings():
            if name not in known:
                raise RecipeError(
                    f"optimizer.{name} = {getattr(self, name)!r}: {self.name} has no such setting; "
                    f"it has lr, weight_decay, {', '.join(known)}"
                )

    def settings(self) -> dict[str, Any]:
        """What was chosen beside lr and weight_decay, as keyword arguments of the optimizer."""
        apart = ("name", "lr", "weight_decay", *STORAGE_SETTINGS)
        names = [f.name for f in dataclasses.fields(self) if f.name not in apart]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def storage(self) -> dict[str, Any]:
        """What was chosen about storing weights and states, likewise."""
        return {name: getattr(self, name) for name in STORAGE_SETTINGS if getattr(self, name) is not None}


@dataclass(frozen=True)
class GradientRecipe:
    """What becomes of gradients between a backward and the step."""

    GROUP: ClassVar[str] = "gradient"

    accumulate: int = 1
    """Batches that one optimizer step sums: as one batch so many times as large, in the memory of one."""
    clip_norm: float | None = None
    """Scale the gradients of all weights down to this norm together, as clip_grad_norm_ does. None: no clipping."""
    clip_value: float | None = None
    """Bring every element of a gradient within plus or minus this, after clip_norm."""
    clip: Literal["exact", "two_pass", "delayed"] = "exact"
    """How clip_norm learns the norm. exact: weights wait for it. two_pass: backward runs twice, for less memory.
    delayed: the last step's norm is taken, an approximation."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """A gradient that is not finite never reaches a weight. raise: the run then stops. skip: it goes on."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        _at_least(self, 1, "accumulate")
        for name in ("clip_norm", "clip_value"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise _bad(self, name, "give a number above 0, or None not to clip")
        if self.clip != "exact" and self.clip_norm is None:
            raise _bad(self, "clip", "clips nothing without gradient.clip_norm; say how far to clip")
        if self.clip != "exact" and self.accumulate > 1:
            raise _bad(
                self,
                "clip",
                f"does not go with gradient.accumulate = {self.accumulate}, for the norm of a sum is known when its "
                "last part is; use exact",
            )

    @property
    def waits(self) -> bool:
        """Whether a fold keeps what gradients are made of (or, where smaller, a gradient) until the step."""
        return self.accumulate > 1 or (self.clip_norm is not None and self.clip == "exact")

    def fold_options(self) -> dict[str, Any]:
        """The same as keyword arguments of `gradfold.fold`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class WorkingSetRecipe:
    """Train a chunk of the model at a time while the rest sleeps. Off, unless chunks is given or by is layer."""

    GROUP: ClassVar[str] = "working_set"

    chunks: int | None = None
    """Into how many chunks the model is cut. With by = layer, None makes one of each layer."""
    interval: int = INTERVAL
    """Optimizer steps before the next chunk wakes."""
    by: Literal["bytes", "layer"] = "bytes"
    """bytes: equal chunks, tensors sliced where a cut falls. layer: whole layers."""
    axis: Literal["out", "in"] = "out"
    """Slice tensors by rows (out) or matrices by columns (in)."""
    order: Literal["forward", "backward", "random", "importance"] = "forward"
    """Which chunk comes next. importance: the one with the largest gradients, and each within two rounds."""
    always: tuple[str, ...] = ()
    """Parameters whose names contain one of these are always awake, e.g. norm."""
    states: Literal["keep", "reset"] = "keep"
    """Optimizer states of a chunk that wakes again: as they were, or new."""
    offload: Literal["cpu", "disk"] | None = None
    """Where the states of sleeping chunks are. disk: in the run's folder. None: on the device."""
    prefetch: int = 1
    """Chunks whose states are fetched before their turn: 1 or 0."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if self.chunks is not None:
            _at_least(self, 1, "chunks")
        _at_least(self, 1, "interval")
        if self.prefetch not in (0, 1):
            raise _bad(self, "prefetch", "give 0 or 1")
        if not self.used:
            for spec in dataclasses.fields(self):
                if getattr(self, spec.name) != spec.default:
                    raise _bad(self, spec.name, "does nothing without working_set.chunks; say how many")

    @property
    def used(self) -> bool:
        return self.chunks is not None or self.by == "layer"

    def build(self, folder: str | Path | None = None, **changes: Any) -> WorkingSet | None:
        """Make the working set, or None where none is asked for.

        Args:
            folder: where the states of sleeping chunks go, if the recipe keeps them on disk.
            **changes: other arguments of `gradfold.WorkingSet`, in the place of the recipe's or beside them.

        Raises:
            RecipeError: fields that do not go together.
        """
        if not self.used:
            return None
        from gradfold.workset import WorkingSet

        options = dataclasses.asdict(self) | changes
        try:
            return WorkingSet(**options, folder=folder if options["offload"] == "disk" else None)
        except FoldError as error:
            raise RecipeError(f"working_set: {error}") from None


@dataclass(frozen=True)
class ScheduleRecipe:
    """How the learning rate moves."""

    GROUP: ClassVar[str] = "schedule"

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup: float = 0.05
    """Steps over which the rate climbs from near 0: a fraction of all steps if below 1, else their number."""
    final: float = 0.0
    """Where cosine and linear end, as a fraction of lr."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if self.warmup < 0 or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            raise _bad(self, "warmup", "give a fraction of all steps (0 to below 1) or a whole number of steps")
        if not 0 <= self.final <= 1:
            raise _bad(self, "final", "give a fraction of lr, 0 to 1")

    def warmup_steps(self, steps: int) -> int:
        """Number of warm-up steps in a run of `steps` steps."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)


@dataclass(frozen=True)
class EvaluationRecipe:
    """Held-out loss and sample texts."""

    GROUP: ClassVar[str] = "evaluation"

    interval_steps: int = 0
    """Measure the held-out loss every so many steps too. 0: only before and after."""
    sequences: int = 64
    """Measure on at most so many held-out sequences, chosen once. 0: all."""
    sample_prompt: str | None = None
    """What the model continues before and after training. None: the start of a held-out row."""
    sample_tokens: int = 48
    """How many tokens it writes. 0: no samples."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        _at_least(self, 0, "interval_steps", "sequences", "sample_tokens")


@dataclass(frozen=True)
class CheckpointRecipe:
    """When to save, and how many saves to keep."""

    GROUP: ClassVar[str] = "checkpoint"

    interval_steps: int = 500
    """Save every so many steps. 0: only at the end, and when the run is interrupted."""
    keep: int = 2
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        _at_least(self, 0, "interval_steps")
        _at_least(self, 1, "keep")


@dataclass(frozen=True)
class Recipe:
    """One training run. Raises RecipeError naming the field, its value and the way out."""

    GROUP: ClassVar[str] = ""

    model: str = "smollm2"
    """A folder, a .gguf file, a hub id, or `smollm2` (SmolLM2-135M-Instruct, from a package)."""
    data: tuple[str, ...] = ("pydoc",)
    """Files (.jsonl .json .csv .parquet .txt), or `pydoc` (Python's own documentation, 465 KB)."""
    out: str | None = None
    """Folder for all results; must be new or empty. None: a new folder under runs/."""
    fold: bool = True
    """Fold the optimizer into backward. --no-fold: the same optimizer, stepping from stored gradients."""
    head: Literal["fold", "plain"] = "fold"
    """The loss head. fold: neither the logits nor the gradient of its weight are ever whole. plain: the model's own."""
    steps: int | None = None
    """Optimizer steps. None: see epochs."""
    epochs: float | None = None
    """Passes over the data, if steps is not given. None: 1."""
    batch_size: int = BATCH_SIZE
    """Sequences per micro-batch; one step uses `gradient.accumulate` of them."""
    sequence_length: int = SEQUENCE_LENGTH
    """Tokens per sequence."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of weights and arithmetic; of the states too, unless optimizer.states says otherwise."""
    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, ... auto: cuda if there is one."""
    gradient_checkpointing: bool = False
    """Compute activations again in backward instead of keeping them."""
    seed: int = 0
    """Of the split, the order of the data and dropout."""
    text: TextRecipe = field(default_factory=TextRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    gradient: GradientRecipe = field(default_factory=GradientRecipe)
    working_set: WorkingSetRecipe = field(default_factory=WorkingSetRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if not self.model:
            raise _bad(self, "model", "name a folder, a .gguf file or a hub id")
        if not self.data:
            raise _bad(self, "data", "name at least one file, or `pydoc`")
        if self.out == "":
            raise _bad(self, "out", "name a folder, or leave it out")
        if self.steps is not None and self.epochs is not None:
            raise RecipeError(
                f"steps = {self.steps} and epochs = {self.epochs:g}: both say how long to train; keep one"
            )
        if self.steps is not None:
            _at_least(self, 1, "steps")
        if self.epochs is not None and not self.epochs > 0:
            raise _bad(self, "epochs", "give a number above 0")
        _at_least(self, 1, "batch_size")
        _at_least(self, 2, "sequence_length")
        if not self.fold and self.gradient.clip != "exact":
            raise RecipeError(
                f"gradient.clip = {self.gradient.clip!r} with fold = False: stored gradients are there to be measured, "
                "so that clipping is exact; leave gradient.clip out, or fold"
            )
        if not self.fold and self.working_set.used:
            raise RecipeError(
                "working_set with fold = False: only a folded model has one; leave working_set out, or fold"
            )
        if not self.fold and self.head != "fold":
            raise _bad(self, "head", "does nothing with fold = False, where every head is plain; leave one of them out")
        if not 0 <= self.seed < 2**32:
            raise _bad(self, "seed", "give a whole number from 0 to 2**32 - 1")

    def plan_settings(self) -> Settings:
        """The recipe as `gradfold.plan` takes it.

        Raises:
            RecipeError: a working set that cannot be.
        """
        from gradfold.planner.settings import Settings

        gradient = {name: value for name, value in self.gradient.fold_options().items() if name != "on_nonfinite"}
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
            **self.optimizer.storage(),
            **gradient,
        )


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
