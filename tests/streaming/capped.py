"""A training script, run by test_capped.py: weights and states exceed the memory that the process may use.

    python capped.py WORKDIR MODEL STEPS CAP_MB

MODEL: "small" (8 layers of 1 MiB of weights) or "smollm2" (the shape of SmolLM2-135M, 0.5 GB in fp32). CAP_MB: how much
private memory the process may use above what the interpreter and its libraries have (RLIMIT_DATA); 0: no limit. It goes
on from a checkpoint in WORKDIR and saves one every few steps. It says what it does, a line each, and at the end what
came out.
"""

import hashlib
import mmap
import os
import re
import resource
import sys
from pathlib import Path

import torch
from torch import nn

import gradfold

WIDTH, SAVE_EVERY = 512, 2


class Layers(nn.Module):
    """Eight Linears in a list."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def smollm2():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()


def loss_of(model, step):
    draw = torch.Generator().manual_seed(step)
    if isinstance(model, Layers):
        x = torch.randn(8, WIDTH, generator=draw)
        return (model(x) - x.roll(1, 1)).pow(2).sum()
    ids = torch.randint(0, 49152, (1, 64), generator=draw)
    return model(input_ids=ids, labels=ids).loss


def say(*words):
    print(*words, flush=True)


def data_bytes():
    return int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def warm_up(stream):
    """Have all code loaded that a step loads: torch's optimizers bring its compiler in, larger than the model."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tiny = nn.Sequential(model[0], model[1])
    optimizer = gradfold.AdamW(tiny.parameters())
    gradfold.fold(tiny, optimizer, stream=gradfold.Stream(layers=["0", "1"]))
    tiny(torch.zeros(1, 2)).sum().backward()
    optimizer.step()


def main(place, name, steps, cap_mb):
    saved = place / "checkpoint.pt"
    make = {"small": Layers, "smollm2": smollm2}[name]
    stream = gradfold.Stream(offload="disk", folder=place / "scratch", tile_bytes=2**20 if name == "small" else 2**25)
    warm_up(stream)
    if name == "smollm2":
        import transformers.models.llama.modeling_llama  # noqa: F401
    own = data_bytes()
    if cap_mb:
        cap = own + int(cap_mb * 1e6)
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    torch.manual_seed(0)
    with stream.building():
        model = make()
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-4)
    gradfold.fold(model, optimizer, stream=stream)
    total = sum(param.nbytes for param in model.parameters())
    say("model", 3 * total)
    step = 0
    if saved.exists():
        torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)  # torch's private mapping would need the room
        found = torch.load(saved, mmap=True, weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        step = found["step"]
        del found
        say("loaded", step)
    while step < steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        say("step", step)
        if step % SAVE_EVERY == 0:
            say("saving", step)
            temporary = saved.with_suffix(".new")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
            os.replace(temporary, saved)
            say("saved", step)
    states = optimizer.state_dict()["state"]
    say("left", len(list((place / "scratch").iterdir())))
    say("weights", digest(model.parameters()))
    say("states", digest(states[index][key] for index in sorted(states) for key in sorted(states[index])))


if __name__ == "__main__":
    place, name, steps, cap_mb = sys.argv[1:]
    main(Path(place), name, int(steps), float(cap_mb))
