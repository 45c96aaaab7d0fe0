"""A kernel that has been loaded, and a kernel bound to one parameter.

Binding works out pointers, strides and widths once, so that a step costs little Python. A call hands ``products.c`` the
terms of the gradient; it computes a few rows at a time, measures and changes them, and has the generated kernel step
the same rows of the weight and its states.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.codecs import BLOCK, Stream

from .program import Program, scalars
from .threads import Share, cut, over_threads, shares_of

Product = tuple[Tensor, Tensor]  # left [T, R] and right [T, C]: the gradient left.T @ right
Room = tuple[int, int, int]  # floats of scratch memory a share, floats packed at a time, shares at most
Gather = tuple[Tensor, Tensor]  # ids int64 [N] and grad [N, C]: row ids[i] of the gradient gets grad[i]

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of a term's elements, as in products.c
_STEP, _MEASURE, _GUARDED = 0, 1, 2
_CERTAIN = 1e37  # a gradient bounded by less, give or take rounding errors, has no infinity; as in products.c
_NONE = (0, 0, 0)  # no gradient
_NO_TERMS = (0, 0)  # neither products nor gathers


class Kernel:
    """Decode, rule, encode, for one rule with one set of codecs and guards.

    The kernel holds while ``holds(numbers)``; ``kernel()`` in ``__init__.py`` finds the right one.
    """

    def __init__(self, program: Program, source: str, library: Any, products: Any):
        self.source = source  # of the C it was compiled from
        self.holds = program.guards.compile()
        self.codecs = [stored.codec for stored in program.tensors]
        self.blocked = program.blocked
        self.random = [i for i, stored in enumerate(program.tensors) if stored.words is not None]
        self.at = ctypes.cast(library.gradfold_rows, ctypes.c_void_p).value
        self.functions = _functions(products)
        sources = [scalar.source for scalar in scalars(program)]
        self._scalars: Callable[[Any], tuple] = eval(f"lambda n: ({''.join(f'{source}, ' for source in sources)})")
        self._last: tuple[Any, array] = None, array("f")

    def takes(self, numbers: Any) -> bool:
        """Whether the kernel holds for a step's numbers; asked once for all parameters that share them."""
        return self._last[0] is numbers or self.holds(numbers)

    def inputs(self, numbers: Any) -> array:
        """What the kernel reads of a step's numbers, rounded to fp32 as torch would; kept for the last ones."""
        if self._last[0] is not numbers:
            self._last = numbers, array("f", self._scalars(numbers))
        return self._last[1]

    def __call__(
        self,
        weight: Mapping[str, Tensor],
        states: Sequence[Mapping[str, Tensor]],
        grad: Tensor,
        numbers: Any,
        keys: Sequence[Tensor | None],
        first_offset: int,
        row_stride: int,
    ) -> None:
        """Step a tile in place, without keeping anything.

        weight, states: 2-D views of parts (``codec.view(codec.rows_of(...))``), whose rows may lie apart.
        grad: fp32 ``[rows, columns]``, rows as well; only read.
        numbers: of this step (``rule.advance``); those the kernel was made for, or others its guards admit.
        keys: for the weight and each state the int32 ``[2]`` of ``stream_key`` of one parameter; None where nothing is
        rounded at random.
        first_offset, row_stride: element ``[r, c]`` is number ``first_offset + r * row_stride + c`` of its parameter.

        Raises:
            ValueError: a tensor of another shape, dtype, device or layout.
        """
        if grad.dtype != torch.float32:
            raise ValueError(f"grad: {grad.dtype}, where torch.float32 is needed")
        words = [_words(keys[i], i) for i in self.random]
        if any(shared != words[0][0] for shared, _ in words):
            raise ValueError("keys: those of one parameter share their first word")
        nowhere, streams = (lambda numbers: None), [None] * len(self.codecs)
        bound = Bound(
            self, nowhere, (weight, *states), streams, (grad.shape[0], grad.shape[1]), first_offset, row_stride
        )
        if words:
            bound.take([words[0][0], *(own for _, own in words)])
        bound(numbers, grad=grad)


