"""A training script, run by test_out_of_memory.py: 4 MiB of weights a layer, 8 MiB of states, and room for some.

    python capped.py WORKDIR MODE LAYERS STEPS [SHARE]

MODE: "disk", "resident" (a working set that offloads nothing), "plain" (no working set). SHARE: once the model is
built, the process gets room for this share of the states (RLIMIT_DATA: all private writable memory). It goes on from a
checkpoint in WORKDIR and saves one every few steps. It says what it does, a line each, and at the end what came out.
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

WIDTH, INTERVAL, SAVE_EVERY = 1024, 2, 5


def say(*words):
    print(*words, flush=True)


def data_bytes():
    return int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def warm_up():
    """Have all code loaded that a step loads: torch's optimizers bring its compiler in, larger than the states."""
    tiny = nn.Linear(2, 2)
    optimizer = gradfold.AdamW(tiny.parameters())
    gradfold.fold(tiny, optimizer)
    tiny(torch.zeros(1, 2)).sum().backward()
    optimizer.step()


def main(place, mode, count, steps, share=None):
    saved = place / "checkpoint.pt"
    torch.manual_seed(0)
    layers = [layer for _ in range(count) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*layers)
    states_bytes = 2 * sum(param.numel() * param.element_size() for param in model.parameters())
    if share is not None:
        warm_up()
        cap = data_bytes() + int(share * states_bytes)
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    options = {"offload": "disk", "folder": place / "states"} if mode == "disk" else {}
    working_set = None if mode == "plain" else gradfold.WorkingSet(chunks=count, interval=INTERVAL, **options)
    fold = gradfold.fold(model, optimizer, working_set=working_set)
    say("files", len(list((place / "states").glob("[!.]*"))))
    step = 0
    if saved.exists():
        torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)  # torch's private mapping would need the room
        found = torch.load(saved, mmap=True, weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        step = found["step"]
        del found
        say("loaded", step, fold.working_set.chunk, fold.working_set.step)
    while step < steps:
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        (model(x) - x.roll(1, 1)).pow(2).sum().backward()
        optimizer.step()
        step += 1
        say("step", step)
        if step % SAVE_EVERY == 0:
            say("saving", step)
            temporary = saved.with_suffix(".new")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
            os.replace(temporary, saved)
            say("saved", step)
    states = optimizer.state_dict()["state"]
    ordered = [states[index][name] for index in sorted(states) for name in sorted(states[index])]
    say("weights", digest(model.parameters()))
    say("states", digest(ordered))


if __name__ == "__main__":
    place, mode, count, steps, *share = sys.argv[1:]
    main(Path(place), mode, int(count), int(steps), float(share[0]) if share else None)
