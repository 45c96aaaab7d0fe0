"""What every rule and every weight gradient should be: plain Python loops in double precision, nothing of gradfold.

Each rule is one function of one element: ``rule(w, g, s, t, h) -> w``, with weight ``w``, gradient ``g``, states ``s``
(updated in place), step ``t`` counted from 1, and hyper-parameters ``h``. They follow the published formulas, not an
order of operations that happens to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Element = Callable[[float, float, dict[str, float], int, dict[str, Any]], float]


def adam(w, g, s, t, h):
    """Kingma and Ba 2014, algorithm 1; Loshchilov and Hutter 2017, algorithm 2; AMSGrad: Reddi et al. 2018."""
    g = -g if h["maximize"] else g
    if h["decoupled_weight_decay"]:
        w -= h["lr"] * h["weight_decay"] * w
    else:
        g += h["weight_decay"] * w
    beta1, beta2 = h["betas"]
    s["exp_avg"] = beta1 * s.get("exp_avg", 0.0) + (1 - beta1) * g
    s["exp_avg_sq"] = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g * g
    v = s["exp_avg_sq"]
    if h["amsgrad"]:
        v = s["max_exp_avg_sq"] = max(s.get("max_exp_avg_sq", 0.0), v)
    mean = s["exp_avg"] / (1 - beta1**t)
    return w - h["lr"] * mean / (math.sqrt(v / (1 - beta2**t)) + h["eps"])


def sgd(w, g, s, t, h):
    """torch.optim.SGD's documentation: the buffer starts as the first gradient, undampened."""
    g = -g if h["maximize"] else g
    g += h["weight_decay"] * w
    if h["momentum"]:
        if "momentum_buffer" in s:
            s["momentum_buffer"] = h["momentum"] * s["momentum_buffer"] + (1 - h["dampening"]) * g
        else:
            s["momentum_buffer"] = g
        g = g + h["momentum"] * s["momentum_buffer"] if h["nesterov"] else s["momentum_buffer"]
    return w - h["lr"] * g


def lion(w, g, s, t, h):
    """Chen et al. 2023, algorithm 2."""
    g = -g if h["maximize"] else g
    beta1, beta2 = h["betas"]
    m = s.get("exp_avg", 0.0)
    c = beta1 * m + (1 - beta1) * g
    s["exp_avg"] = beta2 * m + (1 - beta2) * g
    sign = (c > 0) - (c < 0)
    return w - h["lr"] * (sign + h["weight_decay"] * w)


def rmsprop(w, g, s, t, h):
    """Hinton's lecture 6e; centered: Graves 2013; torch.optim.RMSprop's place for eps and momentum."""
    g = -g if h["maximize"] else g
    g += h["weight_decay"] * w
    alpha = h["alpha"]
    v = s["square_avg"] = alpha * s.get("square_avg", 0.0) + (1 - alpha) * g * g
    if h["centered"]:
        s["grad_avg"] = alpha * s.get("grad_avg", 0.0) + (1 - alpha) * g
        v -= s["grad_avg"] ** 2
    update = g / (math.sqrt(v) + h["eps"])
    if h["momentum"]:
        update = s["momentum_buffer"] = h["momentum"] * s.get("momentum_buffer", 0.0) + update
    return w - h["lr"] * update


def adagrad(w, g, s, t, h):
    """Duchi, Hazan and Singer 2011; torch.optim.Adagrad's learning-rate decay."""
    g = -g if h["maximize"] else g
    g += h["weight_decay"] * w
    s["sum"] = s.get("sum", h["initial_accumulator_value"]) + g * g
    return w - h["lr"] / (1 + (t - 1) * h["lr_decay"]) * g / (math.sqrt(s["sum"]) + h["eps"])


