"""RAdam, as ``torch.optim.RAdam`` defines it.

Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv 1908.03265, algorithm 2.

With g the gradient (negated under ``maximize``), t the step, and weight decay coupled or decoupled as in Adam:

    exp_avg     <- beta1 exp_avg    + (1 - beta1) g
    exp_avg_sq  <- beta2 exp_avg_sq + (1 - beta2) g^2
    rho_inf     =  2 / (1 - beta2) - 1;   rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)
    rho_t > 5:     r = sqrt((rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t))
                   w <- w - lr r sqrt(1 - beta2^t) / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq) + eps)
    else:          w <- w - lr / (1 - beta1^t) * exp_avg
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .base import Rule, State, descent_gradient, next_step, number, pick


class RAdamNumbers(NamedTuple):
    """Numbers of one RAdam step, computed once per parameter."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    rate: float  # step size before the sign
    adaptive: bool  # rho_t > 5: divide by sqrt(exp_avg_sq)


class RAdamRule(Rule):
    """Adam that divides by ``sqrt(exp_avg_sq)`` only once the variance of that estimate is finite.

    Example:
        >>> group = gradfold.RAdam(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.RAdamRule().states(group)]
        ['exp_avg', 'exp_avg_sq']
    """

    name = "radam"
    kept = frozenset({"exp_avg", "exp_avg_sq"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("exp_avg"), State("exp_avg_sq", signed=False))

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        step, lr = next_step(counters), number(group["lr"])
        beta1, beta2 = map(number, group["betas"])
        correction2 = 1 - beta2**step
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * (beta2**step) / correction2
        plain = lr / (1 - beta1**step)

        def rectified() -> float:
            ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
            return plain * (ratio * correction2) ** 0.5

        rate = pick(rho > 5.0, rectified, plain)
        return RAdamNumbers(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=number(group["weight_decay"]),
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            rate=rate,
            adaptive=rho > 5.0,
        )

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n, (exp_avg, exp_avg_sq) = numbers, states
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay and n.decoupled:
            weight.mul_(1 - n.lr * n.weight_decay)
        elif n.weight_decay:
            grad.add_(weight, alpha=n.weight_decay)
        exp_avg.lerp_(grad, 1 - n.beta1)
        exp_avg_sq.mul_(n.beta2).addcmul_(grad, grad, value=1 - n.beta2)
        if n.adaptive:
            weight.addcdiv_(exp_avg, torch.sqrt(exp_avg_sq, out=scratch[0]).add_(n.eps), value=-n.rate)
        else:
            weight.add_(exp_avg, alpha=-n.rate)
