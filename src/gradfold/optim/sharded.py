"""States of parameters that are spread over ranks: plain local tensors in ``optimizer.state``, DTensors in state_dicts.

The engine steps what this rank holds, with states that are plain tensors of that size. A checkpoint must know of what
they are parts. So ``state_dict()`` shows every state but the counters as a DTensor, placed as its parameter is, and
``load_state_dict()`` takes those of any placement, and whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from gradfold.codecs import WEIGHT, Codec, matrix
from gradfold.engine import (
    FoldState,
    Region,
    allocate,
    as_dtensor,
    held,
    how_spread,
    is_spread,
    part_here,
    placed_alike,
    whole_shape,
)
from gradfold.engine.storage import STEP, Storage, stored_otherwise
from gradfold.errors import FoldError
from gradfold.rules import Group, Rule

from .slices import named
from .upgrade import upgraded

States = Mapping[str, Any]


def spread(param: Parameter, states: States, storage: Storage, rule: Rule) -> dict[str, Any]:
    """Return this rank's states of a parameter that is spread over ranks as DTensors; counters stay plain.

    Args:
        param: The parameter, a DTensor.
        states: Its states by key, also those of slices.
        storage: How the group stores weight and states.
        rule: The optimizer's rule.
    """
    codecs: dict[str, Codec | None] = {WEIGHT: storage.weight}
    codecs |= dict(zip((spec.name for spec in storage.specs), storage.codecs, strict=True))
    counters = storage.counters(rule)
    found: dict[str, Any] = {}
    for key, value in states.items():
        plain, bracket, rest = key.partition("[")
        name, _, part = plain.partition(".")
        if name in counters or not isinstance(value, Tensor):
            found[key] = value
            continue
        shape = whole_shape(param, Region.parse(bracket + rest))
        assert shape is not None  # a working set refuses such a cut
        if part:
            codec = codecs.get(name)
            kinds = codec.parts(shape) if codec is not None else {}
            if part not in kinds:
                raise FoldError(stored_otherwise(name, key))
            shape = kinds[part].shape
        found[key] = as_dtensor(param, value, shape)
    return found


def collected(param: Parameter, states: States) -> tuple[States, bool]:
    """Return saved states as plain tensors: this rank's parts if they are placed as the parameter is, else whole ones.

    Args:
        param: The parameter.
        states: Its saved states by key; DTensors, or whole tensors.

    Returns:
        The states, and whether they are whole.

    Raises:
        ValueError: A plain tensor is not whole, or states of slices are of another mesh.
    """
    if not is_spread(param):
        return {key: value.full_tensor() if is_spread(value) else value for key, value in states.items()}, True
    dtensors = [value for value in states.values() if is_spread(value)]
    if dtensors and all(
        placed_alike(param, value) if is_spread(value) else not _has_size(value) for value in states.values()
    ):
        _refuse_other_shapes(param, states)
        return {key: value.to_local() if is_spread(value) else value for key, value in states.items()}, False
    for key, value in states.items():
        if "[" in key and _has_size(value):
            raise ValueError(
                f"state {key!r} is of a slice of what a rank held on another mesh; here the parameter is cut along "
                f"{how_spread(param) or 'no dimension'}. A working set that slices tensors goes on only on the mesh it "
                "was saved on, with by='layer' on any"
            )
    whole = {key: value.full_tensor() if is_spread(value) else value for key, value in states.items()}
    _refuse_other_shapes(param, whole)
    return whole, True


def _has_size(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _refuse_other_shapes(param: Parameter, states: States) -> None:
    """Raise ValueError, on all ranks alike, for states that are not those of the whole parameter."""
    lead = matrix(param.shape).lead
    for key, value in states.items():
        if "[" in key or not _has_size(value):
            continue
        name, _, part = key.partition(".")
        fits = tuple(value.shape) == tuple(param.shape)
        if part and name != WEIGHT:
            fits = tuple(value.shape[:-1]) == lead
        if not fits:
            kind = "" if is_spread(value) else ", a plain tensor,"
            raise ValueError(
                f"state {key!r}{kind} has shape {tuple(value.shape)} for a parameter of shape {tuple(param.shape)} cut "
                f"along {how_spread(param) or 'no dimension'}: give it as a DTensor, as state_dict() does, or whole"
            )


def read_states(
    saved: Mapping[Parameter, States],
    theirs: Sequence[Group],
    groups: Sequence[Group],
    rule_of: Callable[[Group], Rule],
) -> tuple[dict[Parameter, Any], str | None]:
    """Return saved states in today's format, as plain tensors of what this rank holds, and a warning to give.

    Args:
        saved: Saved states by parameter; they are not changed.
        theirs: The saved param_groups.
        groups: The param_groups that they become.
        rule_of: Returns the rule of a group.

    Raises:
        ValueError: Of a parameter that is spread over ranks, as ``collected`` raises it.
    """
    found: dict[Parameter, Any] = {}
    whole: set[int] = set()
    for param, states in saved.items():
        found[param], is_whole = collected(param, states)
        if is_whole and is_spread(param):
            whole.add(id(param))

    def shape_of(param: Parameter) -> tuple[int, ...]:
        return tuple(param.shape if id(param) in whole else held(param).shape)

    found, said = upgraded(found, theirs, groups, rule_of, shape_of)
    return {p: parts_here(p, states) if id(p) in whole else states for p, states in found.items()}, said


def initial_states(fold: FoldState, param: Parameter) -> dict[str, Any]:
    """Return the states that a parameter does not have yet, as they will begin, on many ranks.

    A distributed checkpoint loads no more than its target has, which may be the state_dict of a fold that has not
    stepped. So that nothing is lost then, all state_dicts of a fold have the same keys.
    """
    found: dict[str, Any] = {}
    member = fold.params[id(param)]
    known = fold.optimizer.state.get(param, {})
    for one in member.slices:
        if one.key(STEP) in known:  # where it is 0, it tells that the others have not begun
            found |= {one.key(key): value for key, value in one.lazy.items()}
    optimizer: Any = fold.optimizer
    for one in () if fold.turns is None else fold.turns.unborn(param):  # slices that have not been awake
        states: dict[str, Any] = {}
        lazy: dict[str, Tensor] = {}
        allocate(one.view, states, optimizer.rule_of(member.group), member.group, lazy, one.stream, one.place)
        found |= named({**states, **lazy} if STEP in states else states, one.region)
    return found


def begins_lazily(states: dict[str, Any], storage: Storage, rule: Rule) -> dict[str, Any]:
    """Return the states without those that begin with the first step, if they are as ``initial_states`` shows them."""
    lazy = {spec.name for spec in storage.specs if spec.lazy}
    if not lazy or STEP in rule.counters or STEP not in states or float(states[STEP]):
        return states
    return {key: value for key, value in states.items() if key.partition(".")[0] not in lazy}


def parts_here(param: Parameter, states: States) -> dict[str, Any]:
    """Return this rank's parts of whole states."""
    return {key: part_here(param, value) if isinstance(value, Tensor) else value for key, value in states.items()}
