"""A model that is spread over all ranks and needs no collective, so that one rank can fail while the others go on."""

import math

import torch
from torch import nn

import gradfold
from tests.dist.tiny import HYPER, furthest

WIDTH = 8


class Parts(nn.Module):
    """Two Linears cut by rows, a plain parameter with equal gradients on all ranks; each has a part of the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(WIDTH, 8)
        self.b = nn.Linear(WIDTH, 4, bias=False)
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.double()

    def forward(self, x):
        return self.a(x).pow(2).sum() + self.b(x).pow(2).sum() + (self.scale * x).pow(2).sum()


class Poison(torch.autograd.Function):
    """Passes numbers on; what ``act`` makes of the gradient is passed back."""

    @staticmethod
    def forward(ctx, x, act):
        ctx.act = act
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.act(grad), None


def poisoned(module, act):
    """Put ``act`` on the gradient of a module's output; returns a handle."""
    return module.register_forward_hook(lambda module, args, y: Poison.apply(y, act))


def spread():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return parallelize_module(Parts(), mesh, {"a": ColwiseParallel(), "b": ColwiseParallel()})


def folded(model=None, group=None, hyper=HYPER, **options):
    """Return model, optimizer and fold."""
    model = spread() if model is None else model
    optimizer = gradfold.AdamW(model.named_parameters(), **hyper)
    return model, optimizer, gradfold.fold(model, optimizer, group=group, **options)


def inputs(step):
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def alone(steps, clip=math.inf, order=2.0):
    """Return the model that torch's AdamW trains on one process with these inputs, and the norms."""
    model, norms = Parts(), []
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
    for step in steps:
        model(inputs(step)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip, order)))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


def held(model):
    """Return copies of what this rank holds, by name."""
    return {name: getattr(p, "_local_tensor", p).detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    """Return the names of the parameters that differ from copies of them."""
    return sorted(name for name, now in held(model).items() if not torch.equal(now, before[name]))


def said(function):
    """Return what an error says, or an empty text."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


__all__ = ["alone", "folded", "furthest", "held", "inputs", "moved", "poisoned", "said", "spread"]
