"""Megatron-LM's tensor-parallel layers, folded where they compute the gradients of their weights.

Megatron's ColumnParallelLinear and RowParallelLinear call ``self._forward_impl``, whose backward multiplies dY and X
into ``weight.main_grad`` (``wgrad_gemm_accum_fp32``). ``fold_layers`` puts another function there, whose backward hands
(dY, X) to gradfold instead. Call it when weights are loaded, before the optimizer is made, and leave these weights out
of Megatron's DistributedDataParallel: they have neither ``main_grad`` nor ``.grad``.

    fold_layers(model, tp_mesh)                                  # a DeviceMesh over the tensor-parallel ranks
    optimizer = gradfold.AdamW(model.named_parameters(), lr=3e-4)
    fold = gradfold.fold(model, optimizer, clip_norm=1.0)        # norms and votes are those of all ranks

Not here: data-parallel ranks, gated layers whose shards are interleaved (partition_stride > 1, refused), and norms
under sequence parallelism, whose gradients Megatron sums after backward.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from gradfold.backends import MatmulTerm, rows
from gradfold.engine import Demand, held, param_of
from gradfold.modules.routing import usable


def fold_layers(model, mesh):
    """Let every tensor-parallel linear layer hand over its weight's gradient; its weight becomes a DTensor."""
    for layer in model.modules():
        if not hasattr(layer, "_forward_impl"):
            continue
        for name in ("weight", "bias"):
            param = getattr(layer, name, None)
            if param is None or not getattr(param, "tensor_model_parallel", False):
                continue
            if param.partition_stride != 1:
                raise ValueError(
                    f"{name} of {layer}: partition_stride={param.partition_stride}, its rows are interleaved"
                )
            spread = DTensor.from_local(param.detach(), mesh, [Shard(param.partition_dim)], run_check=False)
            setattr(layer, name, nn.Parameter(spread, requires_grad=param.requires_grad))
        layer._forward_impl = forward_impl


def forward_impl(input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, tp_group, **_):
    """Compute what Megatron's ``linear_with_grad_accumulation_and_async_allreduce`` does."""
    param = param_of(weight, folded=False)
    if param is not None:
        param.folded = True
        param = usable(param)
    return FoldedWgrad.apply(input, weight, bias, param, allreduce_dgrad, sequence_parallel, tp_group)


class FoldedWgrad(torch.autograd.Function):
    """``LinearWithGradAccumulationAndAsyncCommunication`` without a gradient of the weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, param, allreduce_dgrad, sequence_parallel, group):
        # x: [S, B, K], or this rank's part of S under sequence parallelism -> [S, B, N of this rank]
        ctx.save_for_backward(x, weight, bias)
        ctx.param, ctx.allreduce, ctx.group = param, allreduce_dgrad, group
        ctx.gathers = sequence_parallel
        return F.linear(gathered(x, group) if ctx.gathers else x, held(weight), None if bias is None else held(bias))

    @staticmethod
    def backward(ctx, dY):
        x, weight, bias = ctx.saved_tensors
        demand = Demand.NOTHING
        if ctx.needs_input_grad[1]:
            demand = Demand.CAPTURE if ctx.param is None else ctx.param.admit()
        # Megatron gathers into one buffer that the next layer overwrites. A term may wait, for clipping or accumulation
        # or another use of the weight, so this one has memory of its own.
        total = gathered(x, ctx.group) if ctx.gathers else x
        dX, dW = dY @ held(weight), None
        if ctx.allreduce:
            dist.all_reduce(dX, group=ctx.group)
        elif ctx.gathers:
            whole, dX = dX.contiguous(), torch.empty_like(x)
            dist.reduce_scatter_tensor(dX, whole, group=ctx.group)
        if demand is Demand.STEP:
            ctx.param.hand(MatmulTerm(rows(dY), rows(total)), ctx)
        elif demand is Demand.CAPTURE:
            dW = as_given(rows(dY).t() @ rows(total), weight)
        db = as_given(rows(dY).sum(0), bias) if ctx.needs_input_grad[2] else None
        return dX, dW, db, None, None, None, None


def gathered(x, group):
    """Gather the tokens of all ranks, along the first dimension, into new memory."""
    out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def as_given(grad, param):
    """Return a gradient of this rank's part in the form of its parameter."""
    if not isinstance(param, DTensor):
        return grad
    return DTensor.from_local(grad, param.device_mesh, param.placements, run_check=False)
