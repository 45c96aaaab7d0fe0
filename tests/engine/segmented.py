"""A model whose pieces run in segments of every kind: reentrant checkpoints, and Functions that do the like."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class OwnCheckpoint(torch.autograd.Function):
    """A reentrant checkpoint of one's own, which may cut its backward into several."""

    @staticmethod
    def forward(ctx, run, times, x):
        ctx.run, ctx.times = run, times
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        total = torch.zeros_like(x)
        for _ in range(ctx.times):
            z = x.detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.run(z)
            y.backward(grad / ctx.times)
            total += z.grad
        return None, None, total


class Adjoint(torch.autograd.Function):
    """Takes the weights as inputs, and returns their gradients, which it asks autograd.grad for."""

    @staticmethod
    def forward(ctx, run, x, *params):
        ctx.run, ctx.params = run, params
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        wanted = [param for param in ctx.params if param.requires_grad]
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            found = torch.autograd.grad(ctx.run(z), (z, *wanted), grad, allow_unused=True)
        grads = dict(zip(map(id, wanted), found[1:], strict=True))
        return None, found[0], *[grads.get(id(param)) for param in ctx.params]


class AdjointWithSetup(torch.autograd.Function):
    """The same in torch's newer form, whose forward is not given its node."""

    @staticmethod
    def forward(run, x, *params):
        return run(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.run, x, *ctx.params = inputs
        ctx.save_for_backward(x)

    backward = Adjoint.backward


class AdjointBackward(torch.autograd.Function):
    """Takes the weights as inputs, and calls a backward that reaches them."""

    @staticmethod
    def forward(ctx, run, x, *params):
        ctx.run, ctx.count = run, len(params)
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        z = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(z)
        y.backward(grad)
        return None, z.grad, *[None] * ctx.count


class Tanh(torch.autograd.Function):
    """No segment: an autograd Function like any other."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


def reentrant(run, x, params):
    return checkpoint(run, x, use_reentrant=True)


def non_reentrant(run, x, params):
    return checkpoint(run, x, use_reentrant=False)


KINDS = {
    "plain": lambda run, x, params: run(x),
    "reentrant": reentrant,
    "non_reentrant": non_reentrant,
    "nested": lambda run, x, params: reentrant(lambda z: run(reentrant(run, z, params)), x, params),
    "reentrant_in_non_reentrant": lambda run, x, params: non_reentrant(lambda z: reentrant(run, z, params), x, params),
    "own": lambda run, x, params: OwnCheckpoint.apply(run, 1, x),
    "own_twice": lambda run, x, params: OwnCheckpoint.apply(run, 2, x),
    "adjoint": lambda run, x, params: Adjoint.apply(run, x, *params),
    "adjoint_with_setup": lambda run, x, params: AdjointWithSetup.apply(run, x, *params),
    "adjoint_backward": lambda run, x, params: AdjointBackward.apply(run, x, *params),
}


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-0.1, 0.2, WIDTH))

    def forward(self, x):
        return x + self.bias


class Pieces(nn.Module):
    """Pieces by name; a program is a list of a kind of segment and the pieces in it."""

    def __init__(self):
        super().__init__()
        self.first, self.linear, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.other = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        self.bias = Bias()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def piece(self, name, x):  # [B, WIDTH] -> [B, WIDTH]
        if name == "scale":  # a parameter that is used functionally
            return torch.sin(x * self.scale)
        if name == "raw":  # a folded module's weight, outside of that module
            return torch.sin(F.linear(x, self.linear.weight))
        if name == "conv":
            return torch.sin(self.conv(x[..., None])[..., 0])
        if name == "function":
            return Tanh.apply(x)
        return torch.sin(getattr(self, name)(x))

    def params_of(self, name):
        if name == "function":
            return []
        if name == "scale":
            return [self.scale]
        return list(getattr(self, "linear" if name == "raw" else name).parameters())

    def forward(self, x, program):
        """Run a program; the kind ``"dropped"`` runs a reentrant checkpoint and drops its output."""
        for kind, *names in program:

            def run(z, names=names):
                for name in names:
                    z = self.piece(name, z)
                return z

            params = [param for name in names for param in self.params_of(name)]
            if kind == "dropped":
                reentrant(run, x, params)
            elif kind.startswith("loss:"):  # the segment itself returns the loss
                return KINDS[kind[5:]](lambda z, run=run: run(z).pow(2).sum() if z.dim() else z, x, params)
            else:
                x = KINDS[kind](run, x, params)
        return x.pow(2).sum()


WHERE = {
    "only": lambda kind, name: [("plain", "first"), (kind, name), ("plain", "last")],
    "twice": lambda kind, name: [("plain", "first"), (kind, name), (kind, "other", name), ("plain", "last")],
    "before_too": lambda kind, name: [("plain", "first", name), (kind, name), ("plain", "last")],
    "after_too": lambda kind, name: [("plain", "first"), (kind, name), ("plain", name, "last")],
    "straight_to_the_loss": lambda kind, name: [("plain", name, "first"), (kind, name)],
    "returns_the_loss": lambda kind, name: [("plain", name, "first"), (kind, name), ("loss:" + kind, name)],
    "first_of_all": lambda kind, name: [(kind, name), ("plain", "first", name)],
    "nothing_outside": lambda kind, name: [(kind, name, "other"), (kind, name)],
    "seen_and_unseen": lambda kind, name: [("plain", "first"), (kind, name), (kind, name), ("reentrant", "other")],
    "dropped": lambda kind, name: [("plain", "first"), ("dropped", name), (kind, name), ("plain", name)],
}
