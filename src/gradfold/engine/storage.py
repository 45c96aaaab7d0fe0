"""How a parameter's weight and states are stored, by the options of its param_group.

The options:

    states      None (as torch: the weight's own dtype), "fp32", "bf16", "int8", "int4"; beside fp16 weights None means
                "fp32" for rules with second moments, whose squares fp16 cannot hold
    rounding    "nearest"; "stochastic"; None: stochastic for states and masters that ask for it, else to nearest
    master      None; "split8", "split16": the bits that bf16 drops are kept beside a bf16 weight
    small_size  parameters of fewer elements, and vectors (norms, biases), have fp32 states; 0: none of them

A state stored in several parts lies in ``optimizer.state[param]`` under ``exp_avg.codes`` and the like, a master's
residual under ``weight.residual``. A state that is one tensor of the weight's shape keeps torch's name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold.backends import VALUES, Place, Stored
from gradfold.codecs import WEIGHT, WEIGHTS, Codec, Plain, Split, Stream, dither, state_codec, stream_key, weight_codec
from gradfold.errors import FoldError
from gradfold.rules import Group, Rule, State

OPTIONS: dict[str, Any] = {"states": None, "rounding": None, "master": None, "small_size": 4096, "seed": 0}
ROUNDINGS = ("nearest", "stochastic")
STEP = "step"  # counted where random bits need it, whether or not the rule does


class Storage(NamedTuple):
    """The codecs of one parameter; where all are None, it is kept and rounded as torch does."""

    specs: tuple[State, ...]
    weight: Codec | None
    codecs: tuple[Codec | None, ...]  # of the states
    random: tuple[bool, ...]  # rounded stochastically: the weight, then the states
    fixed: bool  # the states' dtypes are the options' business; else a loaded state keeps its own
    dithered: bool = False  # new masters begin at random places within the rounding of their weights

    @property
    def frozen(self) -> list[str]:
        """Return the states that hardly ever move: second moments in few bits, rounded to nearest."""
        found = zip(self.specs, self.codecs, self.random[1:], strict=True)
        return [s.name for s, codec, random in found if not s.signed and codec and codec.stochastic and not random]

    def counters(self, rule: Rule) -> dict[str, float]:
        """Return the scalar states and the values they start from."""
        return {**({STEP: 0.0} if any(self.random) else {}), **rule.counters}

    def residuals(self) -> list[str]:
        """Return the keys of what is stored beside the weight."""
        return [] if self.weight is None else [key for key in keys_of(WEIGHT, self.weight).values() if key != WEIGHT]

    def describe(self, state: Mapping[str, Tensor]) -> str:
        """Return how the states are stored, in the words of the options."""
        kinds = [
            codec.name.partition(" ")[0] if codec is not None else str(state[spec.name].dtype).removeprefix("torch.")
            for spec, codec in zip(self.specs, self.codecs, strict=True)
        ]
        if self.weight is not None and self.residuals():
            kinds.append(self.weight.name)
        return " + ".join(dict.fromkeys(kinds))


def counter_dtype(name: str, rule: Rule) -> torch.dtype:
    """Return the dtype of a counter, as torch's optimizers choose it."""
    wide = torch.get_default_dtype() == torch.float64 or name in rule.exact_counters
    return torch.float64 if wide else torch.float32


def storage_of(param: Tensor, rule: Rule, group: Group, place: Place | None = None) -> Storage:
    """Return what the group's options mean for a parameter, or for a slice, which is stored as the whole would be.

    Raises:
        ValueError: an unknown name, or options that this weight or rule cannot have.
    """
    options = [group.get(name, default) for name, default in OPTIONS.items() if name != "seed"]
    shape = tuple(param.shape) if place is None else place.shape
    return _storage(shape, param.dtype, rule.states(group), *options)


