"""Shared by the benchmarks on several ranks: processes, sharded models, and what collectives bring."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

TIMEOUT_S = 1800.0


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Return what ``function(*args)`` returns on each of some new processes, which talk over gloo, one thread each.

    Raises:
        SystemExit: a rank has raised, or took too long.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, workers = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe()
        worker = context.Process(target=_rank, args=(theirs, rank, ranks, port, function, args), daemon=True)
        worker.start()
        theirs.close()
        pipes.append(mine)
        workers.append(worker)
    found = []
    try:
        for rank, pipe in enumerate(pipes):
            try:
                found.append(pipe.recv() if pipe.poll(timeout_s) else None)
            except EOFError:
                found.append(None)
            if found[-1] is None:
                raise SystemExit(f"rank {rank} of {function.__name__} has not answered")
    finally:
        for worker in workers:
            worker.join(5.0)
            worker.kill()
    return found


def _rank(pipe: Any, rank: int, ranks: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=300))
    pipe.send(function(*args))
    dist.barrier()
    dist.destroy_process_group()


def fully_sharded(model: nn.Module, **options: Any) -> nn.Module:
    """Shard a Llama by FSDP2: each layer by itself, embedding, norm and head together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    causal: Any = model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in causal.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


class Traffic(TorchDispatchMode):
    """Counts the bytes that each rank receives in collectives, by kind; small gathers of lists are the fold's votes."""

    def __init__(self) -> None:
        super().__init__()
        self.received_bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a collective, and run any operator."""
        kind, _, name = str(func).partition(".")
        name = name.partition(".")[0]
        out = func(*args, **(kwargs or {}))
        whole = None  # what a rank has before or after, of which it sends or gets all parts but its own
        if kind == "c10d":
            whole = {"_allgather_base_": args[0], "_reduce_scatter_base_": args[1], "alltoall_base_": args[0]}.get(name)
            self.received_bytes.setdefault(name, 0)
        elif kind == "_c10d_functional" and not name.startswith("wait"):
            whole = out if name.startswith("all_gather") else args[0]
        if whole is not None:
            others = (dist.get_world_size() - 1) / dist.get_world_size()
            twice = 2 if name.startswith("all_reduce") else 1  # scattered, then gathered
            size = round(twice * whole.numel() * whole.element_size() * others)
            self.received_bytes[name] = self.received_bytes.get(name, 0) + size
        return out


# a model that takes torch's tensor and sequence parallelism -----------------------------------------------------------


class Attention(nn.Module):
    """Causal attention over the heads of this rank."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.each = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over ``x`` ``[B, T, H]``."""
        q, k, v = (y.view(*y.shape[:2], -1, self.each).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The gated MLP of a Llama."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[B, T, H]`` to the same shape."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention, self.mlp = Attention(width, heads), FeedForward(width, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[B, T, H]`` to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A Llama without positions, whose modules can be cut by torch's plans: transformers' counts its own tokens."""

    def __init__(self, layers: int, width: int = 768, inner: int = 2048, heads: int = 12, vocabulary: int = 10_240):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, inner, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits of ids ``[B, T]``."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def tensor_parallel(model: Decoder) -> Decoder:
    """Cut a Decoder over all ranks: tensor and sequence parallel, as torch's tutorial does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh, tokens = init_device_mesh("cpu", (dist.get_world_size(),)), Shard(1)
    parallelize_module(
        model,
        mesh,
        {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=tokens, output_layouts=Shard(-1), use_local_output=False),
        },
    )
    gather: dict[str, Any] = {"input_layouts": (tokens,), "desired_input_layouts": (Replicate(),)}
    inside: dict[str, Any] = {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
    inside |= {"attention": PrepareModuleInput(**gather), "mlp": PrepareModuleInput(**gather)}
    inside |= {f"attention.{name}": ColwiseParallel() for name in "qkv"}
    inside |= {"mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel()}
    inside |= {
        "attention.o": RowwiseParallel(output_layouts=tokens),
        "mlp.down": RowwiseParallel(output_layouts=tokens),
    }
    for layer in model.layers:
        parallelize_module(layer, mesh, inside)
    return model
