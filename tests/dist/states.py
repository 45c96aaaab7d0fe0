"""Parameters of several shapes, cut over ranks, with gradients that are the same bits on any mesh; their states."""

from __future__ import annotations

import torch
from torch import nn

import gradfold
from tests.dist.tiny import whole

SHAPES = {"rows": (254, 512), "vector": (512,), "kernel": (12, 512, 3, 3), "experts": (4, 8, 128), "scalar": ()}
KINDS = {
    "fp32": (torch.float32, {}),
    "int8": (torch.bfloat16, {"states": "int8", "rounding": "stochastic"}),
    "int4": (torch.float32, {"states": "int4", "rounding": "stochastic"}),
    "split8": (torch.bfloat16, {"states": "int8", "rounding": "stochastic", "master": "split8"}),
}
HYPER = {"lr": 1e-2, "weight_decay": 0.1}


def optimizer_of(model, kind, **options):
    storage = {} if kind == "fp32" else {"small_size": 0, "seed": 3}
    return gradfold.AdamW(model.named_parameters(), **HYPER, **KINDS[kind][1], **storage, **options)


def values(name, dtype, seed):
    random = torch.Generator().manual_seed(1000 * seed + len(name) + sum(map(ord, name)))
    return torch.randn(SHAPES[name], generator=random).to(dtype)


def placement_of(name, dim):
    """Return how a parameter is cut: along ``dim`` if it has that, vectors along their only one, scalars not at all."""
    from torch.distributed.tensor import Replicate, Shard

    return Replicate() if not SHAPES[name] else Shard(min(dim, len(SHAPES[name]) - 1))


class Params(nn.Module):
    """``loss(step)`` has the gradient ``values(name, dtype, step + 1)`` by each parameter."""

    def __init__(self, kind, mesh=None, dim=0, names=tuple(SHAPES), zero=False):
        super().__init__()
        self.mesh, self.dim, self.dtype = mesh, dim, KINDS[kind][0]
        for name in names:
            value = values(name, self.dtype, 0)
            self.register_parameter(name, nn.Parameter(self.cut(name, torch.zeros_like(value) if zero else value)))

    def cut(self, name, value):
        from torch.distributed.tensor import distribute_tensor

        return value if self.mesh is None else distribute_tensor(value, self.mesh, [placement_of(name, self.dim)])

    def forward(self, step):
        grads = {name: self.cut(name, values(name, self.dtype, step + 1)) for name, _ in self.named_parameters()}
        return sum(whole((param * grads[name]).sum().float()) for name, param in self.named_parameters())


class Uneven(nn.Module):
    """Matrices of these numbers of rows, cut along them; gradients as of ``Params``."""

    def __init__(self, sizes, mesh=None):
        super().__init__()
        self.mesh = mesh
        for index, size in enumerate(sizes):
            self.register_parameter(f"w{index}", nn.Parameter(self.cut(self.values(index, size, 0))))

    def values(self, index, size, seed):
        return torch.randn(size, 192, generator=torch.Generator().manual_seed(100 * seed + index))

    def cut(self, value):
        from torch.distributed.tensor import Shard, distribute_tensor

        return value if self.mesh is None else distribute_tensor(value, self.mesh, [Shard(0)])

    def forward(self, step):
        terms = [
            whole((param * self.cut(self.values(index, param.shape[0], step + 1))).sum())
            for index, param in enumerate(self.parameters())
            if param.requires_grad
        ]
        return sum(terms)


def train(model, optimizer, steps):
    for step in steps:
        model(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """Return all weights and states whole, by name."""
    names = [name for name, _ in model.named_parameters()]
    found = {name: whole(param.detach()).clone() for name, param in model.named_parameters()}
    for index, states in optimizer.state_dict()["state"].items():
        found |= {f"{names[index]}/{key}": whole(value).clone() for key, value in states.items()}
    return found


def differing(one, other):
    """Return the names whose bits are not the same."""
    return [key for key in sorted(one.keys() | other.keys()) if key not in one or not equal(one[key], other.get(key))]


def equal(a, b):
    return b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def plain_states(model, optimizer):
    """Return the states of sharded parameters that ``state_dict()`` shows as plain tensors."""
    from torch.distributed.tensor import DTensor

    names = [name for name, _ in model.named_parameters()]
    packed = [optimizer.state_dict(), optimizer.torch_state_dict()]
    return [
        f"{names[index]}/{key}"
        for one in packed
        for index, states in one["state"].items()
        for key, value in states.items()
        if key != "step" and not isinstance(value, DTensor)
    ]


def alone(kind, steps):
    """Return model and optimizer of one process."""
    model = Params(kind)
    optimizer = optimizer_of(model, kind)
    train(model, optimizer, range(steps))
    return model, optimizer


def mesh_of(size=None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (size or torch.distributed.get_world_size(),))
