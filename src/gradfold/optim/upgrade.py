"""Quantized states as they come into ``load_state_dict``: of an earlier format, or of another form than is asked for.

``state_dict()`` adds two keys to each param_group that gives options of storage: ``format``, the number of
``gradfold.codecs.formats``, and ``gradfold``, the version that wrote it. In memory everything is of today's format, and
groups do not have these keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradfold._version import __version__
from gradfold.codecs import FORMAT, STATES, WEIGHT, Codec, Parts, Plain, written_by
from gradfold.engine import Region, held
from gradfold.engine.storage import OPTIONS, Storage, storage_of
from gradfold.errors import FoldError, FormatError
from gradfold.rules import Group, Rule

from .convert import decoded, panes

NUMBER, WRITER = "format", "gradfold"
_BOUNDS = {"int8": "3.9%", "int4": "18.4%"}  # of a root; tests/optim/test_formats.py measures them

States = dict[str, Any]


def stamped(group: Group) -> dict[str, Any]:
    """Return a param_group for ``state_dict()``: with format and version, if it gives an option of storage."""
    return {**group, NUMBER: FORMAT, WRITER: __version__} if group.keys() & OPTIONS.keys() else dict(group)


def unstamped(group: dict[str, Any]) -> dict[str, Any]:
    """Return a param_group without the keys that ``stamped`` adds; itself if it has none."""
    return {k: v for k, v in group.items() if k not in (NUMBER, WRITER)} if {NUMBER, WRITER} & group.keys() else group


def refuse_newer(groups: Iterable[Group]) -> None:
    """Raise FormatError for groups of a format that this gradfold does not read."""
    for index, group in enumerate(groups):
        number = group.get(NUMBER, FORMAT)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise FormatError(f"param_groups[{index}] has {NUMBER}={number!r}: a number from 1 to {FORMAT}")
        if number > FORMAT:
            writer = group.get(WRITER, "of a later version")
            raise FormatError(
                f"param_groups[{index}] has {NUMBER}={number}: gradfold {writer} wrote it, and this gradfold "
                f"{__version__} reads formats 1 to {FORMAT}; load it with that gradfold, and take torch_state_dict() "
                "there to go on here"
            )


def refuse_cast(states: Iterable[Any]) -> None:
    """Raise FoldError for codes and residuals that torch's own ``load_state_dict`` has cast to the weight's dtype."""
    for one in states:
        for key, value in one.items() if isinstance(one, Mapping) else ():
            part = str(key).partition(".")[2].partition("[")[0]
            if part in ("codes", "residual") and isinstance(value, Tensor) and value.is_floating_point():
                raise FoldError(
                    f"state {key!r} has become {value.dtype}: torch.optim.Optimizer.load_state_dict casts states to "
                    "the weight's dtype, and these are codes; call optimizer.load_state_dict(...)"
                )


def _shape_here(param: Parameter) -> tuple[int, ...]:
    return tuple(held(param).shape)


def upgraded(
    saved: Mapping[Any, Mapping[str, Any]],
    theirs: Sequence[Group],
    ours: Sequence[Group],
    rule_of: Callable[[Group], Rule],
    shape_of: Callable[[Parameter], tuple[int, ...]] = _shape_here,
) -> tuple[dict[Any, States], str | None]:
    """Convert states of an earlier format, and decode quantized states whose group asks for another form.

    Args:
        saved: Saved states by parameter; they are not changed. Sliced states are converted slice by slice.
        theirs: The saved param_groups, which ``refuse_newer`` has seen.
        ours: The param_groups that they become.
        rule_of: Returns the rule of a group.
        shape_of: Returns the shape of the parameter that its states fit; by default, of what this rank holds of it.

    Returns:
        The states by parameter, and a warning about what differs from before; None if nothing does. What does not fit
        its parameter is left as it is, for ``place`` to refuse.
    """
    found: dict[Any, States] = {}
    converted: set[tuple[int, str, str]] = set()  # parameter, name of a state, states=
    random = False
    for their, our in zip(theirs, ours, strict=True):
        present = [param for param in our["params"] if saved.get(param)]
        number = _format_of(their, (saved[param] for param in present))
        for param in present:
            found[param] = dict(saved[param])
            if number < FORMAT or any("." in key for key in saved[param]):
                storage = storage_of(param, rule_of(our), our)
                random |= number < FORMAT and any(storage.random)
                found[param], names = _converted(shape_of(param), found[param], storage, their.get("states"))
                converted |= {(id(param), name, kind) for name, kind in names}
    return found, _warning(converted, random)


def _format_of(group: Group, states: Iterable[Mapping[str, Any]]) -> int:
    """Return a saved group's format. Format 1 wrote no number, nor does a group that does not depend on any."""
    if NUMBER in group:
        return group[NUMBER]
    stored = group.keys() & OPTIONS.keys() or any("." in key for one in states for key in one)
    return 1 if stored else FORMAT


