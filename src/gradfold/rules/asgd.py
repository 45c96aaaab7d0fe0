"""Averaged SGD, as ``torch.optim.ASGD`` defines it.

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control Optim. 30 (1992). With g
the gradient (negated under ``maximize``) and t the step:

    g   <- g + weight_decay * w
    w   <- w (1 - lambd * eta) - eta * g
    ax  <- ax + mu (w - ax)
    eta <- lr / (1 + lambd * lr * t)^alpha       (lr at a parameter's first step)
    mu  <- 1 / max(1, t - t0)                    (1 at first: ax is then the weight)

``ax`` is the average of the weights since step ``t0``. ``eta`` and ``mu`` are states, used in the step after the one
that computes them.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch

from .base import Rule, State, descent_gradient, next_step, number, pick


class ASGDNumbers(NamedTuple):
    """Numbers of one ASGD step, computed once per parameter."""

    lambd: float
    eta: float
    mu: float
    weight_decay: float
    maximize: bool
    copies: bool  # whether the average is the weight


class ASGDRule(Rule):
    """SGD with a decaying learning rate, and an average of the weights beside them.

    Example:
        >>> group = gradfold.ASGD(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.ASGDRule().states(group)]
        ['ax']
    """

    name = "asgd"
    kept = frozenset({"ax"})
    counters: ClassVar = {"step": 0.0, "eta": 0.0, "mu": 1.0}

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("ax", exact="it is an average of weights, which is read in place of them"),)

    def start_of(self, name, value, group):
        """Return the learning rate for ``eta``, as torch does, which makes it at the first step."""
        return float(number(group["lr"])) if name == "eta" else value

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        step, lr = next_step(counters), number(group["lr"])
        eta = counters["eta"]
        eta.fill_(pick(step == 1, lambda: lr, eta))  # the learning rate of now, not of when the state was made
        mu = cast(Any, number(counters["mu"]))
        rate = cast(Any, number(eta))
        on_device = type(mu) is not float
        # the tensors change below, and what is on a device was not copied
        numbers = ASGDNumbers(
            lambd=group["lambd"],
            eta=rate.clone() if on_device else rate,
            mu=mu.clone() if on_device else mu,
            weight_decay=number(group["weight_decay"]),
            maximize=group["maximize"],
            copies=not on_device and mu == 1,
        )
        eta.fill_(lr / (1 + group["lambd"] * lr * step) ** group["alpha"])
        after = step - group["t0"]
        counters["mu"].fill_(1 / pick(after > 1, lambda: after, mu * 0 + 1 if on_device else 1))
        return numbers

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n, (ax,) = numbers, states
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay:
            grad.add_(weight, alpha=n.weight_decay)
        weight.mul_(1 - n.lambd * n.eta)
        weight.add_(grad, alpha=-n.eta)
        if n.copies:
            ax.copy_(weight)
        else:
            ax.add_(torch.sub(weight, ax, out=scratch[0]).mul_(n.mu))
