"""Memory estimates: how many layers of a model fit, by the bytes per parameter that each trainer keeps."""

from __future__ import annotations

from collections.abc import Iterable

BF16_BYTES = 2  # bytes of a weight, and of its gradient where one is kept
INSIDE = 0.94  # fraction of the free memory to use; the rest is for the allocator and for libraries

# bytes per parameter at the peak: weights, gradients and temporaries of whole models, states
PER_PARAMETER = {
    "torch fused": BF16_BYTES + BF16_BYTES + 4,
    "torch foreach": BF16_BYTES + BF16_BYTES + 4 + 4,  # two temporaries of the size of all parameters
    "torch hooks": BF16_BYTES + 4,
    "bitsandbytes 8-bit": BF16_BYTES + BF16_BYTES + 2.1,
    "torchao 8-bit": BF16_BYTES + BF16_BYTES + 2.1,
    "flashoptim release": BF16_BYTES + 1 + 2.1,
    "ours fp32": BF16_BYTES + 8,
    "ours bf16": BF16_BYTES + 4,
    "ours split8": BF16_BYTES + 1 + 2.1,
    "ours int8": BF16_BYTES + 2.1,
    "ours int8, folded head": BF16_BYTES + 2.1,
    "ours int4": BF16_BYTES + 1.1,
}


def parameters(layers: int, hidden: int, intermediate: int, vocabulary: int, kv: int) -> int:
    """Return the number of parameters of a Llama with a head of its own; kv: columns of the keys."""
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate + 2 * hidden
    return layers * layer + 2 * vocabulary * hidden + hidden


def activation_bytes(layers: int, hidden: int, intermediate: int, vocabulary: int, tokens: int) -> int:
    """Estimate activations: what forward keeps plus the peak of backward, bf16 layers and fp32 copies of logits."""
    layer = tokens * (16 * hidden + 5 * intermediate) * BF16_BYTES
    return layers * layer + 4 * tokens * vocabulary * 4


def needed_bytes(trainers: Iterable[str], shape: dict[str, int], layers: int, tokens: int) -> int:
    """Return the bytes at the peak with models of all these trainers allocated and one of them stepping."""
    count = parameters(layers, shape["hidden"], shape["intermediate"], shape["vocabulary"], shape["kv"])
    kept = sum(PER_PARAMETER[name.removesuffix(" graph")] for name in trainers)  # of a graph as without
    forward = activation_bytes(layers, shape["hidden"], shape["intermediate"], shape["vocabulary"], tokens)
    return int(kept * count) + forward


def layers_that_fit(trainers: Iterable[str], shape: dict[str, int], most: int, tokens: int, free_bytes: int) -> int:
    """Return the most layers, up to ``most``, with which models of all these trainers fit together; 0 if none."""
    names = list(trainers)
    for layers in range(most, 0, -1):
        if needed_bytes(names, shape, layers, tokens) <= INSIDE * free_bytes:
            return layers
    return 0
