"""The stages of a pipeline on this rank as one model, whose parameters have their names in the whole one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from gradfold import _torch
from gradfold.errors import FoldError

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")  # the first is that of the layer


class Stages(nn.Module):
    """The stages of a pipeline on this rank, as one model.

    A parameter has its name in the whole model, or one that no other stage has: random bits, checkpoints and the ranks'
    vote go by it.

    Args:
        stages: the modules, by the number of the stage.
        prefix: what a stage's names begin with; a text for all stages, or one for each number.
        offset: what is added to the first number in a stage's names; a number for all stages, or one for each.
        tied: for names of parameters that are copies of another stage's, the name of that one.

    Raises:
        FoldError: two parameters of one name, or a name in ``tied`` that no parameter has.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        prefix: str | Mapping[int, str] = "",
        offset: int | Mapping[int, int] = 0,
        tied: Mapping[str, str] | None = None,
    ):
        super().__init__()
        self._prefix = _of_each("prefix", prefix, stages, str, "")
        self._offset = _of_each("offset", offset, stages, int, 0)
        self._tied = dict(tied or {})
        self._numbers = list(stages)
        for number, module in stages.items():
            self.add_module(f"stage{number}", module)
        owners: dict[str, nn.Parameter] = {}
        for name, param in self.named_parameters():
            if owners.setdefault(name, param) is not param:
                raise FoldError(
                    f"{name}: two parameters of this rank's stages have this name; give fold_stage prefix= or offset=, "
                    "so that each has its name in the whole model, or, if they are one tied weight, assign the same "
                    "Parameter to both"
                )

    def _name_in_whole(self, number: int, name: str) -> str:
        if offset := self._offset[number]:
            name = _NUMBER.sub(lambda found: str(int(found[0]) + offset), name, count=1)
        return self._prefix[number] + name

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by their names in the whole model."""
        seen: set[int] = set()
        for number, module in self._modules_by_number() if recurse else ():
            for name, param in module.named_parameters(remove_duplicate=remove_duplicate):
                if not (remove_duplicate and id(param) in seen):
                    seen.add(id(param))
                    found = self._name_in_whole(number, name)
                    yield prefix + self._tied.get(found, found), param

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield this module, and those of all stages by their names in the whole model."""
        seen = set() if memo is None else memo
        yield prefix, self
        for number, module in self._modules_by_number():
            for name, one in module.named_modules(seen, remove_duplicate=remove_duplicate):
                yield prefix + self._name_in_whole(number, name).rstrip("."), one

    def used_by(self) -> dict[int, tuple[int, ...]]:
        """Return the numbers of the stages that use each parameter, by id of the Parameter."""
        found: dict[int, tuple[int, ...]] = {}
        for number, module in self._modules_by_number():
            for param in module.parameters():
                found[id(param)] = (*found.get(id(param), ()), number)
        return found

    def _modules_by_number(self) -> list[tuple[int, nn.Module]]:
        return [(number, getattr(self, f"stage{number}")) for number in self._numbers]


def _of_each(name: str, given: Any, stages: Mapping[int, Any], kind: type, default: Any) -> dict[int, Any]:
    """Return an argument for each stage's number."""
    by_number = given if isinstance(given, Mapping) else dict.fromkeys(stages, given)
    for number, value in by_number.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FoldError(f"{name}={given!r}: a {kind.__name__}, or one for each number of a stage")
        if not isinstance(number, int):
            raise FoldError(f"{name}={given!r}: its keys are numbers of stages, not {number!r}")
    return {number: by_number.get(number, default) for number in stages}


def stages_to_fold(schedule: Any) -> list[Any]:
    """Return the stages of this rank that a schedule runs.

    Raises:
        FoldError: it is no schedule of ``torch.distributed.pipelining`` that trains, or a stage is wrapped.
    """
    kinds = _torch.pipeline_schedules()
    if not kinds or not isinstance(schedule, kinds):
        raise FoldError(
            f"fold_stage({type(schedule).__name__}): give a schedule of torch.distributed.pipelining, as "
            "Schedule1F1B(stage, n_microbatches=8, loss_fn=loss_fn); it knows its stages and micro-batches"
        )
    if not _torch.runs_backward(schedule):
        raise FoldError(f"{type(schedule).__name__} without loss_fn runs no backward, so that nothing would step")
    stages = _torch.stages_of(schedule)
    for stage in stages:
        if any(type(module).__name__.startswith("FSDP") for module in stage.submod.modules()):
            raise FoldError(
                f"stage {stage.stage_index}: is under fully_shard, whose gradients a schedule reduces outside of any "
                "backward; shard its weights by tensor parallelism, or train it with torch's optimizers"
            )
    return stages


def refuse_missing_stage(stages: Sequence[Any], optimizer: Any) -> None:
    """Raise if one optimizer does not have the parameters of all of a rank's stages.

    Raises:
        FoldError: of some stage it has none.
    """
    mine = {id(param) for group in optimizer.groups for param in group["params"]}
    for stage in stages:
        trained = [param for param in stage.submod.parameters() if param.requires_grad]
        if trained and not any(id(param) in mine for param in trained):
            numbers = " and ".join(str(one.stage_index) for one in stages)
            raise FoldError(
                f"stage {stage.stage_index}: none of its parameters is in the optimizer; this rank has stages "
                f"{numbers}, whose gradients are clipped and voted on together, so make one optimizer of the "
                "parameters of all of them (param_groups may differ)"
            )


def rename(optimizer: Any, model: Stages) -> None:
    """Let an optimizer call its parameters as the whole model does; names that a state_dict brought stay."""
    names = {id(param): name for name, param in model.named_parameters()}
    for group in optimizer.groups:
        if not all(id(param) in names for param in group["params"]):
            continue  # fold() refuses it
        whole = [names[id(param)] for param in group["params"]]
        if "param_names" in group:
            group["param_names"] = whole
        else:
            group.setdefault("streams", whole)
    optimizer._streams.clear()
