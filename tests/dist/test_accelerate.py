"""Accelerate's FSDP2, folded by ``gradfold.hf.prepare`` after it has sharded the model.

Accelerate takes FSDP2 on accelerators alone, and names the processes of a CPU MULTI_CPU. Here its state is told that
these are FSDP's. All that it then does is its own: wrapping by layer, its groups, the exchange of the optimizer's
parameters, accumulation and clipping.
"""

import contextlib
import os

import pytest
import torch

import gradfold
from tests.dist.test_fsdp import close, part
from tests.dist.tiny import batch, whole

pytest.importorskip("accelerate", reason="the framework: pip install accelerate")
pytest.importorskip("transformers")


@contextlib.contextmanager
def accelerator_of(steps=1, version=2, forced=True, **options):
    """A context with an Accelerator of all ranks that is set up for FSDP."""
    import accelerate
    from accelerate.state import AcceleratorState, GradientState, PartialState

    before = os.environ.get("ACCELERATE_USE_FSDP")
    try:
        made = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=version,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            **options,
        )
        if forced:
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = plugin
        yield made
    finally:
        kept = torch.distributed.destroy_process_group
        torch.distributed.destroy_process_group = lambda *_: None  # the world goes on
        try:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        finally:
            torch.distributed.destroy_process_group = kept
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        if before is not None:
            os.environ["ACCELERATE_USE_FSDP"] = before


def llama(tied=False):
    from transformers import LlamaForCausalLM

    from tests.llama import small_llama

    torch.manual_seed(0)
    config = small_llama(vocab_size=64, hidden_size=16, num_attention_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).double()


def run(fold, steps=1, clip=None, tied=False, kind=torch.optim.AdamW, **options):
    """Return the weights, the norms and the losses of a loop as Accelerate's documentation has it."""
    norms, losses = [], []
    with accelerator_of(steps, **options) as accelerator:
        model = llama(tied)
        optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
        prepare = accelerator.prepare
        if fold is not None:
            prepare = lambda *given: gradfold.hf.prepare(accelerator, *given, **fold)  # noqa: E731
        model, optimizer, scheduler = prepare(model, optimizer, scheduler)
        assert accelerator.is_fsdp2
        for micro in range(3 * steps):
            (ids,) = part(batch(0, micro)[:1])
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                losses.append(float(loss.detach()))
                if accelerator.sync_gradients and clip is not None:
                    norms.append(float(whole(accelerator.clip_grad_norm_(model.parameters(), clip))))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if fold is not None:
            assert type(optimizer.optimizer) is gradfold.AdamW
            assert accelerator.fold.model is model
            assert all(param.grad is None for param in model.parameters())
        return {name: whole(param.detach()) for name, param in model.named_parameters()}, norms, losses


def both(ways):
    """Return the largest differences between a plain and a folded loop."""
    found = []
    for fold, options in ways:
        (weights, norms, losses), (mine, true, own) = run(None, **options), run(fold, **options)
        assert len(norms) == len(true) == (0 if options.get("clip") is None else 3)
        found.append(
            (
                max(float((weights[name] - mine[name]).abs().max()) for name in weights),
                max((abs(a - b) for a, b in zip(norms, true, strict=True)), default=0.0),
                max(abs(a - b) for a, b in zip(losses, own, strict=True)),
            )
        )
    return found


PLAIN = {"head": "plain"}
WAYS = [
    ({**PLAIN, "clip_norm": 0.05}, {"steps": 2, "clip": 0.05}),
    (PLAIN, {}),
    ({**PLAIN, "timing": "deferred"}, {"steps": 2, "clip": 0.05, "tied": True}),
    ({"clip_norm": 0.05}, {"clip": 0.05, "reshard_after_forward": False}),
    (PLAIN, {"steps": 3, "clip": float("inf")}),
]


@pytest.mark.parametrize(
    "ways", [pytest.param(WAYS[:1], id="one"), pytest.param(WAYS, id="all", marks=pytest.mark.slow)]
)
def test_a_loop_of_ones_own(two, ways):
    for rank in two.run(both, ways):
        for weights, norms, losses in rank:
            assert weights <= 1e-11
            assert norms <= 1e-12
            assert losses <= 1e-11


def refusals():
    """Return whether each refusal leaves model and optimizer as they were."""
    found = []
    cases = [
        ({"version": 1}, {}, r"FSDP1, .*fsdp_version=2"),
        ({"forced": False}, {}, r"Accelerate is set up for MULTI_CPU with 2 processes: a folded model trains on one"),
        ({}, {"clip_norm": -1.0}, r"clip_norm=-1.0"),
        ({}, {"state": "int8"}, r"state='int8' is no option"),
    ]
    for options, fold, message in cases:
        with accelerator_of(**options) as accelerator:
            model = llama()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            with pytest.raises(gradfold.FoldError, match=message):
                gradfold.hf.prepare(accelerator, model, optimizer, **fold)
            found.append(type(optimizer) is torch.optim.AdamW and not hasattr(model.lm_head.weight, "placements"))
    with accelerator_of() as accelerator:
        model = llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
        close(optimizer)
        with pytest.raises(gradfold.FoldError, match="has states already, and Accelerate gives it other parameters"):
            gradfold.hf.prepare(accelerator, model, optimizer)
        found.append(type(optimizer) is torch.optim.AdamW)
    return found


def test_refused_before_the_model_is_sharded(two):
    assert all(map(all, two.run(refusals)))