def nadam(w, g, s, t, h):
    """Dozat 2016, with torch.optim.NAdam's momentum schedule; torch keeps the running product of mu in float32."""
    g = -g if h["maximize"] else g
    if h["decoupled_weight_decay"]:
        w -= h["lr"] * h["weight_decay"] * w
    else:
        g += h["weight_decay"] * w
    beta1, beta2 = h["betas"]
    mu, following = (beta1 * (1 - 0.5 * 0.96 ** (i * h["momentum_decay"])) for i in (t, t + 1))
    product = s["mu_product"] = float(np.float32(s.get("mu_product", 1.0)) * np.float32(mu))
    m = s["exp_avg"] = beta1 * s.get("exp_avg", 0.0) + (1 - beta1) * g
    s["exp_avg_sq"] = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g * g
    mean = following * m / (1 - product * following) + (1 - mu) * g / (1 - product)
    return w - h["lr"] * mean / (math.sqrt(s["exp_avg_sq"] / (1 - beta2**t)) + h["eps"])


def radam(w, g, s, t, h):
    """Liu et al. 2019, algorithm 2, with torch.optim.RAdam's place for eps."""
    g = -g if h["maximize"] else g
    if h["decoupled_weight_decay"]:
        w -= h["lr"] * h["weight_decay"] * w
    else:
        g += h["weight_decay"] * w
    beta1, beta2 = h["betas"]
    s["exp_avg"] = beta1 * s.get("exp_avg", 0.0) + (1 - beta1) * g
    s["exp_avg_sq"] = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g * g
    mean = s["exp_avg"] / (1 - beta1**t)
    most = 2 / (1 - beta2) - 1
    now = most - 2 * t * beta2**t / (1 - beta2**t)
    if now > 5:
        rectify = math.sqrt((now - 4) * (now - 2) * most / ((most - 4) * (most - 2) * now))
        mean *= rectify * math.sqrt(1 - beta2**t) / (math.sqrt(s["exp_avg_sq"]) + h["eps"])
    return w - h["lr"] * mean


def adadelta(w, g, s, t, h):
    """Zeiler 2012, algorithm 1, with torch.optim.Adadelta's factor ``lr``."""
    g = -g if h["maximize"] else g
    g += h["weight_decay"] * w
    rho, eps = h["rho"], h["eps"]
    s["square_avg"] = rho * s.get("square_avg", 0.0) + (1 - rho) * g * g
    before = s.get("acc_delta", 0.0)
    delta = math.sqrt(before + eps) / math.sqrt(s["square_avg"] + eps) * g
    s["acc_delta"] = rho * before + (1 - rho) * delta * delta
    return w - h["lr"] * delta


def adamax(w, g, s, t, h):
    """Kingma and Ba 2014, algorithm 2, with torch.optim.Adamax's place for eps."""
    g = -g if h["maximize"] else g
    g += h["weight_decay"] * w
    beta1, beta2 = h["betas"]
    s["exp_avg"] = beta1 * s.get("exp_avg", 0.0) + (1 - beta1) * g
    s["exp_inf"] = max(beta2 * s.get("exp_inf", 0.0), abs(g) + h["eps"])
    return w - h["lr"] / (1 - beta1**t) * s["exp_avg"] / s["exp_inf"]


def asgd(w, g, s, t, h):
    """torch.optim.ASGD's documentation; it keeps eta and mu in float32, for the next step."""
    g = -g if h["maximize"] else g
    g += h["weight_decay"] * w
    eta, mu = s.get("eta", float(np.float32(h["lr"]))), s.get("mu", 1.0)
    w = w * (1 - h["lambd"] * eta) - eta * g
    before = s.get("ax", 0.0)
    s["ax"] = w if mu == 1 else before + mu * (w - before)
    s["eta"] = float(np.float32(h["lr"] / (1 + h["lambd"] * h["lr"] * t) ** h["alpha"]))
    s["mu"] = float(np.float32(1 / max(1, t - h["t0"])))
    return w


def rprop(w, g, s, t, h):
    """Riedmiller and Braun 1993, with torch.optim.Rprop's zero gradient after a change of sign."""
    g = -g if h["maximize"] else g
    (minus, plus), (smallest, largest) = h["etas"], h["step_sizes"]
    size, agrees = s.get("step_size", h["lr"]), g * s.get("prev", 0.0)
    if agrees > 0:
        size *= plus
    if agrees < 0:
        size, g = size * minus, 0.0
    s["step_size"], s["prev"] = min(max(size, smallest), largest), g
    return w - s["step_size"] * ((g > 0) - (g < 0))


