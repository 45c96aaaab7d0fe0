"""The model of a case: a chain of small layers, some of which share, tie or read each other's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradfold
from tests.fuzz.case import Case, Op
from tests.zoo import CHECKPOINTS

VOCABULARY = 7


class Layer(nn.Module):
    """One layer of the chain: ``[B, T, in_width]`` to ``[B, T, out_width]``; a residual where these agree."""

    def __init__(self, run: Callable[[Layer, Tensor], Tensor], residual: bool = False, **modules: Any):
        super().__init__()
        self.run, self.residual = run, residual
        self.step = 0  # of the loop, for layers that are not used in every step
        for name, value in modules.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(self, x)
        return x + y if self.residual else y


def _conv1d(wide: int, width: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(wide, width)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def _attend(self: Layer, x: Tensor) -> Tensor:
    return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def _some_rows(self: Layer, x: Tensor, count: int) -> Tensor:
    """A Linear sees only the first rows of all tokens; there may be none."""
    flat = _flat(x)
    rows = self.linear(flat[:count])
    return torch.cat([rows, flat[count:]]).view_as(x)


def _experts(self: Layer, x: Tensor) -> Tensor:
    """Each token goes through the expert of its sign; an expert may get none."""
    flat = _flat(x)
    first = flat.detach().sum(-1) > 0
    y = torch.zeros_like(flat)
    for chosen, expert in ((first, self.one), (~first, self.other)):
        at = chosen.nonzero()[:, 0]
        y = y.index_add(0, at, expert(flat[at]))
    return y.view_as(x)


class Net(nn.Module):
    """The model. It is made from the case alone, so that two of them have the same weights."""

    def __init__(self, case: Case):
        super().__init__()
        torch.default_generator.manual_seed(case.seed)
        self.case = case
        self.few = case.batch * case.tokens < 2
        self.step = 0
        width = case.width
        if case.first == "ids":
            self.embed = nn.Embedding(VOCABULARY, width, padding_idx=case.seed % VOCABULARY if case.seed % 3 else None)
        self.ops = nn.ModuleList()
        for op in case.ops:
            layer, width = self._layer(op, width)
            self.ops.append(layer)
        if case.loss != "square":
            self.head = nn.Linear(width, VOCABULARY, bias=False)
            embed = getattr(self, "embed", None)
            if case.loss == "tied_head" and embed is not None and embed.weight.shape == self.head.weight.shape:
                self.head.weight = embed.weight
        if not list(self.parameters()):
            self.spare = _parameter(3)
        self.to(getattr(torch, case.dtype))
        params = list(self.parameters())
        for index in case.frozen:
            params[index % len(params)].requires_grad_(False)
        if not any(param.requires_grad for param in params):
            params[0].requires_grad_(True)

    def _linears(self, width: int | None = None) -> list[nn.Linear]:
        found = [m for m in self.modules() if type(m) is nn.Linear and "weight" in m._parameters]
        return [m for m in found if width is None or m.in_features == width]

    def _layer(self, op: Op, width: int) -> tuple[Layer, int]:
        """Return the layer of an op, and the width after it; an op that does not fit here does nothing."""
        kind, *args = op
        nothing = Layer(lambda self, x: x), width
        if kind in ("linear", "conv1d"):
            wide, flag = args
            inner = nn.Linear(width, wide, bias=flag) if kind == "linear" else _conv1d(wide, width)
            return Layer(lambda self, x: self.inner(x), residual=wide == width and flag, inner=inner), wide
        if kind in ("shared", "tied", "direct"):
            fitting = self._linears(width)
            if not fitting:
                return nothing
            found = fitting[args[0] % len(fitting)]
            if kind == "shared":
                return Layer(lambda self, x: self.inner(x), inner=found), found.out_features
            if kind == "direct":
                return Layer(lambda self, x: F.linear(x, self.inner.weight), inner=found), found.out_features
            made = nn.Linear(width, found.out_features)
            made.weight = found.weight
            return Layer(lambda self, x: self.inner(x), inner=made), found.out_features
        if kind == "activation":
            return Layer(_ACTIVATIONS[args[0]]), width
        if kind == "norm":
            if args[0] == "group" and not self.few:  # of each token alone
                run = lambda self, x: self.inner(_flat(x)).view_as(x)  # noqa: E731
                return Layer(run, inner=nn.GroupNorm(1, width)), width
            norm = nn.RMSNorm(width) if args[0] == "rms" else nn.LayerNorm(width, bias=args[0] != "layer_plain")
            return Layer(lambda self, x: self.inner(x), inner=norm), width
        if kind == "rows":
            count, bias = args
            linear = nn.Linear(width, width, bias=bias)
            return Layer(lambda self, x: _some_rows(self, x, count), residual=True, linear=linear), width
        if kind == "sometimes":
            period = args[0]
            run = lambda self, x: self.inner(x) if self.step % period == 0 else x  # noqa: E731
            return Layer(run, inner=nn.Linear(width, width)), width
        return (self._module(kind, width) if width else None) or nothing[0], width

    def _module(self, kind: str, width: int) -> Layer | None:
        case = self.case
        inner = lambda self, x: self.inner(x)  # noqa: E731
        if kind == "scale":
            return Layer(lambda self, x: x * self.scale, scale=_parameter(width))
        if kind == "scalar":
            return Layer(lambda self, x: x * self.scale, residual=True, scale=_parameter())
        if kind == "convolution":
            run = lambda self, x: self.inner(x.transpose(1, 2)).transpose(1, 2)  # noqa: E731
            return Layer(run, residual=True, inner=nn.Conv1d(width, width, 3, padding=1))
        if kind == "attention":
            q, k, v, out = (nn.Linear(width, width, bias=case.seed % 2 == 0) for _ in range(4))
            return Layer(_attend, residual=True, q=q, k=k, v=v, out=out)
        if kind == "multihead" and case.batch:
            run = lambda self, x: self.inner(x, x, x, need_weights=False)[0]  # noqa: E731
            return Layer(run, residual=True, inner=nn.MultiheadAttention(width, 1, batch_first=True))
        if kind == "gru" and case.batch and case.dtype != "bfloat16":
            return Layer(lambda self, x: self.inner(x)[0].contiguous(), inner=nn.GRU(width, width, batch_first=True))
        if kind == "bilinear":
            return Layer(lambda self, x: self.inner(x, x), inner=nn.Bilinear(width, width, width))
        if kind == "positions":
            run = lambda self, x: x + self.inner(torch.arange(x.shape[1]))  # noqa: E731
            return Layer(run, inner=nn.Embedding(case.tokens + 2, width))
        if kind == "adapter":
            down, up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)
            return Layer(lambda self, x: self.up(self.down(x)), residual=True, down=down, up=up)
        if kind == "weight_norm":
            made = nn.utils.parametrizations.weight_norm(nn.Linear(width, width))
            return Layer(inner, residual=True, inner=made)
        if kind == "dropout":
            return Layer(inner, inner=nn.Dropout(0.3))
        if kind == "batch_norm" and not self.few:
            run = lambda self, x: self.inner(_flat(x)).view_as(x)  # noqa: E731
            return Layer(run, inner=nn.BatchNorm1d(width))
        if kind == "experts":
            return Layer(_experts, residual=True, one=nn.Linear(width, width), other=nn.Linear(width, width))
        if kind == "empty":  # weights without elements
            up, down = nn.Linear(width, 0), nn.Linear(0, width)
            return Layer(lambda self, x: self.down(self.up(x)), residual=True, up=up, down=down)
        return None

    def segment(self, start: int, stop: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for layer in self.ops[start:stop]:
                layer.step = self.step
                x = layer(x)
            return x

        return run

    def features(self, x: Tensor) -> Tensor:
        if self.case.first == "ids":
            x = self.embed(x)
        at = 0
        for index, (start, stop, kind) in enumerate(self.case.segments):
            if start < at or stop > len(self.ops):
                continue
            x = self.segment(at, start)(x)
            x = CHECKPOINTS[kind](self.segment(start, stop), x, index)
            at = stop
        return self.segment(at, len(self.ops))(x)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of one micro-batch, a sum over tokens divided by a constant."""
        case, h = self.case, self.features(x)
        count = max(1, case.batch * case.tokens)
        if case.loss == "square":
            loss = (h - 0.3).pow(2).sum() / (count * max(1, h.shape[-1]))
        elif case.loss == "cross_entropy":
            loss = F.cross_entropy(self.head(h).flatten(0, 1), labels.flatten(), reduction="sum") / count
        elif hasattr(self.head, "_gradfold_param"):
            loss = gradfold.linear_cross_entropy(h, self.head.weight, labels, reduction="sum") / count
        else:
            logits = F.linear(h, self.head.weight)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
        params = list(self.parameters())
        for index in case.penalties:
            loss = loss + 0.1 * params[index % len(params)].pow(2).sum()
        return loss * case.loss_scale


_ACTIVATIONS: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "tanh": lambda self, x: torch.tanh(x),
    "gelu": lambda self, x: F.gelu(x),
    "relu": lambda self, x: F.relu(x),
    "relu_": lambda self, x: F.relu_(x * 1.0),
    "silu": lambda self, x: F.silu(x),
    "sigmoid": lambda self, x: torch.sigmoid(x),
}


def batches(case: Case) -> list[list[tuple[Tensor, Tensor]]]:
    """Inputs and labels, by step and micro-batch."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.batch, case.tokens)

    def ids() -> Tensor:
        return torch.randint(0, VOCABULARY, shape, generator=generator)

    def floats() -> Tensor:
        return torch.randn(*shape, case.width, generator=generator, dtype=torch.float64)

    return [
        [(ids() if case.first == "ids" else floats(), ids()) for _ in range(case.accumulate)] for _ in range(case.steps)
    ]
