"""NAdam: Dozat, "Incorporating Nesterov Momentum into Adam", 2016, as ``torch.optim.NAdam`` defines it.

With g the gradient (negated under ``maximize``), t the step, and weight decay coupled or decoupled as in Adam:

    mu_t        =  beta1 (1 - 0.96^(t * momentum_decay) / 2);  mu_product <- mu_product * mu_t
    exp_avg     <- beta1 exp_avg    + (1 - beta1) g
    exp_avg_sq  <- beta2 exp_avg_sq + (1 - beta2) g^2
    d           =  sqrt(exp_avg_sq / (1 - beta2^t)) + eps
    w           <- w - lr (1 - mu_t) / (1 - mu_product) * g / d
                     - lr mu_{t+1} / (1 - mu_product * mu_{t+1}) * exp_avg / d
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch

from .base import Rule, State, descent_gradient, next_step, number


class NAdamNumbers(NamedTuple):
    """Numbers of one NAdam step, computed once per parameter."""

    step: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    grad_rate: float  # factor of g / d, before the sign
    avg_rate: float  # factor of exp_avg / d, before the sign


class NAdamRule(Rule):
    """Adam with Nesterov momentum.

    Example:
        >>> group = gradfold.NAdam(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.NAdamRule().states(group)]
        ['exp_avg', 'exp_avg_sq']
    """

    name = "nadam"
    kept = frozenset({"exp_avg", "exp_avg_sq"})
    counters: ClassVar = {"step": 0.0, "mu_product": 1.0}

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("exp_avg"), State("exp_avg_sq", signed=False))

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        step, lr = next_step(counters), number(group["lr"])
        beta1, beta2 = map(number, group["betas"])

        def mu(t: float) -> float:
            return beta1 * (1.0 - 0.5 * (0.96 ** (t * group["momentum_decay"])))

        counters["mu_product"] *= mu(step)
        product, following = number(counters["mu_product"]), mu(step + 1)
        return NAdamNumbers(
            step=step,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=number(group["weight_decay"]),
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            grad_rate=lr * (1.0 - mu(step)) / (1.0 - product),
            avg_rate=lr * following / (1.0 - product * following),
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
        denom = torch.mul(exp_avg_sq, 1 / (1 - n.beta2**n.step), out=scratch[0]).sqrt_().add_(n.eps)
        weight.addcdiv_(grad, denom, value=-n.grad_rate)
        weight.addcdiv_(exp_avg, denom, value=-n.avg_rate)
