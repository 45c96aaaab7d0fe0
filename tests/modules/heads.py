"""What the tests of the loss head share: operands, and the loss by torch's own functions."""

import torch
import torch.nn.functional as F

CLOSE = 1e-12
V, H, B, T = 37, 6, 2, 11  # the vocabulary is no multiple of a block of 7


KEPT = ["again", "part", "kept"]  # of the softmax: nothing, two blocks of words, all
EACH_OPTION = {"label_smoothing": [0.0, 0.1], "z_loss": [0.0, 1e-2], "softcap": [None, 1.5]}


def some(*shape, dtype=torch.float64, seed=0, scale=1.0):
    made = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(dtype).requires_grad_()


def words(*shape, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def torchs_losses(x, weight, labels, bias=None, label_smoothing=0.0, z_loss=0.0, softcap=None):
    """From logits in memory, by torch's own functions."""
    logits = F.linear(x, weight, bias).flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    losses = F.cross_entropy(logits, labels.flatten(), label_smoothing=label_smoothing, reduction="none")
    return losses + z_loss * (labels.flatten() != -100).to(losses) * logits.logsumexp(-1) ** 2


def gap(found, wanted):
    return float(torch.stack([(a - b).detach().abs().max() for a, b in zip(found, wanted, strict=True)]).max())
