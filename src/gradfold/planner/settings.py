"""What a plan is made for: how long a batch is, how weights and states are stored, what is folded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

import gradfold.optim as optimizers
from gradfold._fold import Fold, fold
from gradfold._options import (
    BATCH_SIZE,
    DTYPES,
    MAX_BATCH,
    MAX_TOKENS,
    OPTIMIZERS,
    SEQUENCE_LENGTH,
    Dtype,
    FoldOptions,
    GradientFields,
    Head,
    Parallel,
    StorageFields,
)
from gradfold.errors import FoldError
from gradfold.optim import RuleOptimizer
from gradfold.streaming import Stream
from gradfold.workset import WorkingSet

from .errors import PlanError

PreferenceReference = Literal["precomputed", "frozen"]
"""Where the log-probabilities under a reference model come from."""
MOST_RANKS = 4096
MOST_TRACED = 4096
"""Limit of micro-batches in a planned step, each of which is run."""


@dataclasses.dataclass(frozen=True)
class Settings(GradientFields, StorageFields):
    """One way to train, as far as memory goes: a frozen dataclass whose fields are checked when it is made.

    Attributes:
        working_set: The working set. None: every weight trains in every step.

    Raises:
        PlanError: naming the setting and its value.

    Example:
        >>> settings = gradfold.planner.Settings(tokens=16, batch=1, states="int8", checkpointing=True)
        >>> settings.describe(), settings.describe_batches()
    """

    tokens: int = SEQUENCE_LENGTH
    """Tokens per sequence; every sequence is taken to be full."""
    batch: int = BATCH_SIZE
    """Sequences per micro-batch; one step uses `accumulate` of them."""
    dtype: Dtype | None = None
    """Of weights and arithmetic; None: what the model is published in, bfloat16 where that is not said."""
    fold: bool = True
    """False: the same optimizer steps from stored gradients."""
    optimizer: str = "AdamW"
    """One of gradfold's."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Keyword arguments of the optimizer beside how it stores: `betas`, `amsgrad`, `momentum`."""
    checkpointing: bool = False
    """Compute activations again in backward instead of keeping them."""
    head: Head = "fold"
    """Whether the loss head is folded as well."""
    head_keep_bytes: int | None = None
    """How much of the softmax a folded head keeps instead of computing it twice; None: its own default."""
    working_set: WorkingSet | None = dataclasses.field(default=None, hash=False)  # may hold lists
    stream: Stream | None = dataclasses.field(default=None, hash=False)
    """Weights and states in host memory or on disk, a few blocks at a time on the device."""
    packing: bool = False
    """Whether several rows share a sequence, as `gradfold train` packs them: attention then needs a mask."""
    preference: PreferenceReference | None = None
    """Train on pairs of a chosen and a rejected answer (DPO): a micro-batch of `batch` pairs is twice as many
    sequences, and "frozen" has a copy of the model beside it, "precomputed" none. None: the next token's loss."""

    parallel: Parallel | None = None
    """How `ranks` ranks share the model: "fsdp", "tp" or "replicas", as `gradfold.spread` takes it."""
    ranks: int = 1
    """How many ranks share the model; a plan is of the first. All but "tp" share the sequences of a batch, too."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"{name}={value!r}: give a whole number, 1 or more")
        if self.preference is not None and self.preference not in get_args(PreferenceReference):
            raise PlanError(f"preference={self.preference!r}: 'precomputed', 'frozen', or None")
        if self.tokens > MAX_TOKENS or self.batch > MAX_BATCH or self.sequences * self.tokens > MAX_TOKENS:
            raise PlanError(
                f"batch={_brief(self.batch)} of tokens={_brief(self.tokens)}: more than a plan can trace; give "
                f"{MAX_TOKENS:,} tokens or less in one micro-batch"
            )
        if isinstance(self.accumulate, int) and self.accumulate > MOST_TRACED:
            raise PlanError(
                f"accumulate={_brief(self.accumulate)}: a plan runs every micro-batch of a step; give {MOST_TRACED:,} "
                "or less (the peak hardly changes after a few)"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise PlanError(f"dtype={self.dtype!r}: one of {', '.join(map(repr, DTYPES))}, or None")
        if self.optimizer not in OPTIMIZERS:
            raise PlanError(f"optimizer={self.optimizer!r}: one of {', '.join(OPTIMIZERS)}")
        if not isinstance(self.ranks, int) or isinstance(self.ranks, bool) or not 1 <= self.ranks <= MOST_RANKS:
            raise PlanError(f"ranks={self.ranks!r}: give a whole number from 1 to {MOST_RANKS:,}")
        if self.ranks > 1 and self.parallel is None:
            raise PlanError(f"ranks={self.ranks}: say how they share the model: parallel='fsdp', 'tp' or 'replicas'")
        if self.parallel not in (None, *get_args(Parallel)):
            raise PlanError(f"parallel={self.parallel!r}: one of {', '.join(map(repr, get_args(Parallel)))}, or None")
        if self.batch % self.shares:
            raise PlanError(f"batch={self.batch}: {self.ranks} ranks share it; give a multiple of {self.ranks}")
        given = [name for name in ("working_set", "stream") if getattr(self, name) is not None]
        given += ["clip"] if self.clip != "exact" else []
        if not self.fold and given:
            name = given[0]
            raise PlanError(f"{name}={getattr(self, name)!r} with fold=False: only a folded model has one")
        if self.stream is not None and self.ranks > 1:
            raise PlanError(
                f"stream={self.stream!r} with ranks={self.ranks}: one process streams; leave one of them out"
            )
        try:
            FoldOptions(**self.gradient_options())
        except FoldError as error:
            raise PlanError(str(error)) from None

    @property
    def sequences(self) -> int:
        """In one micro-batch: of each pair of preferences two."""
        return self.batch if self.preference is None else 2 * self.batch

    @property
    def shares(self) -> int:
        """Into how many parts a batch is cut: one for each rank, unless all of them need all of it."""
        return 1 if self.parallel in (None, "tp") else self.ranks

    @property
    def whole(self) -> bool:
        """Every weight steps in every step."""
        return self.working_set is None

    def torch_dtype(self, model_dtype: torch.dtype | None) -> torch.dtype:
        """Of weights, for a model that is published in `model_dtype`.

        Args:
            model_dtype: What the model is published in. None: unknown.

        Returns:
            The dtype of weights.
        """
        return model_dtype or torch.bfloat16 if self.dtype is None else getattr(torch, self.dtype)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> RuleOptimizer:
        """Make the optimizer.

        Args:
            parameters: The parameters it steps.

        Returns:
            One of gradfold's optimizers.

        Raises:
            PlanError: Settings do not go together, or not with these weights.
        """
        kind = getattr(optimizers, self.optimizer)
        given: Any = parameters
        if self.optimizer == "Muon" and (model := getattr(parameters, "model", None)) is not None:
            matrices, others = optimizers.muon_groups(model)
            given = [{"params": matrices}, {"params": others, "rule": "adamw"}]
            given = [group for group in given if group["params"]]
        try:
            return kind(given, lr=1e-5, **self.options, **self.storage_options())
        except (TypeError, ValueError) as error:
            raise PlanError(f"{self.optimizer}: {error}") from None

    def make_fold(
        self, model: nn.Module, optimizer: RuleOptimizer, working_set: WorkingSet | None, backend: str = "reference"
    ) -> Fold:
        """Fold a model as these settings say, but for the working set, of which a trace takes one that it can watch.

        Args:
            model: The model.
            optimizer: The optimizer of its parameters.
            working_set: The working set. None: none.
            backend: As in ``gradfold.fold``.

        Returns:
            The fold.
        """
        return fold(
            model,
            optimizer,
            **self.gradient_options(),
            working_set=working_set,
            head=self.head,
            head_keep_bytes=self.head_keep_bytes if self.head == "fold" else None,
            backend=backend,
            stream=self.stream,
        )

    def describe_batches(self) -> str:
        """Return what one step is given: "8 x 512 tokens", "4 batches of 8 x 512 tokens"."""
        return batches_of_tokens(self.batch, self.tokens, self.accumulate, paired=self.preference is not None)

    def describe(self) -> str:
        """Return the settings in one line."""
        words = [self.optimizer if self.states is None else f"{self.optimizer}, {self.states} states"]
        if self.master is not None:
            words.append(f"{self.master} masters")
        if not self.fold:
            words.append("not folded")
        elif self.head == "plain":
            words.append("plain head")
        if (turns := self.working_set) is not None:
            cut = f"{turns.chunks} chunks" if turns.chunks is not None else f"a chunk for each {turns.by}"
            where = {None: "on the device", "cpu": "in host memory", "disk": "on disk"}.get(turns.offload, "elsewhere")  # type: ignore[arg-type]
            rest = "" if turns.rest is None else f", {turns.rest} at rest"
            words.append(f"working set of {cut}, sleeping states {where}, prefetch {turns.prefetch}{rest}")
        if (stream := self.stream) is not None:
            where = {"cpu": "host memory", "disk": "disk"}[stream.offload]
            words.append(f"streamed from {where}, {stream.blocks} blocks on the device")
        if self.ranks > 1:
            words.append(f"one of {self.ranks} ranks ({self.parallel})")
        if self.preference is not None:
            words.append(f"preferences, {self.preference} reference")
        if self.checkpointing:
            words.append("checkpointing")
        if self.accumulate > 1:
            words.append(f"{self.accumulate} batches a step")
        if self.clip_norm is not None:
            words.append(f"clip_norm {self.clip_norm:g} ({self.clip})")
        return ", ".join(words)


def _brief(number: int) -> str:
    return f"{number:,}" if number < 10**30 else f"a number of {number.bit_length():,} bits"


def batches_of_tokens(batch: int, tokens: int, accumulate: int, paired: bool = False) -> str:
    """The size of one step in words, for the planner and the trainer alike."""
    size = f"{batch} {'pairs of 2 ' if paired else ''}x {tokens:,} tokens"
    return f"{accumulate} batches of {size}" if accumulate > 1 else size