class Bound:
    """A kernel with the weight and the states it steps, whose memory stays where it is. For one thread at a time."""

    def __init__(
        self,
        kernel: Kernel,
        find: Callable[[Any], Kernel | None],
        parts: Sequence[Mapping[str, Tensor]],
        streams: Sequence[Stream | None],
        shape: tuple[int, int],
        first_offset: int,
        row_stride: int,
        scratch: Callable[[int], Tensor] | None = None,
        limit_bytes: float = math.inf,
    ):
        """See ``native.bind``; ``find`` gives the kernel of other numbers than the first."""
        self.kernel, self.shape = kernel, shape
        self._find = find
        self._scratch = scratch or _own_scratch
        arguments, self._written = [first_offset, row_stride], []
        for codec, one in zip(kernel.codecs, parts, strict=True):
            for name, (width, dtype) in codec.widths(shape[1]).items():
                arguments += _place(one[name], shape[0], width, dtype, name)
                self._written.append(one[name])
        self._joins = not kernel.blocked and row_stride == shape[1] and {*arguments[3::2]} == {shape[1]}
        self._arguments = array("q", arguments)
        self._arguments_at = self._arguments.buffer_info()[0]
        self._words = array("i", _shared(streams, kernel.random))
        self._keys = array("i", self._words)
        self._words_at, self._keys_at = self._words.buffer_info()[0], self._keys.buffer_info()[0]
        self._draw: int | None = None
        self._inputs_at = 0
        self._numbers: Any = None
        self._limit_bytes = limit_bytes
        self._rooms: dict[tuple[int, int, int], Room | None] = {}  # by tokens, columns and shares
        self._make_room(1, 0)

    def _make_room(self, products: int, gathers: int) -> None:
        """For the arguments of a call with so many of them."""
        form = struct.Struct(f"={_CALL}{_PRODUCT * products}{_GATHER * gathers}")
        self._call = ctypes.create_string_buffer(form.size)
        self._call_at = ctypes.addressof(self._call)
        self._pack, self._layout = form.pack_into, (products, gathers)

    def ready(self, numbers: Any) -> bool:
        """Whether there is a kernel for a step's numbers. One object is one step's: it is looked at once."""
        if numbers is self._numbers:
            return True
        if not self.kernel.takes(numbers):
            found = self._find(numbers)
            if found is None:
                return False
            self.kernel = found
        self._inputs, self._numbers = self.kernel.inputs(numbers), numbers
        self._inputs_at = self._inputs.buffer_info()[0]
        return True

    def _draws(self, draw: int) -> None:
        """Make the keys of a step's random bits."""
        self.kernel.functions.keys(self._words_at, len(self._words), draw, self._keys_at)
        self._draw = draw

    def take(self, keys: Sequence[int]) -> None:
        """Take these keys."""
        self._keys = array("i", keys)
        self._keys_at = self._keys.buffer_info()[0]

    def __call__(
        self,
        numbers: Any,
        products: Sequence[Product] = (),
        grad: Tensor | None = None,
        gathers: Sequence[Gather] = (),
        *,
        draw: int = 0,
        scale: float | Tensor = 1.0,
        clip_value: float | None = None,
        start: int = 0,
        stop: int | None = None,
        guarded: bool = False,
    ) -> float:
        """Step rows ``[start, stop)`` in place; their gradient is the sum of all terms.

        Args:
            numbers: of this step (``rule.advance``).
            products: pairs of left ``[T, stop - start]`` and right ``[T, columns]`` whose columns are adjacent; fp32,
                bf16 or fp16, summed in fp32.
            grad: ``[stop - start, columns]``, likewise; only read.
            gathers: pairs of ids ``[N]`` (int64) and grad ``[N, columns]``: row ``start + ids[i]`` gets ``grad[i]``.
                Ids of other rows are passed over.
            draw: which random bits, where any round: the ``step`` of the streams.
            scale: multiplies the gradient.
            clip_value: then bounds the magnitude of its elements.
            start: the first row that steps.
            stop: the row after the last; None: all of them.
            guarded: nothing moves where an element of the gradient is not finite.

        Returns:
            The sum of squares of the gradient before scale and clip_value; not finite if an element is not.

        Raises:
            ValueError: a tensor of another shape, dtype or layout, or numbers for which nothing is ``ready``.
        """
        if numbers is not self._numbers and not self.ready(numbers):
            raise ValueError("numbers: there is no kernel for them")
        if draw != self._draw and self._words:
            self._draws(draw)
        scale = float(scale)
        shares = self._prepared(products, grad, gathers, scale, clip_value, start, stop)
        if not guarded:
            squares = self._run(_STEP, shares)
        elif len(shares) == 1:
            squares = self._run(_GUARDED, shares)
        else:
            certain = self.kernel.functions.bound(self._call_at) * max(1.0, abs(scale)) < _CERTAIN
            squares = self._run(_STEP, shares) if certain else -1.0
        if squares < 0:  # the operands are too large to tell
            squares = self._run(_MEASURE, shares)
            if not math.isfinite(squares):
                return squares
            squares = self._run(_STEP, shares)
        _torch.increment_version(self._written)  # a graph that saved the old weight is stale
        return squares

    def fits(self, tokens: int) -> bool:
        """Whether the scratch memory holds a tile of a gradient of so many tokens, in one share at least."""
        return self._room(tokens, self.shape[1], 1) is not None

    def _room(self, tokens: int, columns: int, shares: int) -> Room | None:
        """Scratch memory of each of so many shares, or of fewer, within the limit; less is packed at a time for it."""
        key = tokens, columns, shares
        if key not in self._rooms:
            self._rooms[key] = None
            for packed in (1 << 20, 1 << 18, 1 << 16, 1 << 14, BLOCK):
                floats = self.kernel.functions.scratch(tokens, columns, packed)
                most = int(min(shares, self._limit_bytes / (4 * floats)))
                if most and (most == shares or packed == BLOCK):
                    self._rooms[key] = floats, packed, most
                    break
        return self._rooms[key]

    def measure(
        self,
        products: Sequence[Product] = (),
        grad: Tensor | None = None,
        gathers: Sequence[Gather] = (),
        start: int = 0,
        stop: int | None = None,
    ) -> float:
        """Return the sum of squares of such a gradient; nothing is stepped."""
        return self._run(_MEASURE, self._prepared(products, grad, gathers, 1.0, None, start, stop))

    def _prepared(
        self,
        products: Sequence[Product],
        grad: Tensor | None,
        gathers: Sequence[Gather],
        scale: float,
        clip_value: float | None,
        start: int,
        stop: int | None,
    ) -> Sequence[Share]:
        """Write the arguments of a call; its shares."""
        rows, columns = self.shape
        if start or stop is not None:
            rows = (rows if stop is None else stop) - start
            if not 0 <= start <= start + rows <= self.shape[0]:
                raise ValueError(f"rows {start}:{stop} of {self.shape[0]}")
        fields, depth = [], 0
        for left, right in products:
            tokens = left.shape[0]
            fields += (tokens, *_matrix(left, tokens, rows, "left"), *_matrix(right, tokens, columns, "right"))
            depth += tokens
        if gathers:
            self._sorted = [ids.sort(stable=True) for ids, _ in gathers]  # C reads them: they live until the next call
            for (ids, rows_of), (values, order) in zip(gathers, self._sorted, strict=True):
                if ids.dtype != torch.int64 or ids.dim() != 1:
                    raise ValueError(f"ids: {ids.dtype} {list(ids.shape)}, where torch.int64 [N] is needed")
                found = _matrix(rows_of, len(ids), columns, "grad of ids")
                fields += (len(ids), values.data_ptr(), order.data_ptr(), *found)
        given = _NONE if grad is None else _matrix(grad, rows, columns, "grad")
        column, layout = 0, (len(products), len(gathers))
        if self._joins and layout == _NO_TERMS and (given[1] == columns or rows == 1):  # narrow rows are mostly padding
            rows, columns, start, column = 1, rows * columns, 0, start * columns
        shares = shares_of(rows, columns, depth)
        scratch_at = floats = packed = 0
        if layout != _NO_TERMS or scale != 1.0 or clip_value is not None or given[2] or grad is None:  # it needs a tile
            room = self._room(depth, columns, len(shares))
            if room is None:
                raise ValueError(f"scratch memory: {self._limit_bytes} bytes do not hold a tile; see ``fits``")
            floats, packed, fitting = room
            if fitting < len(shares):
                shares = cut(rows, columns, fitting)
            scratch_at = self._scratch(4 * floats * len(shares)).data_ptr()
        if layout != self._layout:
            self._make_room(*layout)
        kernel = (self.kernel.at, self._arguments_at, rows, columns, self._inputs_at, self._keys_at)
        most = math.inf if clip_value is None else clip_value
        self._pack(
            self._call, 0, *kernel, scratch_at, floats, packed, start, column, scale, most, *given, *layout, *fields
        )
        return shares

    def _run(self, mode: int, shares: Sequence[Share]) -> float:
        functions, call_at = self.kernel.functions, self._call_at
        if len(shares) == 1:
            return functions.whole(call_at, mode)
        return over_threads(lambda index, share: functions.step(call_at, mode, index, *share), shares)


