"""The contract of Megatron-LM's tensor-parallel linear layers, as far as its wgrad seam needs it, in our own words.

A layer has ``weight`` (this rank's part, with ``tensor_model_parallel``, ``partition_dim``, ``partition_stride``) and
``_forward_impl``, which it calls with keywords. Activations are ``[S, B, H]``; under sequence parallelism each rank has
a part of S between the layers.
"""

import torch
import torch.distributed as dist
from torch import nn


def marked(tensor, dim):
    """Return a parameter with what Megatron notes of it."""
    param = nn.Parameter(tensor.clone())
    param.tensor_model_parallel, param.partition_dim, param.partition_stride = True, dim, 1  # type: ignore
    return param


def part(tensor, dim, group):
    return tensor.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def not_folded(**_):
    raise AssertionError("the layer's own function was called")


class ColumnParallelLinear(nn.Module):
    def __init__(self, weight, bias, group, sequence_parallel):
        super().__init__()
        self.weight, self.bias = marked(part(weight, 0, group), 0), marked(part(bias, 0, group), 0)
        self.tp_group, self.sequence_parallel = group, sequence_parallel
        self._forward_impl = not_folded

    def forward(self, x):
        return self._forward_impl(
            input=x,
            weight=self.weight,
            bias=self.bias,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=not self.sequence_parallel,
            sequence_parallel=self.sequence_parallel,
            grad_output_buffer=None,
            wgrad_deferral_limit=None,
            tp_group=self.tp_group,
        )


class RowParallelLinear(nn.Module):
    def __init__(self, weight, group, sequence_parallel):
        super().__init__()
        self.weight, self.bias = marked(part(weight, 1, group), 1), None
        self.tp_group, self.sequence_parallel = group, sequence_parallel
        self._forward_impl = not_folded

    def forward(self, x):
        y = self._forward_impl(
            input=x,
            weight=self.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=False,
            sequence_parallel=False,
            grad_output_buffer=None,
            wgrad_deferral_limit=None,
            tp_group=self.tp_group,
        )
        return (Scattered if self.sequence_parallel else Reduced).apply(y, self.tp_group)


class Reduced(torch.autograd.Function):
    """The sum over ranks, on all of them; its gradient is everybody's."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Scattered(torch.autograd.Function):
    """The sum over ranks, a part of S on each of them."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
        dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(grad.shape[0] * dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.all_gather_into_tensor(out, grad.contiguous(), group=ctx.group)
        return out, None
