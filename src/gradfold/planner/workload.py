"""What it takes to run steps of one model that is not there: fake weights, a batch, and what stands for a device."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from gradfold._torch import DynamicOutputShapeException, FakeTensorMode
from gradfold.backends import as_accelerator
from gradfold.dist import message_bytes, spread
from gradfold.head.preference import answer_log_probs, preference_loss

from .errors import PlanError
from .fake import SkipWrites, plain_torch
from .hf_masks import packing_known
from .models import Subject
from .ranks import standing_for
from .repeat_layers import repeated
from .settings import Settings
from .step import LossFunction, MicroBatches, StepMemory
from .trace import LiveBytes

_INSTEAD = """; a plan calls model(input_ids=..., labels=...) and reads .loss of the result. \
gradfold.planner.step.step_memory takes a loss function for any other model"""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and how it is trained."""

    subject: Subject
    settings: Settings
    device: str  # "cuda": as an accelerator would; "cpu": as this processor does
    given: Any = None  # the batch, or a step's `MicroBatches`, in the place of full sequences
    own_loss: LossFunction | None = None  # in the place of the model's
    _references: MutableMapping[nn.Module, nn.Module] = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False, compare=False
    )
    _messages: MutableMapping[nn.Module, Tensor] = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False, compare=False
    )

    @classmethod
    def each(cls, subject: Subject, settings: Settings, device: str) -> list[Workload]:
        """One for each of the steps that may take most: of a subject whose data is known a few, else one."""
        steps = [None] if subject.batches is None else subject.batches(settings)
        return [cls(subject, settings, device, given=step) for step in steps]

    def batch(self) -> Any:
        """Those given, else full sequences: nothing is padded.

        With `packing`, each holds two rows, which do not see each other; preferences are never packed.
        """
        if self.given is not None:
            return self._part_of(self.given)
        batch, tokens = self.settings.sequences // self.settings.shares, self.settings.tokens
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        if self.settings.preference is not None:
            known = (
                {} if self.settings.preference == "frozen" else {"reference": torch.zeros(batch, dtype=torch.float64)}
            )
            return {"input_ids": ids, "labels": ids, **known}
        if not self.settings.packing or tokens < 2:
            return {"input_ids": ids, "labels": ids}
        positions = torch.arange(tokens)
        positions[tokens // 2 :] -= tokens // 2
        return {"input_ids": ids, "labels": ids, "position_ids": positions.expand(batch, -1).contiguous()}

    def _part_of(self, batch: Any) -> Any:
        """The first rank's rows of a batch, or of a step's `MicroBatches`; of preferences, its pairs."""
        shares = self.settings.shares
        if shares == 1:
            return batch
        if isinstance(batch, MicroBatches):
            return MicroBatches(self._part_of(one) for one in batch)
        halves = 1 if self.settings.preference is None else 2
        return {
            name: torch.cat([half[: len(half) // shares] for half in tensor.chunk(halves)])
            for name, tensor in batch.items()
        }

    @contextlib.contextmanager
    def model(self, layers: int | None = None) -> Iterator[nn.Module]:
        """A fake model, with fake tensors on. Raises PlanError for what cannot be built or traced."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        playing = as_accelerator() if self.device != "cpu" else contextlib.nullcontext()
        with plain_torch(), self._tracing():
            wanted = self.settings.dtype
            dtype = None if wanted is None else getattr(torch, wanted)
            made = self.subject.build(dtype, mode, layers)
            self._check(made)
            self.add_reference(made, lambda: self.subject.build(dtype, mode, layers))
            if self.settings.checkpointing and not enable_checkpointing(made):
                raise PlanError(f"checkpointing=True: {type(made).__name__} has none; leave it out")
            with contextlib.ExitStack() as held:
                for context in (playing, packing_known(self.batch()), mode, SkipWrites()):
                    held.enter_context(context)
                self._spread(made, held)
                yield made

    def _spread(self, model: nn.Module, held: contextlib.ExitStack) -> None:
        """Leave of the model what one rank holds, if several share it."""
        settings = self.settings
        if settings.parallel in (None, "replicas") or settings.ranks == 1:  # a replica is the whole model
            return
        if settings.preference is not None and settings.parallel != "replicas":
            raise PlanError(f"parallel={settings.parallel!r} with preferences: only 'replicas' trains on these")
        spread(model, held.enter_context(standing_for(settings.ranks)), settings.parallel)

    def add_reference(self, model: nn.Module, build: Callable[[], nn.Module]) -> None:
        """Put a frozen copy beside the model, where the settings have one, as `gradfold train` loads it."""
        if self.settings.preference == "frozen":
            self._references[model] = build().eval().requires_grad_(False)

    def reference_of(self, model: nn.Module) -> nn.Module | None:
        """The frozen copy beside a model."""
        return self._references.get(model)

    def meet(self, model: nn.Module, live: LiveBytes) -> None:
        """Tell a meter of what lies beside the model."""
        if (reference := self.reference_of(model)) is not None:
            live.track(reference)
        # alone, a copy sends nothing: the plan runs without the others
        if self.settings.parallel == "replicas" and self.settings.ranks > 1:
            messages = torch.empty(message_bytes(model), dtype=torch.uint8)
            self._messages[model] = messages
            live.track(messages, category="scratch")

    def depths(self, least: int = 1) -> tuple[int, int, int, int] | None:
        """Two depths whose steps tell that of the whole model, the period of its layers, and how many periods are left.

        Args:
            least: layers that the shallower one must have.

        Returns:
            None where the whole model must run.
        """
        depths, whole = self.subject.depths, self.subject.layers
        if depths is None or whole is None:
            return None
        first, _, period = depths
        first += max(0, -(-(least - first) // period)) * period
        more = (whole - first) // period
        return (first, first + period, period, more) if more > 1 else None

    def over_layers(self, run: Callable[[nn.Module], StepMemory]) -> StepMemory:
        """A step of the whole model; of two shallow ones, where its layers are alike."""
        depths = self.depths()
        if depths is not None:
            first, second, period, more = depths
            found = []
            for layers in (first, second):
                with self.model(layers) as model:
                    found.append(run(model))
            timeline = repeated(found[0].timeline, found[1].timeline, more, period)
            if timeline is not None:
                return StepMemory.of(found[0].label, timeline)
        with self.model() as model:
            return run(model)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The model's own, or that of preferences. Raises PlanError for a model that has none."""
        if self.own_loss is not None:
            return self.own_loss(model, batch)
        if self.settings.preference is not None:
            return self._preference(model, batch)
        if "position_ids" in batch and not _takes(model, "position_ids"):  # then its rows cannot be packed
            batch = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
        loss = getattr(model(**batch), "loss", None)
        if not isinstance(loss, Tensor):
            raise PlanError(f"model {self.subject.name}: what it returns has no .loss{_INSTEAD}")
        return loss

    def _preference(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss of pairs: twice as many sequences, the reference's answers known or asked for."""
        ids, labels, head = batch["input_ids"], batch["labels"], self.settings.head
        try:
            own = answer_log_probs(model, ids, labels, head)
            if (reference := batch.get("reference")) is None:
                with torch.no_grad():
                    reference = answer_log_probs(self._references[model], ids, labels, head)
        except (AttributeError, TypeError) as error:
            raise PlanError(
                f"model {self.subject.name}: its answers' log-probabilities cannot be had by way of its head's weight "
                f"({str(error).splitlines()[0]}); set head to plain"
            ) from None
        return preference_loss(own, reference.to(own.dtype), 0.1)[0]

    def _check(self, model: nn.Module) -> None:
        """What fake tensors would not notice, or notice late."""
        missing = [name for name in ("input_ids", "labels") if not _takes(model, name)]
        if missing:
            raise PlanError(f"model {self.subject.name}: its forward takes no {min(missing)}{_INSTEAD}")
        longest = getattr(self.subject.config, "max_position_embeddings", None)
        if not isinstance(longest, int) or self.settings.tokens <= longest:
            return
        # Rotary positions go on past what a model was trained for, at the same cost; a table of learned ones ends.
        words = getattr(self.subject.config, "vocab_size", None)
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and longest <= module.num_embeddings <= longest + 2 != words:
                raise PlanError(f"tokens={self.settings.tokens}: {name} of {self.subject.name} ends at {longest}")

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        """What models raise on fake tensors, as an error of ours."""
        try:
            yield
        except (DynamicOutputShapeException, NotImplementedError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DataDependent" not in type(error).__name__:
                raise
            raise PlanError(
                f"model {self.subject.name}: looks at the values of its tensors, and a plan has none "
                f"({type(error).__name__}); measure a step of it instead"
            ) from error


def enable_checkpointing(model: Any) -> bool:
    """Let a transformers model compute its activations again in backward; False: it cannot."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return False
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.2x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    return True


def _takes(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


class Trainable(list[nn.Parameter]):
    """The parameters of a model that require a gradient; Muon asks for the model, to tell its hidden matrices."""

    def __init__(self, model: nn.Module):
        super().__init__(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.model = model


def trainable(model: nn.Module) -> Trainable:
    """Return the parameters that require a gradient."""
    return Trainable(model)