_CALL = "9q2q2d3q2q"  # struct call
_PRODUCT = "q3q3q"  # struct product
_GATHER = "3q3q"  # struct gather


class Functions(NamedTuple):
    """Of ``products.c``."""

    step: Any
    whole: Any
    bound: Any
    scratch: Any
    keys: Any


def _functions(products: Any) -> Functions:
    """With the types of their arguments."""
    at, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    types = {
        "step": (number, at, *[count] * 6),
        "whole": (number, at, count),
        "bound": (number, at),
        "scratch": (count, count, count, count),
        "keys": (None, at, count, ctypes.c_uint32, at),
    }
    found = {name: getattr(products, f"gradfold_{name}") for name in types}
    for name, (result, *arguments) in types.items():
        found[name].restype, found[name].argtypes = result, arguments
    return Functions(**found)


def _place(t: Tensor, rows: int, width: int, dtype: torch.dtype, name: str) -> tuple[int, int]:
    """Where a matrix begins and how far its rows are apart, for C, which believes everything."""
    strides = t.stride()
    if t.dtype != dtype or t.shape != (rows, width) or not t.is_cpu or (strides[1] != 1 and width > 1):
        raise ValueError(
            f"{name}: {t.dtype} {list(t.shape)} with strides {strides} on {t.device}, where {dtype} "
            f"[{rows}, {width}] with adjacent columns on the CPU is needed"
        )
    at = t.data_ptr()
    if not at and rows and width:
        raise ValueError(f"{name}: a {type(t).__name__} without memory")
    return at, strides[0]


