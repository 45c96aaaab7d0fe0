"""Spread a causal language model over ranks by torch's own engine: FSDP2, tensor parallelism, or copies."""

from __future__ import annotations

from typing import Any, get_args

from torch import nn

from gradfold._options import Parallel
from gradfold.errors import FoldError


def spread(model: nn.Module, mesh: Any, kind: Parallel) -> nn.Module:
    """Spread a model over the ranks of a mesh, in place, before its optimizer is made.

    Args:
        model: one of transformers' causal models, whole on every rank; for "fsdp" any model.
        mesh: a 1-D ``torch.distributed.DeviceMesh``.
        kind: "fsdp", "tp" or "replicas".

    Returns:
        The model.

    Raises:
        FoldError: the model has no plan of tensor parallelism, or its sizes do not divide by the number of ranks.
            Nothing has changed then.

    Example:
        >>> mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))  # doctest: +SKIP
        >>> model = gradfold.spread(model, mesh, "tp")
        >>> fold = gradfold.fold(model, gradfold.AdamW(model.named_parameters()))
    """
    if kind not in get_args(Parallel):
        raise FoldError(f"kind={kind!r}: one of {', '.join(map(repr, get_args(Parallel)))}")
    if kind == "replicas":
        from .replicas import replicate

        return replicate(model, mesh)
    return _fsdp(model, mesh) if kind == "fsdp" else _tensor_parallel(model, mesh)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model: what transformers does not split, else the members of its longest list."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if found:
        return found
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


def _fsdp(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    named: Any = getattr(model, "tp_plan", None) or {}
    if not named:
        raise FoldError(f"{type(model).__name__} has no plan of tensor parallelism (tp_plan); spread it by 'fsdp'")
    config: Any = model.config
    ranks = mesh.size()
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    for name in sizes:
        size = getattr(config, name, None)
        if size is not None and size % ranks:
            raise FoldError(f"{name}={size} does not divide by {ranks} ranks of tensor parallelism; use another number")
    styles = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
        "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
        "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    }
    plan = {}
    for path, style in named.items():
        if style not in styles:
            raise FoldError(
                f"{type(model).__name__}: its plan of tensor parallelism has style {style!r} for {path}, which is "
                f"none of {', '.join(styles)}; spread it by 'fsdp'"
            )
        plan[path] = styles[style]()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    tied = embedding is not None and head is not None and head.weight is embedding.weight
    if embedding is not None:  # by rows, as the head: a tied weight is one parameter
        plan[names[id(embedding)]] = RowwiseParallel(input_layouts=Replicate())
    if head is not None:
        plan[names[id(head)]] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    if embedding is not None and head is not None and tied:
        head.weight = embedding.weight
    return model