@functools.lru_cache(maxsize=1 << 16)
def _storage(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    specs: tuple[State, ...],
    states: str | None,
    rounding: str | None,
    master: str | None,
    small_size: int,
) -> Storage:
    if rounding not in (None, *ROUNDINGS):
        raise ValueError(f"rounding={rounding!r}: one of {', '.join(map(repr, ROUNDINGS))}, or None")
    if not isinstance(small_size, int) or small_size < 0:
        raise ValueError(f"small_size={small_size!r}: a number of elements, 0 or more")
    if states is not None:
        state_codec(states, signed=True)  # raises for an unknown name, even where no state will have it
    if master is not None:
        weight_codec(torch.bfloat16, master)
    specs = tuple(spec for spec in specs if spec.kept_for(shape))
    as_torch = Storage(specs, None, (None,) * len(specs), (False,) * (1 + len(specs)), fixed=False)
    if dtype not in WEIGHTS:  # float64: as exact as it gets
        if states is not None or (master is not None and dtype.itemsize < 4):
            raise ValueError(
                f"states={states!r}, master={master!r}: codecs compute in fp32; a {dtype} weight needs None"
            )
        return as_torch
    weight = weight_codec(dtype, None if dtype == torch.float32 else master)  # an fp32 weight is its own master
    small = small_size > 0 and (len(shape) < 2 or math.prod(shape) < small_size)
    named = "fp32" if (small and states is not None) or (states is None and squares_in_fp16(dtype, specs)) else states
    codecs = [WEIGHTS[dtype] if named is None else state_codec(named, spec.signed) for spec in specs]
    if any((states, rounding, master, named)):  # a few numbers, which running means of small steps would not change
        codecs = [
            codec if spec.dims == "any" else WEIGHTS[torch.float32] for spec, codec in zip(specs, codecs, strict=True)
        ]
    for spec, codec in zip(specs, codecs, strict=True):
        if spec.exact and states is not None and codec is not WEIGHTS[torch.float32]:
            raise ValueError(
                f"states={states!r}: state {spec.name!r} must be fp32: {spec.exact}; use states='fp32'"
                f"{' (or centered=False)' if 'centered' in spec.exact else ''}"
            )
    codecs = [WEIGHTS[torch.float32] if spec.wide else codec for spec, codec in zip(specs, codecs, strict=True)]
    asked = rounding == "stochastic"
    random = (
        weight.stochastic and (asked or (rounding is None and master is not None)),
        *(codec.stochastic and (asked or (rounding is None and named is not None)) for codec in codecs),
    )
    same = all(isinstance(codec, Plain) and codec.dtype == dtype for codec in (weight, *codecs))
    if same and not any(random):
        return as_torch._replace(fixed=named is not None)
    dithered = isinstance(weight, Split) and rounding != "nearest"
    return Storage(specs, weight, tuple(codecs), random, fixed=named is not None, dithered=dithered)


def squares_in_fp16(dtype: torch.dtype, specs: Iterable[State]) -> bool:
    """Return whether second moments in this dtype would underflow.

    fp16 ends at 6e-8, which is the square of 2.4e-4: a smaller gradient has a second moment of 0, and its weight moves
    by a first moment that is divided by ``eps``, or by 0.
    """
    return dtype == torch.float16 and any(not spec.signed for spec in specs)


def keys_of(name: str, codec: Codec | None) -> dict[str, str]:
    """Return where the parts of a state lie in ``optimizer.state[param]``: part -> key."""
    parts = (VALUES,) if codec is None else tuple(codec.widths(1))
    return {part: name if part == VALUES else f"{name}.{part}" for part in parts}


