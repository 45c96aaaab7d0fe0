"""The loss head's memory: no logits, no gradient of its weight, on fake tensors as on real ones."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradfold
from gradfold.head import online_softmax as sweep
from gradfold.head import term as uses
from gradfold.head.loss import default_keep_bytes
from gradfold.planner.step import measure_step, step_memory
from tests.llama import small_llama

MIB = 2**20


class Net(nn.Module):
    def __init__(self, vocabulary, width, tied, dtype):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, dtype=dtype)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight


def in_blocks(keep_bytes: int | None = 0):
    def loss(model, batch):
        x = model.embed(batch["ids"])
        return gradfold.linear_cross_entropy(x, model.head.weight, batch["ids"], shift=True, keep_bytes=keep_bytes)

    return loss


def in_memory(model, batch):
    logits = model.head(model.embed(batch["ids"]))[..., :-1, :]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["ids"][..., 1:].flatten())


def adamw(params):
    return gradfold.AdamW(params, lr=1e-3)


class Largest(TorchDispatchMode):
    """The size of the largest new tensor."""

    size_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self.size_bytes = max(self.size_bytes, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1e-3}], ids=["", "clipped"])
def test_no_tensor_is_as_large_as_logits_or_gradient(tied, dtype, options, monkeypatch):
    vocabulary, width, tokens = 2048, 64, 128
    monkeypatch.setattr(sweep, "TILE_BYTES", 2**16)
    monkeypatch.setattr(uses, "HEAD_BYTES", 2**16)
    model = Net(vocabulary, width, tied, dtype)
    optimizer = adamw(model.parameters())
    gradfold.fold(model, optimizer, scratch_bytes=2**16, **options)
    batch = {"ids": torch.randint(0, vocabulary, (1, tokens))}
    with Largest() as largest:
        in_blocks()(model, batch).backward()
        optimizer.step()
    assert largest.size_bytes <= vocabulary * min(width, tokens) * dtype.itemsize // 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_fake_equals_real(tied, kept):
    model = Net(3001, 48, tied, torch.bfloat16)
    batch, loss = {"ids": torch.randint(0, 3001, (2, 33))}, in_blocks(2**30 * kept)
    predicted = step_memory(model, adamw, batch, loss=loss)
    twin = copy.deepcopy(model)
    measured = measure_step(twin, adamw(twin.parameters()), batch, fold=True, loss=loss)
    assert predicted.peak_bytes == measured.peak_bytes
    assert predicted.at_peak() == measured.at_peak()


def test_a_causal_model():
    pytest.importorskip("transformers")
    config = small_llama(8192)
    ids = torch.zeros(4, 512, dtype=torch.int64)

    def fold(how):
        return lambda model, optimizer: gradfold.fold(model, optimizer, **how)

    batch = {"input_ids": ids, "labels": ids}
    plain, default, head = (
        step_memory(config, adamw, batch, fold=fold(how)) for how in ({"head": "plain"}, {}, {"head_keep_bytes": 0})
    )
    logits = 4 * ids.numel() * config.vocab_size
    assert default.peak_bytes < plain.peak_bytes - logits // 2
    assert head.peak_bytes < plain.peak_bytes - logits


@pytest.mark.parametrize(
    ("weight", "kept"),
    [((128_256, 4_096), 512 * MIB), ((49_152, 576), 2 * 49_152 * 576), ((8, 4), 64), ((0, 4), 0)],
)
def test_a_small_head_keeps_less(weight, kept):
    assert default_keep_bytes(math.prod(weight)) == kept


@pytest.mark.parametrize("tokens", [128, 512])
@pytest.mark.parametrize("tied", [False, True])
def test_a_small_head_takes_less_than_its_gradient(tied, tokens):
    vocabulary, width = 8192, 256
    batch = {"ids": torch.zeros(1, 1, dtype=torch.int64).expand(1, tokens)}
    model = functools.partial(Net, vocabulary, width, tied, torch.float32)
    none, default = (step_memory(model, adamw, batch, loss=in_blocks(keep)) for keep in (0, None))
    gradient, hidden = 4 * vocabulary * width, 4 * tokens * width
    assert default.peak_bytes - none.peak_bytes <= 1.01 * gradient / 2  # and the largest logits of each block
    assert none.peak_bytes - none.resting_bytes <= gradient // 4 + 4 * hidden  # a block of logits, and its temporaries


@pytest.mark.slow
@pytest.mark.parametrize("keep_bytes", [0, 512 * MIB])
def test_peak_against_the_plain_head(keep_bytes):
    """T = 2,048, V = 128,256, H = 2,048 in bf16."""
    vocabulary, width, tokens = 128_256, 2_048, 2_048

    def build():
        return Net(vocabulary, width, True, torch.bfloat16)

    batch = {"ids": torch.zeros(1, 1, dtype=torch.int64).expand(1, tokens)}
    plain = step_memory(build, lambda p: torch.optim.AdamW(p, fused=True), batch, fold=False, loss=in_memory)
    head = step_memory(build, adamw, batch, loss=in_blocks(keep_bytes))
    logits = math.prod((tokens, vocabulary, 2))
    assert head.peak_bytes - head.resting_bytes <= 0.35 * (plain.peak_bytes - plain.resting_bytes)
    assert head.peak_bytes - head.resting_bytes <= 96 * MIB + (logits if keep_bytes else 0)
