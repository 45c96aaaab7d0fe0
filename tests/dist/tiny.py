"""A small language model in fp64 whose modules take torch's parallel styles, its data, and one process's results."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, INNER, HEADS, LAYERS = 64, 32, 64, 4, 2
HYPER = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))

    def forward(self, x):
        batch, length = x.shape[:2]  # the heads of this rank only, where q, k and v are cut by columns
        q, k, v = (y.view(batch, length, -1, WIDTH // HEADS).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.inner = Norm(WIDTH), Attention(bias), Norm(WIDTH), FeedForward()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.inner(self.norm2(x))


class Tiny(nn.Module):
    """Embedding, layers, norm, head. Parts that are None are passed over: a stage is a Tiny without the rest."""

    def __init__(self, bias=True, layers=LAYERS, tied=False, checkpoint=None):
        super().__init__()
        self.checkpoint = checkpoint  # None, or use_reentrant
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({str(i): Layer(bias) for i in range(layers)})
        self.norm = Norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x) if self.embed is not None else x
        for layer in self.layers.values():
            if self.checkpoint is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.checkpoint)
        return x if self.head is None else self.head(self.norm(x))


def tiny(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Tiny(**options).to(dtype)


def batch(step, micro=0, rows=4, length=16):
    """Return token ids and labels, each ``[rows, length]``."""
    random = torch.Generator().manual_seed(100 + 17 * step + 1000 * micro)
    ids = torch.randint(0, VOCABULARY, (rows, length + 1), generator=random)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def loss_of(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def alone(steps=3, accumulate=1, clip=None, prepare=None, **options):
    """Return the model that torch's AdamW trains on one process, and the norms of its gradients."""
    model = tiny(**options)
    if prepare is not None:
        prepare(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **HYPER)
    norms = []
    for step in range(steps):
        for micro in range(accumulate):
            ids, labels = batch(step, micro)
            (loss_of(model(ids), labels) / accumulate).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


def whole(tensor):
    """Return all of a tensor that is spread over ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def furthest(model, reference):
    """Return the largest difference of any weight, on this rank's view of the whole."""
    theirs = dict(reference.named_parameters())
    found = {
        name: float((whole(param.detach()) - theirs[name].detach()).abs().max())
        for name, param in model.named_parameters()
    }
    return max(found.values())