def _converted(
    whole: tuple[int, ...], saved: States, storage: Storage, states: Any
) -> tuple[States, list[tuple[str, str]]]:
    """Convert one parameter's states; also return the names of those whose format changes, and their ``states=``."""
    asked = {spec.name: (spec, codec) for spec, codec in zip(storage.specs, storage.codecs, strict=True)}
    made, changed = dict(saved), []
    for name, region, keys in _quantized(saved):
        if name not in asked or (shape := _shape(whole, region)) is None:
            continue
        spec, codec = asked[name]
        parts = {part: saved[key] for part, key in keys.items()}
        fitting = {
            kind: both[not spec.signed] for kind, both in STATES.items() if _fits(both[not spec.signed], parts, shape)
        }
        kind = next((kind for kind, one in fitting.items() if one is codec), states)
        if kind not in fitting and len(fitting) == 1:
            (kind,) = fitting
        if kind not in fitting:
            continue
        stored = fitting[kind]
        old = written_by(stored, 1)
        if old is not stored and _powers_of_two(parts["scales"]):
            old = stored
        if stored is not codec and name + region not in saved:
            for key in keys.values():
                del made[key]
            made[name + region] = decoded(old, parts, shape)
        elif stored is codec and old is not stored:
            made |= {keys[part]: value for part, value in _recoded(old, stored, parts, shape).items()}
            changed.append((name, kind))
    return made, changed


def _powers_of_two(scales: Tensor) -> bool:
    """Return whether these scales of second moments may be of format 2, whatever number stands beside them.

    The number can be lost or wrong: ``torch.distributed.checkpoint`` drops it from flattened groups, and leaves its own
    in a target that is loaded partially. A scale of format 1 is one by chance only, and then its codes mean the same.
    """
    if hasattr(scales, "fake_mode"):  # a fake tensor has no values
        return True
    mantissa = scales.view(torch.int32) & 0x7FFFFF
    return not bool(mantissa.any())


def _quantized(saved: States) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield each state that is stored in parts: its name, its region as a suffix, and its keys by part."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key in saved:
        plain, bracket, rest = key.partition("[")
        name, dot, part = plain.partition(".")
        if dot and name != WEIGHT:
            found.setdefault((name, bracket + rest), {})[part] = key
    for (name, region), keys in found.items():
        yield name, region, keys


def _shape(whole: tuple[int, ...], text: str) -> tuple[int, ...] | None:
    """Return the shape of a slice, by the suffix of its states' names; None if the parameter has no such slice."""
    if not text:
        return whole
    region = Region.parse(text)
    if region is None or region.dim >= len(whole):
        return None
    start, stop = region.within(whole[region.dim])
    return tuple(stop - start if dim == region.dim else n for dim, n in enumerate(whole))


def _fits(codec: Codec, parts: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    if isinstance(codec, Plain) or (kinds := codec.parts(shape)).keys() != parts.keys():
        return False
    return all(
        isinstance(part, Tensor) and tuple(part.shape) == kinds[name].shape and part.dtype == kinds[name].dtype
        for name, part in parts.items()
    )


@torch.no_grad()
def _recoded(old: Codec, new: Codec, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Parts:
    """Decode by one codec and encode by another, to nearest."""
    made = new.allocate(shape, next(iter(parts.values())).device)
    before = old.rows_of({name: part.contiguous() for name, part in parts.items()}, shape)
    after = new.rows_of(made, shape)
    for rows, columns in panes(shape):
        tile = old.decode(old.view(before, columns, rows), columns)
        for name, fresh in new.encode(tile).items():
            new.view(after, columns, rows)[name].copy_(fresh)
    return made


def _warning(converted: set[tuple[int, str, str]], random: bool) -> str | None:
    """Return what to say of states of format 1; None if none changes, and no bits are drawn for them."""
    said = []
    if converted:
        names = ", ".join(sorted({name for _, name, _ in converted}))
        bounds = " and ".join(f"{_BOUNDS[kind]} ({kind})" for kind in sorted({kind for *_, kind in converted})[::-1])
        said.append(
            f"{len(converted)} of them ({names}) are converted to format {FORMAT}, once, rounded to nearest: their "
            f"roots change by at most {bounds}, and by up to 41% at the lowest level, which stands for all that is less"
        )
    if random:
        said.append(
            "stochastic rounding draws other bits than that gradfold's, so training goes on exactly, but not bit for "
            "bit as it would have there"
        )
    if not said:
        return None
    return f"optimizer states of format 1 (an earlier gradfold's, which wrote no number): {'; '.join(said)}"
