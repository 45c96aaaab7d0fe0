"""What it takes to run steps of one model that is not there: fake weights, a batch, and what stands for a device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from gradfold.backends import as_accelerator
from gradfold.plan.errors import PlanError
from gradfold.plan.fake import SkipWrites
from gradfold.plan.layers import repeated
from gradfold.plan.masks import packing_known
from gradfold.plan.models import Subject
from gradfold.plan.settings import Settings
from gradfold.plan.step import StepMemory


@dataclasses.dataclass(frozen=True)
class Scene:
    """A model and how it is trained."""

    subject: Subject
    settings: Settings
    device: str  # "cuda": as an accelerator would; "cpu": as this processor does

    def batch(self) -> dict[str, Tensor]:
        """Full sequences: nothing is padded, and nothing is packed."""
        ids = torch.zeros(self.settings.batch, self.settings.tokens, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids}

    @contextlib.contextmanager
    def model(self, layers: int | None = None) -> Iterator[nn.Module]:
        """A fake model, with fake tensors on. Raises PlanError for what cannot be built or traced."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        playing = as_accelerator() if self.device != "cpu" else contextlib.nullcontext()
        with self._tracing():
            made = self.subject.build(self.settings.torch_dtype(self.subject.dtype), mode, layers)
            if self.settings.checkpointing and not enable_checkpointing(made):
                raise PlanError(f"checkpointing=True: {type(made).__name__} has none; leave it out")
            with playing, packing_known(self.batch()), mode, SkipWrites():
                yield made

    def over_layers(self, run: Callable[[nn.Module], StepMemory]) -> StepMemory:
        """A step of the whole model; of two shallow ones, where its layers are alike."""
        depths, whole = self.subject.depths, self.subject.layers
        if depths is not None and whole is not None:
            first, second, period = depths
            found = []
            for layers in (first, second):
                with self.model(layers) as model:
                    found.append(run(model))
            timeline = repeated(found[0].timeline, found[1].timeline, (whole - first) // period, period)
            if timeline is not None:
                return StepMemory.of(found[0].label, timeline)
        with self.model() as model:
            return run(model)

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


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