_ADAM = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False, decoupled_weight_decay=False)
# optimizer's name -> (its rule, its documented defaults)
RULES: dict[str, tuple[Element, dict[str, Any]]] = {
    "Adam": (adam, _ADAM | dict(amsgrad=False)),
    "AdamW": (adam, _ADAM | dict(amsgrad=False, weight_decay=1e-2, decoupled_weight_decay=True)),
    "SGD": (sgd, dict(lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)),
    "Lion": (lion, dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False)),
    "RMSprop": (
        rmsprop,
        dict(lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, maximize=False),
    ),
    "Adagrad": (
        adagrad,
        dict(lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10, maximize=False),
    ),
    "NAdam": (nadam, _ADAM | dict(lr=2e-3, momentum_decay=4e-3)),
    "RAdam": (radam, _ADAM),
    "Adadelta": (adadelta, dict(lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False)),
    "Adamax": (adamax, dict(lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False)),
    "ASGD": (asgd, dict(lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0, maximize=False)),
    "Rprop": (rprop, dict(lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50.0), maximize=False)),
}


def run(name: str, hyper: dict[str, Any], weight: np.ndarray, grads: Sequence[np.ndarray]):
    """The weight and its states after one step per gradient: ``(weight, {state: array})``, element by element."""
    rule, defaults = RULES[name]
    h = defaults | hyper
    final = np.empty(weight.shape, dtype=np.float64)
    states: dict[str, np.ndarray] = {}
    for at in np.ndindex(weight.shape):
        w, s = float(weight[at]), {}
        for t, grad in enumerate(grads, start=1):
            w = rule(w, float(grad[at]), s, t, h)
        final[at] = w
        for key, value in s.items():
            states.setdefault(key, np.empty(weight.shape))[at] = value
    return final, states


# gradients of a weight ------------------------------------------------------------------------------------------------


def linear_grad(dY: np.ndarray, X: np.ndarray) -> np.ndarray:
    """``dW[n, k] = sum_t dY[t, n] X[t, k]`` of a Linear's weight [N, K]; every sum rounded once."""
    rows, inputs = _table(dY), _table(X)
    return np.array(
        [
            [math.fsum(dy[n] * x[k] for dy, x in zip(rows, inputs, strict=True)) for k in range(X.shape[1])]
            for n in range(dY.shape[1])
        ]
    ).reshape(dY.shape[1], X.shape[1])


def conv1d_grad(dY: np.ndarray, X: np.ndarray) -> np.ndarray:
    """The same for GPT-2's Conv1D, whose weight [K, N] is stored transposed."""
    return linear_grad(dY, X).T


def embedding_grad(ids: np.ndarray, dY: np.ndarray, rows: int, padding_idx: int | None = None) -> np.ndarray:
    """``dW[v] = sum of dY[t] over the tokens t whose id is v``, and nothing at ``padding_idx``: [V, H]."""
    summands: list[list[list[float]]] = [[[] for _ in range(dY.shape[1])] for _ in range(rows)]
    for token, values in zip(ids.reshape(-1).tolist(), _table(dY), strict=True):
        if token != padding_idx:
            for column, value in enumerate(values):
                summands[token][column].append(value)
    return np.array([[math.fsum(cell) for cell in row] for row in summands]).reshape(rows, dY.shape[1])


def _table(x: np.ndarray) -> list[list[float]]:
    return [[float(value) for value in row] for row in x]


def relative_l2(got: np.ndarray, exact: np.ndarray) -> float:
    """|got - exact| / |exact|, as vectors."""
    return float(np.linalg.norm(got - exact) / max(np.linalg.norm(exact), np.finfo(float).tiny))


def elements(arrays: Sequence[np.ndarray]) -> Iterator[float]:
    for array in arrays:
        yield from array.reshape(-1).tolist()
