"""Keep the process alive where torch's GroupNorm kernel would end it.

On CPUs torch's backward of a GroupNorm whose input is in channels-last layout writes the gradient of that input whether
or not anybody asked for it. Where the input needs no gradient while weight or bias does, there is no memory for it, and
the process dies (torch 2.13). Layers that sleep or are frozen below a GroupNorm make just such inputs.

The kernel is reached from ``nn.GroupNorm``, its subclasses, ``F.group_norm`` in anybody's module, and compiled graphs.
So the kernel itself is wrapped: it computes the input's gradient too, which is dropped.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@functools.cache
def survive_group_norms() -> None:
    """Wrap the backward of GroupNorm on CPUs, in this process and for good; weight and bias get the same bits."""
    operator = torch.ops.aten.native_group_norm_backward.default
    kernel = torch.library.get_kernel(operator, "CPU")

    def backward(keys: torch.DispatchKeySet, grad: Tensor, x: Tensor, *rest: Any) -> Sequence[Tensor | None]:
        *sizes, (for_input, *for_params) = rest
        if for_input or _is_plain(x):
            return kernel.call_boxed(keys, grad, x, *rest)
        _, *made = kernel.call_boxed(keys, grad, x, *sizes, [True, *for_params])
        return None, *made

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        library.impl(operator, backward, "CPU", with_keyset=True)
    _KEPT.append(library)


_KEPT: list[torch.library.Library] = []  # the wrapper goes with its library


def _is_plain(x: Tensor) -> bool:
    """Return whether the layout of x is channels before pixels, and cannot be taken for channels-last as well."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x.is_contiguous() and (last is None or not x.is_contiguous(memory_format=last))
