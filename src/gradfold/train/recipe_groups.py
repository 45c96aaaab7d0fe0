"""The groups of a Recipe, each typed, frozen and checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gradfold._options import (
    MAX_ACCUMULATE,
    MAX_WHOLE,
    FoldOptions,
    GradientFields,
    OptimizerName,
    StorageFields,
)
from gradfold.errors import FoldError

from .errors import RecipeError
from .validate import conform_fields, refused, require_at_least, require_at_most

OPTIMIZER_SETTINGS: dict[str, tuple[str, ...]] = {
    "AdamW": ("betas", "eps", "amsgrad", "maximize"),
    "Adam": ("betas", "eps", "amsgrad", "decoupled_weight_decay", "maximize"),
    "SGD": ("momentum", "dampening", "nesterov", "maximize"),
    "Lion": ("betas", "maximize"),
    "RMSprop": ("alpha", "eps", "momentum", "centered", "maximize"),
    "Adagrad": ("lr_decay", "initial_accumulator_value", "eps", "maximize"),
    "NAdam": ("betas", "eps", "momentum_decay", "decoupled_weight_decay", "maximize"),
    "Adafactor": ("beta2_decay", "d", "maximize"),
    "Adadelta": ("rho", "eps", "maximize"),
    "Adamax": ("betas", "eps", "maximize"),
    "ASGD": ("lambd", "alpha", "t0", "maximize"),
    "Rprop": ("etas", "step_sizes", "maximize"),
    "RAdam": ("betas", "eps", "decoupled_weight_decay", "maximize"),
    "AdamMini": ("betas", "eps", "maximize"),
    "LAMB": ("betas", "eps", "maximize"),
    "LARS": ("momentum", "trust_coefficient", "eps", "maximize"),
    "Muon": ("momentum", "nesterov", "eps", "ns_steps", "adjust_lr_fn", "adamw_lr"),
}
"""Which settings each optimizer has beside `lr` and `weight_decay`, which all have (but Rprop, which has no
weight decay). Adafactor's `eps` are two numbers, its defaults here."""


FINITE_IN_FP32 = ("lr", "adamw_lr", "weight_decay", "eps", "momentum", "dampening", "alpha", "lr_decay",
                  "initial_accumulator_value", "momentum_decay", "beta2_decay", "d", "rho", "lambd", "t0",
                  "trust_coefficient")  # fmt: skip
"""Settings that meet weights, whose numbers end at 3.4e38."""


