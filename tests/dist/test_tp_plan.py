"""transformers' own tensor parallelism (tp_plan="auto"), which sets the forwards of modules."""

import contextlib
import functools

import pytest
import torch
from torch import nn

import gradfold
from tests.dist.parts import said
from tests.dist.tiny import HYPER, VOCABULARY, batch, furthest, loss_of
from tests.dist.world import collectives

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def save(folder, name, **options):
    """Write a tiny causal model."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    getattr(transformers, f"{name}ForCausalLM")(config).double().save_pretrained(folder)


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)


def step_of(model, optimizer, step):
    ids, labels = batch(step)
    loss_of(model(ids).logits, labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(folder, options, checkpoint=False, paused=None):
    """Return the distance from one process, rows of the report, and what remove() leaves."""
    reference, model = load(folder), load(folder, tp_plan="auto")
    if checkpoint:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plain = torch.optim.AdamW(reference.parameters(), **HYPER)
    kept = forwards(model)
    optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
    fold = gradfold.fold(model, optimizer, **options)
    differences = []
    for step in range(3):
        ids, labels = batch(step)
        loss_of(reference(ids).logits, labels).backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), options.get("clip_norm", float("inf")))
        plain.step()
        plain.zero_grad()
        with fold.paused() if step == paused else contextlib.nullcontext():
            step_of(model, optimizer, step)
        if step != paused:
            differences.append(abs(fold.grad_norm / float(norm) - 1))
    with torch.no_grad():  # transformers takes another way there
        even = float((model(batch(9)[0]).logits - reference(batch(9)[0]).logits).abs().max())
    report = fold.report()
    rows = {row.name: (row.route, row.why) for row in report.rows}
    fold.remove()
    undone = forwards(model) == kept
    for each, of in ((model, optimizer), (reference, plain)):
        step_of(each, of, 4)
    return furthest(model, reference), max(differences), rows, undone, even, str(report)


def forwards(model):
    """Return what is called for each module: its class, and the forward behind what a tp_plan has set."""
    from gradfold.modules.tp_plan import inner_forward

    return [(type(module), (cell := inner_forward(module)) and cell.cell_contents) for module in model.modules()]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save(folder, "Llama", tie_word_embeddings=False)
    return str(folder)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    save(folder, "Qwen3", tie_word_embeddings=False)
    return str(folder)


def check(found, count):
    for weights, norms, rows, undone, even, report in found:
        assert weights <= 1e-11
        assert norms <= 1e-12
        assert even <= 1e-11
        assert sum(route == "folded" for route, _ in rows.values()) == count
        assert undone
        assert (
            "head lm_head: plain, since its logits were computed, 3 times, and no loss from the head itself" in report
        )


def test_llama(two, llama):
    found = two.run(train, llama, {"clip_norm": 0.05})
    check(found, 16)
    assert all(len(rows) == 21 for _, _, rows, *_ in found)


def test_norms_that_only_see_some_heads(two, qwen3):
    """Qwen3's q_norm and k_norm: the plan sums their gradients by hooks, and so does the fold."""
    check(two.run(train, qwen3, {}, False, 1), 16)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"timing": "deferred"}, {"clip_norm": 0.05}], ids=["auto", "deferred", "clip"])
def test_more_options(two, llama, options):  # not four: there are two key and value heads
    check(two.run(train, llama, options, True), 16)


def sent(folder):
    """Return the collectives of a plain and of a folded forward and backward."""
    found = []
    for folded in (False, True):
        model = load(folder, tp_plan="auto")
        if folded:
            optimizer = gradfold.AdamW(model.named_parameters(), **HYPER)
            fold = gradfold.fold(model, optimizer)
        ids, labels = batch(0)
        with collectives() as log:
            loss_of(model(ids).logits, labels).backward()
        found.append(log)
    optimizer.step()
    fold.remove()
    return found


def test_folding_sends_nothing_more(two, llama):
    for plain, folded in two.run(sent, llama):
        assert len(plain) > 8
        assert folded == plain


# other forwards on instances ------------------------------------------------------------------------------------------


def test_report_says_why_a_module_is_hooked():
    """Whatever else has set a module's forward calls that of its class unseen."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrapped, self.partial, self.plain = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x):
            return self.plain(self.partial(self.wrapped(x)))

    model = Holder()
    inner = model.wrapped.forward

    @functools.wraps(inner)
    def forward(x):
        return inner(x)

    model.wrapped.forward = forward
    model.partial.forward = functools.partial(inner.__func__, model.partial)
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(model, optimizer)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    report = str(fold.report())
    rows = {row.name: row for row in fold.report().rows}
    assert rows["plain.weight"].route == "folded"
    assert rows["wrapped.weight"].route == rows["partial.weight"].route == "hooked"
    assert "wrapped.weight: hooked, since wrapped: " in report
    assert "was set as its forward, and calls that of its class unseen" in rows["wrapped.weight"].why
    assert "was set as its forward" in rows["partial.weight"].why
    assert not rows["plain.weight"].why
    fold.remove()
    assert said(lambda: model(torch.ones(2, 4))) == ""
