"""Refusal of parameters that cannot be folded."""

from __future__ import annotations

from torch import nn

from gradfold import _torch
from gradfold.errors import FoldError


def refuse_parameter(name: str, param: nn.Parameter, hooks: bool = True) -> None:
    """Raise if this trainable parameter cannot step inside backward.

    Args:
        name: its name.
        param: the parameter.
        hooks: look for hooks, too; a backward does as it begins, and knows which of them would wait in vain.

    Raises:
        FoldError: a lazy or complex parameter, or one with a hook of the user's on it.
    """
    if isinstance(param, nn.UninitializedParameter):
        raise FoldError(f"{name}: a lazy parameter has no shape yet; run one forward first")
    if not param.is_floating_point():
        raise FoldError(f"{name}: {param.dtype} parameters cannot be folded; freeze it or view it as real")
    if hooks and (_torch.gradient_hooks(param) or _torch.post_accumulate_hooks(param)):
        raise FoldError(
            f"{name}: a hook registered on this tensor waits for a gradient that is never made; remove it before "
            "folding, or freeze the parameter"
        )
