"""What tests change in Triton's interpreter: how it rounds, and what it does in vain.

Kernels say ``tl.fma`` where torch's own round once, and the bits of a state show which it was. Triton 3.6's interpreter
multiplies, rounds, adds and rounds again.

Most of the interpreter's time goes by in vain: with every call of a function by a kernel it redirects all of
``triton.language`` once more, with every sum of integers it prepares the message of an assertion that is off, and with
every tensor it derives anew what follows from its type.
"""

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """fp32 ``x * y + z``, rounded once.

    In fp64 the product of two fp32 numbers is exact, and the sum is rounded to odd: where it is not exact, to the
    neighbour whose last bit is set. From there, with more than two bits to spare, fp32's rounding is right (Boldo and
    Melquiond 2008).
    """
    with np.errstate(all="ignore"):
        product = x.astype(np.float64) * y.astype(np.float64)
        wide = z.astype(np.float64)
        total = np.asarray(product + wide)
        other = total - product
        error = (product - (total - other)) + (wide - other)  # Knuth's: exactly what the sum lost
        bits = total.view(np.int64)
        step = np.where((error > 0) == (total > 0), 1, -1)
        lost = ((error > 0) | (error < 0)) & (bits & 1 == 0) & np.isfinite(total)
        return np.where(lost, bits + step, bits).view(np.float64).astype(np.float32)


def create_fma(self, x, y, z):
    assert z.data.dtype == np.float32, "kernels compute in fp32"
    return interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)


def rounds_twice() -> bool:
    """Whether this interpreter's own does: (1 + 2^-12)^2 - 1 is 2^-11 + 2^-24, of which the product loses the end."""
    x, z = (interpreter.TensorHandle(np.array([v], np.float32), tl.float32) for v in (1 + 2.0**-12, -1.0))
    return bool(interpreter.interpreter_builder.create_fma(x, x, z).data[0] != 2.0**-11 + 2.0**-24)


_redirected: set[int] = set()  # by the names that a function sees


def call(self, *args, **kwargs):
    """``InterpretedFunction.__call__``, a kernel's call of a function. The launch itself has redirected ``tl``, and
    what Triton's own functions see besides stays redirected."""
    names = self.fn.__globals__
    if id(names) not in _redirected:
        interpreter._patch_lang(self.fn)
        _redirected.add(id(names))
    return self.rewrite()(*args, **kwargs)


_blocks: dict[tuple, dict] = {}  # what a block's type knows, by its elements and shape
_tensors: dict[str, dict] = {}  # what a tensor has besides its handle, by its type's name
_init_block, _init_tensor = tl.block_type.__init__, tl.tensor.__init__


def init_block(self, element_ty, shape):
    """``block_type.__init__``, once for each type."""
    if not isinstance(shape, list | tl.core.tuple):
        return _init_block(self, element_ty, shape)
    key = (element_ty.name, *(one.value if isinstance(one, tl.constexpr) else one for one in shape))
    if key not in _blocks:
        _init_block(self, element_ty, shape)
        _blocks[key] = dict(vars(self))
    self.__dict__.update(_blocks[key])


def init_tensor(self, handle, type):
    """``tensor.__init__``, of whose results all but the handle follow from the type."""
    key = type.name
    if key not in _tensors:
        _init_tensor(self, handle, type)
        _tensors[key] = {name: value for name, value in vars(self).items() if name not in ("handle", "type")}
    self.__dict__.update(_tensors[key])
    self.handle, self.type = handle, type


_dtypes: dict[str, np.dtype] = {}
_get_np_dtype = interpreter._get_np_dtype


def np_dtype(type):
    """``_get_np_dtype``, without a new table of all types for each call."""
    if type.name not in _dtypes:
        _dtypes[type.name] = _get_np_dtype(type)
    return _dtypes[type.name]


def repair() -> None:
    interpreter._get_np_dtype = np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor
    if rounds_twice():
        interpreter.InterpreterBuilder.create_fma = create_fma
    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