def allocate_state(param: Tensor, spec: State, codec: Codec | None, start: float | None = None) -> dict[str, Tensor]:
    """Return new tensors of one state, by key; every element is ``start``, or what the state says."""
    start = spec.init if start is None else start
    if codec is None or isinstance(codec, Plain):  # the weight's own strides, as torch's optimizers
        dtype = param.dtype if codec is None else codec.dtype
        if spec.over is not None:
            return {spec.name: param.detach().new_full(spec.shape_for(param.shape), start, dtype=dtype)}
        values = torch.full_like(param, start, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        return {spec.name: values}
    parts = codec.allocate(param.shape, param.device, start)
    return {key: parts[part] for part, key in keys_of(spec.name, codec).items()}


def allocate_residuals(
    param: Tensor, storage: Storage, stream: str, seed: int, place: Place | None = None
) -> dict[str, Tensor]:
    """Return new tensors of what a master weight keeps beside its bf16 weight, by key.

    A master begins at a random place among the numbers that round to its bf16 weight. If it began at the weight itself,
    no weight of the model would change until its master had moved by half a unit in the last place, and then most would
    change at once: the model would train on gradients of where it was. Begun at random, the weights follow their
    masters in the mean from the first step on.
    """
    made = {}
    if isinstance(storage.weight, Split):
        for part, kind in storage.weight.parts(param.shape).items():
            if part != VALUES:
                made[keys_of(WEIGHT, storage.weight)[part]] = residual = torch.zeros(
                    kind.shape, dtype=kind.dtype, device=param.device
                )
                if storage.dithered:
                    key = stream_key(seed, 0, stream, part, param.device)
                    rows = None if place is None else place.row_stride(param.shape)
                    if place is None or rows is not None:
                        dither(residual, param, key, 0 if place is None else place.offset, rows)
                        continue
                    for index in range(param.shape[0]):  # a gap lies before the rows of the next
                        dither(residual[index], param[index], key, place.offset + index * place.stride)
    return made


def bind(
    param: Tensor,
    storage: Storage,
    state: Mapping[str, Tensor],
    stream: str,
    group: Group,
    place: Place | None = None,
    count: int | Tensor = 0,
) -> tuple[Stored, list[Stored]]:
    """Return the weight and its states as a backend takes them.

    Args:
        param: the weight, or the view of a slice of it.
        storage: how weight and states are stored.
        state: the states, by key.
        stream: the parameter's name in the streams of random bits.
        group: the parameter's param_group.
        place: where a slice lies in its parameter; None for a whole parameter.
        count: how many steps it has taken, with the one whose random bits are wanted; a stepper is told later.

    Raises:
        FoldError: a state is not stored as the group says, because one or the other was changed.
    """
    for spec in storage.specs:
        if spec.name in state and squares_in_fp16(state[spec.name].dtype, [spec]):
            raise FoldError(
                f"state {spec.name!r} is float16, in which the squares of gradients below 2.4e-4 are 0; load it by "
                f"optimizer.load_state_dict, which widens it, or replace it by state[{spec.name!r}].float()"
            )
    if storage.weight is None:
        return Stored.plain(param.detach()), [Stored.plain(state[spec.name]) for spec in storage.specs]
    seed = group.get("seed", 0)
    bound = []
    names = [WEIGHT, *(spec.name for spec in storage.specs)]
    for name, codec, random in zip(names, (storage.weight, *storage.codecs), storage.random, strict=True):
        assert codec is not None
        keys = keys_of(name, codec)
        parts = {part: param.detach() if key == WEIGHT else state[key] for part, key in keys.items()}
        if isinstance(codec, Plain) and parts[VALUES].dtype != codec.dtype:  # a loaded state that kept its dtype
            if storage.fixed:
                raise FoldError(stored_otherwise(name, parts[VALUES].dtype))
            codec = WEIGHTS[parts[VALUES].dtype]
        random = random and codec.stochastic
        random_stream = Stream.of(seed, count, stream, name) if random else None
        bound.append(Stored(parts, codec, random_stream, place))
    return bound[0], bound[1:]


def refuse_other_form(state: Mapping[str, Any], spec: State, keys: Iterable[str]) -> None:
    """Raise if this state exists in another form; a new one would silently start from its initial value."""
    others = [key for key in state if key.partition(".")[0] == spec.name and key not in set(keys)]
    if others:
        raise FoldError(stored_otherwise(spec.name, ", ".join(others)))


def stored_otherwise(name: str, found: object) -> str:
    """Return the message about a state that is stored otherwise than its group says."""
    return (
        f"state {name!r} is stored as {found}, not as its param_group's states= says; to convert, load this "
        "optimizer's torch_state_dict() into a new one made with the states= you want"
    )
