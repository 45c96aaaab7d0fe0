"""Models that stream, their batches, and how they train: with torch, folded, and folded with a stream."""

import torch
import transformers
from torch import nn

import gradfold
from gradfold.streaming import Streamer
from tests.llama import small_llama
from tests.moe import mixtral

V, T = 19, 6


class Stack(nn.Module):
    """Linears in a ModuleList, and two outside of it."""

    def __init__(self, layers=4, width=12):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))
        self.last = nn.Linear(width, 8, bias=False)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


class Shared(nn.Module):
    """One block that runs three times, and a weight that two blocks share."""

    def __init__(self, width=12):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x):
        for layer in (self.layers[0], self.layers[1], self.layers[1], self.layers[1], self.layers[2]):
            x = torch.tanh(layer(x))
        return x


def llama(**changes):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4}
    return transformers.LlamaForCausalLM(small_llama(V, **{**sizes, **changes}))


def gpt2(**changes):
    sizes = {"vocab_size": V, "n_positions": 16, "n_embd": 12, "n_layer": 3, "n_head": 2}
    ends = {"bos_token_id": None, "eos_token_id": None}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, **{**drop, **changes}))


def t5():
    sizes = {"vocab_size": V, "d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 3, "num_heads": 2}
    config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return transformers.T5ForConditionalGeneration(config)


MODELS = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "t5": t5,
    "mixtral": lambda: mixtral("eager"),
    "stack": Stack,
    "shared": Shared,
}


def made(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]() if isinstance(name, str) else name()
    return model.to(dtype).train()


def loss_of(model, number):
    """The loss of one batch; batches of all models are made from its number."""
    draw = torch.Generator().manual_seed(number)
    if isinstance(model, Stack | Shared):
        width = 8 if isinstance(model, Stack) else 12
        x = torch.randn(5, width, generator=draw, dtype=torch.float64)
        weight = next(model.parameters())
        return (model(x.to(weight.dtype)) - x.to(weight.dtype).roll(1, 1)).square().sum()
    ids = torch.randint(2, V, (2, T), generator=draw)
    return model(input_ids=ids, labels=ids).loss


def ghostly(monkeypatch):
    """Let weights that are away show NaNs without memory, as on a GPU."""
    begin = Streamer.__init__

    def init(self, config, model, ghosts=None):
        begin(self, config, model, ghosts=True)

    monkeypatch.setattr(Streamer, "__init__", init)


def train(model, optimizer, steps, fold=None, accumulate=1, clip_norm=None):
    """Take steps ``steps``; with torch, or with a fold."""
    for step in steps:
        for micro in range(accumulate):
            loss = loss_of(model, step * accumulate + micro) / accumulate
            loss.backward() if fold is None else fold.backward(loss)
        if fold is None and clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def folded(name, stream=None, *, dtype=torch.float64, rule="AdamW", lr=1e-2, seed=0, storage=None, **options):
    model = made(name, dtype, seed)
    optimizer = getattr(gradfold, rule)(model.parameters(), lr=lr, **(storage or {}))
    more = {} if stream is None else {"stream": stream}
    return model, optimizer, gradfold.fold(model, optimizer, **more, **options)


def distance(one, other):
    """The largest difference of two models' weights; NaNs count as infinitely far."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    return max(
        ((a[name].double() - b[name].double()).abs().max().nan_to_num(torch.inf).item() for name in a), default=0
    )


def same_bits(one, other):
    """Two (model, optimizer): the same bits in weights and in states."""
    a, b = one[0].state_dict(), other[0].state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), "weights"
    mine, theirs = one[1].state_dict()["state"], other[1].state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for index in mine:
        assert mine[index].keys() == theirs[index].keys()
        for name, value in mine[index].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[index][name])), (index, name)
