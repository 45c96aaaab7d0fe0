"""The heads of transformers' models under ``tp_plan="auto"``."""

import pytest
import torch
import torch.nn.functional as F

import gradfold
from tests.dist.tiny import HYPER, batch, furthest
from tests.llama import small_llama

pytest.importorskip("transformers")


def train(folder, read_logits, clip):
    """Train a model that its tp_plan has spread; return differences from one process, and what the report says."""
    from transformers import AutoModelForCausalLM

    def losses(model, optimizer):
        for step in range(2):
            ids, _ = batch(step)
            out = model(input_ids=ids, labels=ids)
            loss = out.loss
            if model is reference:  # transformers' own is of logits in fp32
                loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            (loss + 1e-3 * out.logits.square().mean() if read_logits else loss).backward()
            yield float(loss.detach())
            if clip and isinstance(optimizer, torch.optim.AdamW):
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = list(losses(reference, torch.optim.AdamW(reference.parameters(), **HYPER)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, tp_plan="auto")
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, clip_norm=clip)
    got = list(losses(model, optimizer))
    (row,) = fold.report().heads
    with torch.no_grad():
        ids, _ = batch(0)
        logits = float((model(input_ids=ids).logits - reference(input_ids=ids).logits).abs().max())
    forward = vars(model.lm_head).get("forward", None)
    fold.remove()
    back = "forward" in vars(model.lm_head) and forward is None
    return furthest(model, reference), max(abs(a - b) for a, b in zip(got, expected)), logits, str(row), row, back


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(small_llama(vocab_size=64, hidden_size=32, num_hidden_layers=1)).double().save_pretrained(made)
    return str(made)


@pytest.mark.parametrize(
    ("read_logits", "clip"),
    [
        pytest.param(False, None, id="no logits"),
        pytest.param(False, 0.05, id="clipped", marks=pytest.mark.slow),
        pytest.param(True, None, id="logits are read, too", marks=pytest.mark.slow),
    ],
)
def test_the_head_is_folded(two, folder, read_logits, clip):
    for weights, losses, logits, said, row, back in two.run(train, folder, read_logits, clip):
        assert weights <= 1e-11 and logits <= 1e-9
        assert losses <= 1e-12
        assert said.startswith("head lm_head: folded")
        assert (row.logits > 0) is read_logits
        assert row.dense == 0
        assert back