def _matrix(t: Tensor, rows: int, columns: int, name: str) -> tuple[int, int, int]:
    """As ``_place``, and the kind of its elements."""
    kind = KINDS.get(t.dtype)
    strides = t.stride()
    if kind is None or t.shape != (rows, columns) or not t.is_cpu or (strides[1] != 1 and columns > 1):
        raise ValueError(
            f"{name}: {t.dtype} {list(t.shape)} with strides {strides} on {t.device}, where fp32, bf16 or fp16 "
            f"[{rows}, {columns}] with adjacent columns on the CPU is needed"
        )
    return t.data_ptr(), strides[0], kind


def _shared(streams: Sequence[Stream | None], random: Sequence[int]) -> list[int]:
    """The words that the keys of a step are made of: one of the parameter, and one for each stream in use."""
    drawn = [stream for i in random if (stream := streams[i]) is not None]
    if any(stream.shared != drawn[0].shared for stream in drawn):
        raise ValueError("streams: those of one parameter share their first word")
    return [drawn[0].shared, *(stream.own for stream in drawn)] if drawn else []


def _words(key: Tensor | None, index: int) -> list[int]:
    if key is None or key.dtype != torch.int32 or key.shape != (2,) or not key.is_cpu or not key.is_contiguous():
        raise ValueError(f"keys[{index}]: give the int32 tensor [2] of stream_key, on the CPU")
    return key.tolist()


_local = threading.local()


def _own_scratch(size_bytes: int) -> Tensor:
    """This thread's scratch memory; it grows, and stays."""
    held = getattr(_local, "scratch", None)
    if held is None or held.nbytes < size_bytes:
        held = _local.scratch = torch.empty(size_bytes, dtype=torch.uint8)
    return held
