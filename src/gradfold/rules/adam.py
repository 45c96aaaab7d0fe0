"""Adam and AdamW, with AMSGrad as an option.

Adam: Kingma and Ba, arXiv 1412.6980, algorithm 1. AdamW: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
AMSGrad: Reddi et al., arXiv 1904.09237. With g the gradient (negated under ``maximize``) and t the step:

    decoupled (AdamW)   w <- w (1 - lr * weight_decay)
    coupled (Adam)      g <- g + weight_decay * w
    exp_avg     <- beta1 exp_avg    + (1 - beta1) g
    exp_avg_sq  <- beta2 exp_avg_sq + (1 - beta2) g^2
    v           =  exp_avg_sq, or under amsgrad  max_exp_avg_sq <- max(max_exp_avg_sq, exp_avg_sq)
    w           <- w - lr / (1 - beta1^t) * exp_avg / (sqrt(v) / sqrt(1 - beta2^t) + eps)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gradfold import _torch

from .base import Rule, State, descent_gradient, next_step, number, step_tensor


class AdamNumbers(NamedTuple):
    """Numbers of one Adam step, computed once per parameter."""

    step: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool
    maximize: bool


class AdamRule(Rule):
    """Adam; ``decoupled_weight_decay=True`` in the group makes it AdamW.

    Example:
        >>> group = gradfold.AdamW(model.parameters(), amsgrad=True).param_groups[0]
        >>> [state.name for state in gradfold.rules.AdamRule().states(group)]
        ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq']
    """

    name = "adam"
    kept = frozenset({"exp_avg", "exp_avg_sq"})
    optional = frozenset({"max_exp_avg_sq"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        maximum = (State("max_exp_avg_sq", signed=False),) if group["amsgrad"] else ()
        return (State("exp_avg"), State("exp_avg_sq", signed=False), *maximum)

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        beta1, beta2 = map(number, group["betas"])
        return AdamNumbers(
            step=next_step(counters),
            lr=number(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=number(group["weight_decay"]),
            decoupled=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n, (exp_avg, exp_avg_sq, *maximum) = numbers, states
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay and n.decoupled:
            weight.mul_(1 - n.lr * n.weight_decay)
        elif n.weight_decay:
            grad.add_(weight, alpha=n.weight_decay)
        exp_avg.lerp_(grad, 1 - n.beta1)
        exp_avg_sq.mul_(n.beta2).addcmul_(grad, grad, value=1 - n.beta2)
        if maximum:
            torch.maximum(maximum[0], exp_avg_sq, out=maximum[0])
        denom = torch.sqrt(maximum[0] if maximum else exp_avg_sq, out=scratch[0])
        self._correct(denom, n).add_(n.eps)
        weight.addcdiv_(exp_avg, denom, value=-n.lr / (1 - n.beta1**n.step))

    def _correct(self, root, n):
        """Divide the root of the second moment by its bias correction, in place."""
        return root.mul_(1 / (1 - n.beta2**n.step) ** 0.5)

    def as_fused(self):
        """Return the rule as torch's fused kernel rounds it."""
        return _FUSED

    def fused(self, weight, grad, states, numbers):
        """Run torch's fused kernel on contiguous tensors."""
        n, (exp_avg, exp_avg_sq, *maximum) = numbers, states
        kernel = _torch.fused_adamw if n.decoupled else _torch.fused_adam
        kernel(
            [weight],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            maximum,
            [step_tensor(n.step, weight)],
            lr=n.lr,
            beta1=n.beta1,
            beta2=n.beta2,
            weight_decay=n.weight_decay,
            eps=n.eps,
            amsgrad=n.amsgrad,
            maximize=n.maximize,
        )


class _AsFused(AdamRule):
    """The same formula, divided where ``AdamRule`` multiplies by the reciprocal, as torch's fused kernel does."""

    def _correct(self, root, n):
        return root.div_((1 - n.beta2**n.step) ** 0.5)


_FUSED = _AsFused()
