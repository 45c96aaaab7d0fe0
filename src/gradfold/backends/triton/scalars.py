"""Inputs of a rule's Triton twin for one step: compile-time constants and fp32 scalars.

Scalars are computed in double precision, as the rules in ``gradfold.rules`` do, and rounded once. If the learning rate
or the step count live on the device (``capturable=True``), they are 0-d float64 tensors and so are the results:
nothing here may read their values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradfold import rules
from gradfold.errors import FoldError

from .kernels import rules as twins
from .transfer import stream_of, to_device

Scalar = Any  # a float, or a 0-d float64 tensor


class Twin(NamedTuple):
    """The Triton version of a rule.

    Attributes:
        kernel: Function in ``kernels/rules.py``.
        flags: Computes the constants from the rule's numbers.
        scalars: Computes the scalars from the rule's numbers.
        count: Number of scalars.
    """

    kernel: Any
    flags: Callable[[Any], Sequence[Any]]
    scalars: Callable[[Any], Sequence[Scalar]]
    count: int


def twin_of(rule: rules.Rule) -> Twin | None:
    """Return the twin of exactly this rule, or None; a subclass may have another formula."""
    return _TWINS.get(type(rule))


def flags_of(twin: Twin, numbers: Any) -> tuple[int, ...]:
    """Return the compile-time constants of a step."""
    return tuple(int(flag) for flag in twin.flags(numbers))


def step_scalars(
    twin: Twin, numbers: Any, step: Any, device: torch.device, tensors: bool
) -> tuple[tuple[int, ...], Tensor]:
    """Return ``flags_of`` and ``scalars_of``; computed once for all parameters that step with the same numbers.

    Args:
        twin: The rule's twin.
        numbers: The rule's numbers of this step.
        step: Number of the step, for the random bits.
        device: Device of the scalars.
        tensors: Whether some numbers may be tensors on the device.
    """
    if tensors:
        return flags_of(twin, numbers), scalars_of(twin, numbers, step, device)
    return _numbers_on_host(twin, numbers, step, device, stream_of(device))


@functools.lru_cache(maxsize=64)
def _numbers_on_host(
    twin: Twin, numbers: Any, step: int, device: torch.device, stream: int
) -> tuple[tuple[int, ...], Tensor]:
    return flags_of(twin, numbers), scalars_of(twin, numbers, step, device)


def scalars_of(twin: Twin, numbers: Any, step: Any, device: torch.device) -> Tensor:
    """Return fp32 ``[count + 1]`` on the device; the last element holds the step number as int32 bits.

    Nothing is copied from the host if all of them are on the device.
    """
    values = twin.scalars(numbers)
    if not any(isinstance(value, Tensor) for value in (*values, step)):
        host = np.asarray([*values, 0], np.float32)
        host[-1:].view(np.int32)[0] = step
        return to_device(host, device)
    scalars = torch.stack([as_tensor(value, torch.float64, device) for value in values]).to(torch.float32)
    return torch.cat([scalars, as_tensor(step, torch.int32, device).reshape(1).view(torch.float32)])


def as_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a 0-d tensor on the device; a number of the host is written by a fill kernel, not copied."""
    if isinstance(value, Tensor):
        return value.to(device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=device)


def _decay(n: Any, decoupled: bool) -> tuple[int, Scalar]:
    """Return the kind of weight decay and its factor, as ``kernels/rules.py: _decayed`` takes them."""
    if not isinstance(n.weight_decay, Tensor) and not n.weight_decay:
        return 0, 0.0
    return (1, 1 - n.lr * n.weight_decay) if decoupled else (2, n.weight_decay)


def _near(weight: float) -> bool:
    """Return whether torch.lerp starts from its first end."""
    if isinstance(weight, Tensor):
        raise FoldError("betas and alpha as tensors choose a formula by their values: with capturable=True give floats")
    return bool(abs(np.float32(weight)) < 0.5)


def _lerp(weight: float) -> float:
    """Return the weight that ``kernels/rules.py: _lerp`` takes."""
    return weight if _near(weight) else float(np.float32(weight) - np.float32(1))


def _adam_flags(n: Any) -> Sequence[Any]:
    return _decay(n, n.decoupled)[0], n.maximize, _near(1 - n.beta1), n.amsgrad


def _adam(n: Any) -> Sequence[Scalar]:
    rate = n.lr / (1 - n.beta1**n.step)
    correction = 1 / (1 - n.beta2**n.step) ** 0.5
    return _decay(n, n.decoupled)[1], _lerp(1 - n.beta1), n.beta2, 1 - n.beta2, correction, n.eps, -rate


