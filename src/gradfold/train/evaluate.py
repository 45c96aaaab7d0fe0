"""Held-out loss and sample texts. Neither trains, nor changes the model's mode, nor draws a random number."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .model import quiet_transformers

if TYPE_CHECKING:
    from .run import Run


def evaluate(run: Run, stop: Callable[[], bool]) -> tuple[float | None, str | None]:
    """(held-out loss, sample), each None if the recipe wants none or `stop()` says so."""
    loss = held_out_loss(run, stop)
    count = run.recipe.evaluation.sample_tokens
    if not count or stop():
        return loss, None
    return loss, sample_text(run.model, run.tokenizer, run.data.sample_ids, count, run.device)


def asked(run: Run, stop: Any) -> Callable[[], bool]:
    """Whether a measurement is to end early. On many ranks it is not: the signal reaches them at different times."""
    return (lambda: bool(stop)) if run.ranks is None else (lambda: False)


@torch.no_grad()
def held_out_loss(run: Run, stop: Callable[[], bool]) -> float | None:
    """Mean loss per target of the held-out sequences, in nats; None if there are none, or if `stop()` says so."""
    model, data, objective = run.model, run.data, run.objective
    if not data.held_out:
        return None
    total, targets = 0.0, 0
    ranks = run.ranks
    with evaluating(model):
        for batch in data.held_out_batches():
            if stop():
                return None
            part = batch if ranks is None else ranks.part_of(batch, data.paired)
            # where a part has no targets, other ranks still need this one's part of the weights
            total += objective.loss(model, objective.inputs(part, run.device)).item() * part.targets
            targets += part.targets
    objective.figures()  # those of a measurement are not a step's
    if ranks is not None:
        total, targets = ranks.sums([total, targets])  # under tensor parallelism both count each batch ``size`` times
    return total / targets


@torch.no_grad()
def sample_text(model: Any, tokenizer: Any, ids: list[int], count: int, device: torch.device) -> str:
    """What the model writes after `ids`, the likeliest token each time; at most `count` tokens."""
    limit = getattr(model.config, "max_position_embeddings", None) or len(ids) + count
    ids = ids[-max(1, limit - count) :]
    prompt = torch.tensor([ids], device=device)
    end = tokenizer.eos_token_id
    with evaluating(model), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on generation settings of the model, which we do not use
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=min(count, max(1, limit - len(ids))),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
        )
    return as_read(tokenizer, output[0, len(ids) :].tolist())


def as_read(tokenizer: Any, ids: list[int]) -> str:
    """Tokens as text with the special ones written out, which tell turns apart, but for the end and the padding."""
    while ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and after that as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
