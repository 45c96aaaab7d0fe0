"""What ``fold()`` refuses before it changes anything."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import get_args

from torch import nn

from . import _torch
from ._options import Clip, Data, Head
from .dist import Ranks, Replicas, Sharding
from .engine import held, outside, refuse_other_model, refuse_owned, refuse_parameter
from .errors import FoldError
from .modules import FOLD_PARAM
from .optim import AdamWScheduleFree, RuleOptimizer, Several
from .rules import WholeRule
from .streaming import Stream
from .workset import WorkingSet


def refuse_head(head: object, keep_bytes: object) -> None:
    """Raise for ``head=`` and ``head_keep_bytes=`` that are none, or do not go together."""
    if head not in get_args(Head):
        raise FoldError(f"head={head!r}: give 'fold' or 'plain'")
    if keep_bytes is None:
        return
    if not isinstance(keep_bytes, int) or isinstance(keep_bytes, bool) or keep_bytes < 0:
        raise FoldError(f"head_keep_bytes={keep_bytes!r}: how many bytes of the softmax to keep, 0 or more")
    if head == "plain":
        raise FoldError(f"head_keep_bytes={keep_bytes} with head='plain', which keeps all logits: give one of them")


def refuse_data(data: object) -> None:
    """Raise for ``data=`` that is none."""
    if data not in get_args(Data):
        raise FoldError(f"data={data!r}: one of {', '.join(map(repr, get_args(Data)))}")


def refuse_folded(model: nn.Module) -> None:
    """Raise for a model that is folded already, or has a module that is."""
    for name, module in model.named_modules():
        if vars(module).get(FOLD_PARAM) is not None:
            raise FoldError(f"{name or 'the model'}: is folded already; call remove() on that fold first")


def refuse_several(
    optimizer: RuleOptimizer | Several, named: Mapping[str, nn.Parameter], working_set: object, ranks: object
) -> None:
    """Raise for several optimizers that have a parameter in common, or in a fold that takes only one.

    Args:
        optimizer: the optimizer, or several as one.
        named: all parameters of the model.
        working_set: the fold's, or None.
        ranks: those that step together, or None.
    """
    if not isinstance(optimizer, Several):
        return
    names = {id(param): name for name, param in named.items()}
    owners: dict[int, int] = {}
    for index, member in enumerate(optimizer.members):
        for param in (param for group in member.groups for param in group["params"]):
            first = owners.setdefault(id(param), index)
            if first != index:
                kinds = [type(optimizer.members[one]).__name__ for one in (first, index)]
                raise FoldError(
                    f"{names.get(id(param), f'a parameter of shape {tuple(param.shape)}')}: is in two of the "
                    f"optimizers, optimizer[{first}] ({kinds[0]}) and optimizer[{index}] ({kinds[1]}), and would step "
                    "twice; leave it out of one of them"
                )
    kinds = " and ".join(type(member).__name__ for member in optimizer.members)
    what = None if working_set is None else "working_set="
    if ranks is not None:
        what = "many ranks"
    if what is not None:
        raise FoldError(
            f"several optimizers ({kinds}) with {what}: give one, with param_groups of its own for each kind of "
            'parameter; gradfold.Muon takes {"params": ..., "rule": "adamw"} for those that AdamW shall step'
        )


def refuse_parameters(
    named: Mapping[str, nn.Parameter], in_optimizer: Collection[int], optimizer: RuleOptimizer | Several
) -> None:
    """Raise for parameters that cannot be folded, and where those of the model are not those of the optimizer.

    Args:
        named: all parameters of the model.
        in_optimizer: ids of the optimizer's parameters.
        optimizer: the optimizer.
    """
    refuse_other_model(named, in_optimizer)
    for name, param in named.items():
        if param.requires_grad and id(param) not in in_optimizer:
            raise FoldError(outside(name))
        if param.requires_grad:
            refuse_owned(name, param)
            refuse_parameter(name, param)
    _refuse_overlap(named)
    in_model = {id(param) for param in named.values()}
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if id(param) not in in_model:
                raise FoldError(
                    f"optimizer.param_groups[{index}] has a parameter of shape {tuple(param.shape)} that is not in the "
                    "model, so no folded backward would step it; give it an optimizer of its own"
                )


def refuse_working_set(working_set: object, clip: Clip, replicas: Replicas | None = None) -> None:
    """Raise for ``working_set=`` that is none, or does not go with ``clip=`` or with how replicas keep states."""
    if working_set is not None and not isinstance(working_set, WorkingSet):
        raise FoldError(f"working_set={working_set!r}: give a gradfold.WorkingSet, e.g. WorkingSet(chunks=8)")
    if working_set is not None and clip == "delayed":
        raise FoldError(
            "clip='delayed' with working_set=: the last step's norm may be another chunk's; use clip='exact' or "
            "'two_pass'"
        )
    if working_set is not None and replicas is not None and replicas.own_states:
        raise FoldError(
            "working_set= with gradfold.replicate(own_states=True): slices are cut from whole weights, of which each "
            "rank steps its own rows here; leave out one of them"
        )


def refuse_stream(
    stream: object, optimizer: RuleOptimizer | Several, ranks: Ranks | None, sharding: Sharding | None
) -> None:
    """Raise for ``stream=`` that is none, or together with what moves weights itself."""
    if stream is None:
        return
    if not isinstance(stream, Stream):
        raise FoldError(f"stream={stream!r}: give a gradfold.Stream, e.g. Stream(offload='cpu')")
    if ranks is not None or sharding is not None:
        raise FoldError(
            "stream= on many ranks: weights that are spread over processes, or copied to them, do not stream; fold on "
            "one process, or leave stream= out"
        )
    if any(group.get("capturable") for group in optimizer.groups):
        raise FoldError(
            "stream= with capturable=True: a captured CUDA graph would not wait for the copies; leave capturable out"
        )


def _refuse_overlap(named: Mapping[str, nn.Parameter]) -> None:
    """Raise for two parameters in the same memory: the first to step would change the other during its backward."""
    spans: dict[int, list[tuple[int, int, str, bool]]] = {}
    for name, whole in named.items():
        param = held(whole)
        if param.numel():
            first = int(param.storage_offset())
            last = first + sum((int(n) - 1) * int(k) for n, k in zip(param.shape, param.stride(), strict=True))
            spans.setdefault(_torch.storage_key(param), []).append((first, last, name, whole.requires_grad))
    for shared in spans.values():
        shared.sort()
        for (_, end, a, trained), (start, _, b, also) in itertools.pairwise(shared):
            if start <= end and (trained or also):
                raise FoldError(
                    f"{b}: shares its memory with {a} but is another Parameter, so each would step the other's values; "
                    "tie them by assigning the same Parameter to both"
                )


def refuse_parts(optimizer: RuleOptimizer | Several, working_set: object, ranks: object, sharding: object) -> None:
    """Raise where an optimizer would step parts of parameters that it cannot step, or not reach all of a weight."""
    for one in optimizer.members:
        if isinstance(one, AdamWScheduleFree):
            _refuse_out_of_reach(one, working_set, ranks, sharding)
    whole = [one for one in optimizer.members if any(isinstance(one.rule_of(group), WholeRule) for group in one.groups)]
    if not whole:
        return
    name = type(whole[0]).__name__
    if working_set is not None:
        raise FoldError(
            f"working_set= with {name}, which needs the whole gradient of a parameter: a slice has other statistics; "
            "leave out working_set=, or use gradfold.AdamW"
        )
    if ranks is not None or sharding is not None:
        raise FoldError(
            f"{name} on several ranks: it needs the whole gradient of a parameter, and a rank steps a part of it; use "
            "gradfold.AdamW, or train on one rank"
        )


def _refuse_out_of_reach(optimizer: AdamWScheduleFree, working_set: object, ranks: object, sharding: object) -> None:
    """Raise where ``optimizer.eval()`` could not find the average of every weight."""
    if ranks is not None or sharding is not None:
        raise FoldError(
            "AdamWScheduleFree on several ranks: optimizer.eval() and train() move whole weights, and a rank has "
            "a part of their states; use gradfold.AdamW, or train on one rank"
        )
    if not isinstance(working_set, WorkingSet):
        return
    if working_set.states == "reset":
        raise FoldError(
            "WorkingSet(states='reset') with AdamWScheduleFree: a chunk that goes to sleep would lose z, and with it "
            "the average that optimizer.eval() looks for; use states='keep'"
        )
    if masters := [group["master"] for group in optimizer.groups if group.get("master") is not None]:
        raise FoldError(
            f"working_set= with AdamWScheduleFree(master={masters[0]!r}): optimizer.eval() would have to change "
            "masters that sleep; leave out one of them"
        )