def _sgd_flags(n: Any) -> Sequence[Any]:
    return _decay(n, False)[0], n.maximize, (2 if n.nesterov else 1) if n.momentum else 0, n.first


def _sgd(n: Any) -> Sequence[Scalar]:
    return _decay(n, False)[1], n.momentum, 1 - n.dampening, -n.lr


def _lion(n: Any) -> Sequence[Scalar]:
    return _decay(n, True)[1], n.beta1, 1 - n.beta1, -n.lr, n.beta2, 1 - n.beta2


def _rmsprop_flags(n: Any) -> Sequence[Any]:
    return _decay(n, False)[0], n.maximize, n.momentum > 0, n.centered, _near(1 - n.alpha)


def _rmsprop(n: Any) -> Sequence[Scalar]:
    return _decay(n, False)[1], n.alpha, 1 - n.alpha, _lerp(1 - n.alpha), n.eps, n.momentum, -n.lr


def _adagrad(n: Any) -> Sequence[Scalar]:
    return _decay(n, False)[1], n.eps, -n.lr / (1 + (n.step - 1) * n.lr_decay)


def _moments_flags(n: Any) -> Sequence[Any]:
    return _decay(n, n.decoupled)[0], n.maximize, _near(1 - n.beta1)


def _nadam(n: Any) -> Sequence[Scalar]:
    correction = 1 / (1 - n.beta2**n.step)
    decay = _decay(n, n.decoupled)[1]
    return decay, _lerp(1 - n.beta1), n.beta2, 1 - n.beta2, correction, n.eps, -n.grad_rate, -n.avg_rate


def _radam(n: Any) -> Sequence[Scalar]:
    adaptive = n.adaptive.double() if isinstance(n.adaptive, Tensor) else float(n.adaptive)
    return _decay(n, n.decoupled)[1], _lerp(1 - n.beta1), n.beta2, 1 - n.beta2, n.eps, -n.rate, adaptive


def _sign_flags(decoupled: bool) -> Callable[[Any], Sequence[Any]]:
    return lambda n: (_decay(n, decoupled)[0], n.maximize)


def _adadelta(n: Any) -> Sequence[Scalar]:
    return _decay(n, False)[1], n.rho, 1 - n.rho, n.eps, -n.lr


def _adamax_flags(n: Any) -> Sequence[Any]:
    return _decay(n, False)[0], n.maximize, _near(1 - n.beta1)


def _adamax(n: Any) -> Sequence[Scalar]:
    return _decay(n, False)[1], _lerp(1 - n.beta1), n.beta2, n.eps, -n.lr / (1 - n.beta1**n.step)


def _asgd_flags(n: Any) -> Sequence[Any]:
    return _decay(n, False)[0], n.maximize, n.copies


def _asgd(n: Any) -> Sequence[Scalar]:
    return _decay(n, False)[1], 1 - n.lambd * n.eta, -n.eta, n.mu


def _rprop_flags(n: Any) -> Sequence[Any]:
    return n.maximize, n.first


def _rprop(n: Any) -> Sequence[Scalar]:
    return n.lr, n.eta_plus, n.eta_minus, n.smallest, n.largest


_TWINS: dict[type[rules.Rule], Twin] = {
    rules.AdamRule: Twin(twins.adam, _adam_flags, _adam, 7),
    rules.SGDRule: Twin(twins.sgd, _sgd_flags, _sgd, 4),
    rules.LionRule: Twin(twins.lion, _sign_flags(True), _lion, 6),
    rules.RMSpropRule: Twin(twins.rmsprop, _rmsprop_flags, _rmsprop, 7),
    rules.AdagradRule: Twin(twins.adagrad, _sign_flags(False), _adagrad, 3),
    rules.NAdamRule: Twin(twins.nadam, _moments_flags, _nadam, 8),
    rules.RAdamRule: Twin(twins.radam, _moments_flags, _radam, 7),
    rules.AdadeltaRule: Twin(twins.adadelta, _sign_flags(False), _adadelta, 5),
    rules.AdamaxRule: Twin(twins.adamax, _adamax_flags, _adamax, 5),
    rules.ASGDRule: Twin(twins.asgd, _asgd_flags, _asgd, 4),
    rules.RpropRule: Twin(twins.rprop, _rprop_flags, _rprop, 5),
}