@dataclass(frozen=True)
class TextRecipe:
    """Tokenization, packing and loss masking."""

    GROUP: ClassVar[str] = "text"

    packing: bool = True
    """Pack several rows into one sequence. Rows never attend to each other: position ids restart at each row."""
    loss_on: Literal["completions", "all"] = "completions"
    """Tokens in the loss: completions and assistant turns only, or prompts too. `text` rows count whole."""
    too_long: Literal["error", "truncate", "drop"] = "error"
    """What to do with prompt/completion or messages rows longer than sequence_length. `text` rows are cut."""
    held_out: float = 0.05
    """Fraction of rows held out for evaluation. 0: none."""
    held_out_data: tuple[str, ...] = ()
    """Evaluation files, instead of a held-out fraction of the data."""
    streaming: bool = False
    """Read the data while training, for files larger than memory. Needs steps; rows mix within the buffer only."""
    buffer: int = 4096
    """Number of rows that are read, shuffled and packed together with streaming; fewer if they are very long."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's: a jinja file, or the template itself. None: the tokenizer's."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if not all(self.held_out_data):
            raise refused(self, "held_out_data", "name files, or leave it out")
        if not 0 <= self.held_out < 1:
            raise refused(self, "held_out", "give a fraction from 0 (nothing held out) to below 1")
        require_at_least(self, 1, "buffer")


@dataclass(frozen=True)
class PreferenceRecipe:
    """Preference optimization (DPO), for data with `chosen` and `rejected`. Other data has no use for it."""

    GROUP: ClassVar[str] = "preference"

    beta: float = 0.1
    """Strength of the tie to the reference model: the larger, the nearer."""
    label_smoothing: float = 0.0
    """Fraction of the pairs whose order is taken to be wrong, below 0.5."""
    reference: Literal["precomputed", "frozen"] = "precomputed"
    """Log-probabilities under the reference, the model that the run begins with. precomputed: once, before training, or
    from the data's columns. frozen: in each step, by a copy that stays in memory."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if not self.beta > 0:
            raise refused(self, "beta", "give a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise refused(self, "label_smoothing", "give a fraction from 0 to below 0.5")


@dataclass(frozen=True)
class OptimizerFields:
    """The optimizer and its hyper-parameters."""

    name: OptimizerName = "AdamW"
    """Name of the optimizer."""
    lr: float = 2e-5
    """Peak learning rate, reached after warm-up."""
    weight_decay: float = 0.0
    """Weight decay, of all weights but norms and biases, as the optimizer defines it."""
    betas: tuple[float, float] | None = None
    """Decay rates (betas) of the first and second moment. None: the optimizer's default."""
    eps: float | None = None
    """Epsilon, added to the denominator. None: the optimizer's default."""
    momentum: float | None = None
    """SGD, RMSprop, LARS and Muon: momentum factor. None: the optimizer's default."""
    dampening: float | None = None
    """SGD: dampening of the momentum. None: the optimizer's default."""
    nesterov: bool | None = None
    """SGD and Muon: Nesterov momentum. None: the optimizer's default."""
    alpha: float | None = None
    """RMSprop: smoothing constant. ASGD: power of the learning rate's decay. None: the optimizer's default."""
    centered: bool | None = None
    """RMSprop: divide by the variance. None: the optimizer's default."""
    lr_decay: float | None = None
    """Adagrad: decay of the learning rate. None: the optimizer's default."""
    initial_accumulator_value: float | None = None
    """Adagrad: initial value of the sums of squares. None: the optimizer's default."""
    momentum_decay: float | None = None
    """NAdam: decay of the momentum. None: the optimizer's default."""
    beta2_decay: float | None = None
    """Adafactor: exponent of the second moments' decay, 0 or less. None: the optimizer's default."""
    d: float | None = None
    """Adafactor: largest root mean square of an update. None: the optimizer's default."""
    trust_coefficient: float | None = None
    """LARS: size of a step relative to the weight. None: the optimizer's default."""
    rho: float | None = None
    """Adadelta: decay rate of the averages. None: the optimizer's default."""
    lambd: float | None = None
    """ASGD: decay term. None: the optimizer's default."""
    t0: float | None = None
    """ASGD: the step after which weights are averaged. None: the optimizer's default."""
    etas: tuple[float, float] | None = None
    """Rprop: factors by which step sizes shrink and grow. None: the optimizer's default."""
    step_sizes: tuple[float, float] | None = None
    """Rprop: smallest and largest step size. None: the optimizer's default."""
    decoupled_weight_decay: bool | None = None
    """Adam, NAdam, RAdam: decoupled weight decay, as in AdamW. None: the optimizer's default."""
    amsgrad: bool | None = None
    """Adam and AdamW: use the AMSGrad variant. None: the optimizer's default."""
    maximize: bool | None = None
    """Maximize the objective instead of minimizing it. None: the optimizer's default."""
    ns_steps: int | None = None
    """Muon: Newton-Schulz iterations, below 100. None: the optimizer's default."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    """Muon: learning rate by a matrix's shape. match_rms_adamw: as AdamW needs it. None: the optimizer's default."""
    adamw_lr: float | None = None
    """Muon: peak learning rate of what AdamW steps: embeddings, head, norms and biases. None: lr."""


@dataclass(frozen=True)
class OptimizerRecipe(StorageFields, OptimizerFields):
    """Optimizer, and how its states are stored (quantization). None: the optimizer's own default, which is torch's."""

    GROUP: ClassVar[str] = "optimizer"

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if not self.lr > 0:
            raise refused(self, "lr", "give a number above 0")
        for name in FINITE_IN_FP32:
            if abs(getattr(self, name) or 0) > 3.4e38:
                raise refused(self, name, "give a number that fp32 can hold, below 3.4e38")
        if self.adamw_lr is not None and not self.adamw_lr > 0:
            raise refused(self, "adamw_lr", "give a number above 0")
        if self.ns_steps is not None and not 0 <= self.ns_steps < 100:
            raise refused(self, "ns_steps", "give a whole number from 0 to 99")
        if self.weight_decay < 0:
            raise refused(self, "weight_decay", "give 0 or more")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise refused(self, "betas", "give two numbers from 0 to below 1")
        if self.eps is not None and self.eps < 0:
            raise refused(self, "eps", "give 0 or more")
        if self.small_size is not None:
            require_at_least(self, 0, "small_size")
        if self.name == "Rprop" and self.weight_decay:
            raise refused(self, "weight_decay", "leave it out: Rprop has no weight decay")
        if self.name == "AdamWScheduleFree":
            raise refused(
                self,
                "name",
                "a run evaluates and saves the weights that train, and here these are others than those to use "
                "(optimizer.eval()); take AdamW, or a loop of your own",
            )
        known = OPTIMIZER_SETTINGS[self.name]
        for name in [*self.settings(), *(["adamw_lr"] if self.adamw_lr is not None else [])]:
            if name not in known:
                raise RecipeError(
                    f"optimizer.{name} = {getattr(self, name)!r}: {self.name} has no such setting; "
                    f"it has lr, weight_decay, {', '.join(known)}"
                )

    def settings(self) -> dict[str, Any]:
        """What was chosen beside lr, weight_decay and storage, as keyword arguments of the optimizer."""
        apart = ("name", "lr", "weight_decay", "adamw_lr")
        names = [f.name for f in dataclasses.fields(OptimizerFields) if f.name not in apart]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class GradientRecipe(GradientFields):
    """Gradient accumulation, gradient clipping, and NaN or infinite gradients."""

    GROUP: ClassVar[str] = "gradient"

    on_nonfinite: Literal["raise", "skip"] = "raise"
    """What to do after a NaN or infinite gradient, which never reaches a weight. raise: stop. skip: go on."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        require_at_most(self, MAX_ACCUMULATE, "accumulate")
        try:
            FoldOptions(**self.fold_options())
        except FoldError as error:
            name, _, rest = str(error).partition("=")
            raise RecipeError(f"{self.GROUP}.{name} = {rest}") from None

    @property
    def waits(self) -> bool:
        """Whether a fold keeps what gradients are made of (or, where smaller, a gradient) until the step."""
        return self.accumulate > 1 or (self.clip_norm is not None and self.clip == "exact")

    def fold_options(self) -> dict[str, Any]:
        """The group as keyword arguments of `gradfold.fold`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ScheduleRecipe:
    """Learning-rate schedule."""

    GROUP: ClassVar[str] = "schedule"

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule after warm-up."""
    warmup: float = 0.05
    """Warm-up: a fraction of all steps if below 1, else a number of steps."""
    final: float = 0.0
    """Final learning rate of cosine and linear, as a fraction of lr."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if self.warmup < 0 or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            raise refused(self, "warmup", "give a fraction of all steps (0 to below 1) or a whole number of steps")
        require_at_most(self, MAX_WHOLE, "warmup")
        if not 0 <= self.final <= 1:
            raise refused(self, "final", "give a fraction of lr, 0 to 1")

    def warmup_steps(self, steps: int) -> int:
        """Number of warm-up steps in a run of `steps` steps."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)


@dataclass(frozen=True)
class EvaluationRecipe:
    """Evaluation: held-out loss and sample texts."""

    GROUP: ClassVar[str] = "evaluation"

    interval_steps: int = 0
    """Steps between evaluations of the held-out loss. 0: only before and after training."""
    sequences: int = 64
    """Maximum number of held-out sequences to evaluate on, chosen once. 0: all."""
    sample_prompt: str | None = None
    """Prompt of the sample texts before and after training. None: the start of a held-out row."""
    sample_tokens: int = 48
    """Number of tokens per sample. 0: no samples."""
    patience: int = 0
    """Early stopping: stop when so many evaluations in a row have not lowered the held-out loss. 0: never."""
    min_delta: float = 0.0
    """Early stopping: by how much an evaluation must lower the held-out loss to count."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        require_at_least(self, 0, "interval_steps", "sequences", "patience")
        require_at_least(self, 0, "sample_tokens", most=100_000)
        if self.patience and not self.interval_steps:
            raise refused(self, "patience", "there is no evaluation while training; give evaluation.interval_steps")
        if self.min_delta < 0:
            raise refused(self, "min_delta", "give 0 or more")
        if self.min_delta and not self.patience:
            raise refused(self, "min_delta", "does nothing without evaluation.patience; say how many evaluations")


@dataclass(frozen=True)
class CheckpointRecipe:
    """Checkpoints: when to save, how many to keep."""

    GROUP: ClassVar[str] = "checkpoint"

    interval_steps: int = 500
    """Steps between checkpoints. 0: only at the end, and when the run is interrupted."""
    keep: int = 2
    """Number of checkpoints to keep, the newest ones."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest held-out loss; saved at each evaluation that is the best so far."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        require_at_least(self, 0, "interval_steps")
        require_at_least(self, 1, "keep")
