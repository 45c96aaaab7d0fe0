"""Causal models of transformers whose loss comes from the loss head: the training is plain torch's."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from gradfold import FoldError
from gradfold.head.lazy_logits import LazyLogits
from gradfold.head.loss import FoldedHead, default_keep_bytes
from tests.llama import small_llama
from tests.zoo import RULES, distance, no_gradients, ours, torchs, twins

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("precise")

SMALL = dict(vocab_size=53, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
MODELS = {
    "llama": lambda: small_llama(**SMALL),
    "llama_tied": lambda: small_llama(**SMALL, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=4, num_key_value_heads=2, final_logit_softcapping=2.0
    ),
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=3.0),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=53, n_embd=8, n_layer=1, n_head=2, n_positions=16),
    "phi": lambda: transformers.PhiConfig(**SMALL),
}


def build(name):
    return transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager").eval()


def batch(step, **more):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 53, (2, 7), generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(2, 7, generator=generator) < 0.3, -100), **more}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 5}], ids=["", "items"])
def test_training(name, more):
    plain, folded = twins(lambda: build(name))
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1])
    for step in range(3):
        losses = []
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            out = model(**batch(step, **more))
            losses.append(out.loss.item())
            if model is folded:
                assert isinstance(out.logits, LazyLogits) and out.logits._made is None
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)
        assert no_gradients(folded)
    assert distance(folded, plain) <= 1e-11
    fold.remove()
    assert type(folded) is type(plain) and "_gradfold" not in str(vars(folded.get_output_embeddings()).keys())


def test_who_asks_for_logits_gets_them():
    plain, folded = twins(lambda: build("gemma2"))
    gradfold.fold(folded, ours(folded))
    wanted, found = plain(**batch(0)).logits, folded(**batch(0)).logits
    assert torch.equal(found[..., -1, :], wanted[..., -1, :]) and found.shape == wanted.shape
    assert torch.equal(torch.argmax(found, -1), wanted.argmax(-1))
    with torch.no_grad():
        assert isinstance(folded(**batch(0)).logits, torch.Tensor)
    assert isinstance(folded(batch(0)["input_ids"]).logits, torch.Tensor)


def test_it_looks_as_before():
    plain, folded = twins(lambda: build("llama"))
    gradfold.fold(folded, ours(folded))
    assert inspect.signature(folded.forward) == inspect.signature(plain.forward)
    assert isinstance(folded, transformers.LlamaForCausalLM) and str(folded) == str(plain)
    for copied in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert type(copied) is transformers.LlamaForCausalLM
        assert isinstance(copied(**batch(0)).logits, torch.Tensor)


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"clip_norm": 0.1}, {"working_set": gradfold.WorkingSet(interval=1, chunks=3)}]
)
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_with_other_options(options, reentrant):
    """Against the same fold of the plain head."""
    if reentrant and "working_set" in options:
        model = build("llama_tied").train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        gradfold.fold(model, ours(model), **options)
        with pytest.raises(FoldError, match="reentrant checkpoint with working_set="):
            model(**batch(0))
        return
    plain, folded = twins(lambda: build("llama_tied"))
    optimizers = ours(plain), ours(folded)
    for model, optimizer, head in zip((plain, folded), optimizers, ("plain", "fold"), strict=True):
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        gradfold.fold(model, optimizer, head=head, **options)
        for step in range(4):
            for micro in range(options.get("accumulate", 1)):
                model(**batch(10 * step + micro)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-11


def test_autocast():
    plain, folded = twins(lambda: build("llama"), torch.float32)
    gradfold.fold(folded, ours(folded))
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = folded(**batch(0)).loss, plain(**batch(0)).loss
    assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted.item(), rel=1e-3)


def test_a_hook_on_the_head_gets_a_tensor():
    _, model = twins(lambda: build("llama"))
    gradfold.fold(model, ours(model))
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
    model(**batch(0)).loss.backward()
    assert isinstance(seen[0], torch.Tensor)


def test_all_ignored():
    _, model = twins(lambda: build("llama"))
    gradfold.fold(model, ours(model))
    ids = batch(0)["input_ids"]
    assert model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.item() == 0


class Adapted(nn.Module):
    """A Linear with a low-rank branch beside it, as adapters wrap them."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted():
    model = build("llama").requires_grad_(False)
    model.lm_head = Adapted(model.lm_head)
    return model


def frozen(name):
    model = build(name)
    model.lm_head.requires_grad_(False)
    return model


def only_the_head():
    model = build("llama").requires_grad_(False)
    model.lm_head.requires_grad_()
    return model


def another_loss():
    model = build("llama")
    model.loss_function = squared
    return model


def squared(logits, labels, vocab_size, **kwargs):
    return logits.pow(2).mean() + F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def replaced_forward():
    model = build("llama")
    model.forward = functools.partial(type(model).forward, model)
    return model


def replaced_head_forward():
    model = build("llama")
    model.lm_head.forward = functools.partial(F.linear, weight=model.lm_head.weight)
    return model


class Own(transformers.LlamaForCausalLM):
    """Its loss is no call of loss_function."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Inherits(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class ScaledHead(nn.Linear):
    """A head that does more than its product, as Dory's."""

    def forward(self, x):
        return super().forward(x).float() * 2.0


def scaled_head():
    model = build("llama")
    scaled = ScaledHead(8, 53, bias=False)
    scaled.weight = model.lm_head.weight
    model.lm_head = scaled
    return model


SCENES = {  # what is folded, and what is said of its head
    "as it is": (lambda: build("llama"), ""),
    "frozen head": (lambda: frozen("llama"), ""),
    "frozen tied head": (lambda: frozen("llama_tied"), ""),
    "only the head": (only_the_head, ""),
    "forward of a base class": (lambda: Inherits(MODELS["llama"]()), ""),
    "adapter": (adapted, "its head is Adapted"),
    "head with a forward of its own": (replaced_head_forward, "its head's forward was replaced"),
    "forward of its own": (replaced_forward, "its model's forward was replaced"),
    "head that scales": (scaled_head, "its head is ScaledHead, with a forward of its own"),
    "loss in forward": (lambda: Own(MODELS["llama"]()), "Own computes its loss without loss_function"),
    "another loss": (another_loss, "its loss is squared, not transformers' ForCausalLMLoss"),
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("listed", [False, True])
def test_what_is_folded_and_what_is_said(scene, listed):
    """Training is torch's in any case. The optimizer may know frozen weights or not."""
    make, why = SCENES[scene]
    plain, folded = twins(make)
    trained = [p for p in folded.parameters() if listed or p.requires_grad]
    optimizers = torchs(plain), gradfold.AdamW(trained, **RULES["AdamW"])
    fold = gradfold.fold(folded, optimizers[1])
    (said,) = fold.report().heads
    assert (said.how, said.why) == ("plain" if why else "folded", why) and said.name == "lm_head"
    assert f"head lm_head: {said.how}" in str(fold.report())
    before = {name: p.clone() for name, p in folded.named_parameters() if not p.requires_grad}
    for step in range(3):
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            out = model(**batch(step))
            assert isinstance(out.logits, LazyLogits) is (model is folded and not why)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-11
    assert all(torch.equal(p, before[name]) for name, p in folded.named_parameters() if name in before)
    fold.remove()
    assert type(folded) is type(plain) and type(folded.get_output_embeddings()) is type(plain.get_output_embeddings())


def test_heads_in_the_report():
    _, model = twins(lambda: nn.ModuleDict({"policy": build("llama"), "critic": build("gpt2")}))
    fold = gradfold.fold(model, ours(model))
    assert [(row.name, row.how) for row in fold.report().heads] == [
        ("policy.lm_head", "folded"),
        ("critic.lm_head", "folded"),
    ]
    fold.remove()
    report = gradfold.fold(model, ours(model), head="plain").report()
    assert (report.heads[0].how, report.heads[0].why) == ("plain", "head='plain'")
    assert "head policy.lm_head: plain, since head='plain'" in str(report)
    other = nn.Linear(2, 2)
    assert "head" not in str(gradfold.fold(other, ours(other)).report())


def direct(model, inputs):
    """TRL and Liger: the loss from hidden states and the weight itself."""
    hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
    logits = hidden @ model.lm_head.weight.t()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def from_logits(model, inputs):
    """Preference losses: a forward without labels."""
    logits = model(input_ids=inputs["input_ids"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def replaced_on_the_instance(model):
    model.forward = lambda input_ids, labels: transformers.modeling_outputs.CausalLMOutputWithPast(
        loss=direct(model, {"input_ids": input_ids, "labels": labels})
    )


def replaced_on_the_class(model, monkeypatch):
    """As ``apply_liger_kernel_to_llama`` does."""

    def forward(self, input_ids, labels):
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            loss=direct(self, {"input_ids": input_ids, "labels": labels})
        )

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)


def replaced_head(model):
    model.lm_head.forward = functools.partial(F.linear, weight=model.lm_head.weight)


DIRECT = "its weight was used directly: a dense gradient was made"
AFTERWARDS = {  # what is done after fold(), what then runs, what is said before and after two steps
    "nothing": (None, None, "", ""),
    "a forward on the instance": (
        replaced_on_the_instance,
        None,
        "its model's forward was replaced after fold()",
        "its model's forward was replaced after fold()",
    ),
    "a forward on the class": (
        replaced_on_the_class,
        None,
        "its model's forward was replaced after fold()",
        f"{DIRECT} 2 times",
    ),
    "a head's forward": (
        replaced_head,
        None,
        "its head's forward was replaced after fold()",
        f"{DIRECT} 2 times",
    ),
    "the weight itself": (None, direct, "", f"{DIRECT} 2 times"),
    "logits": (None, from_logits, "", "its logits were computed, 2 times, and no loss from the head itself"),
    "compiled": (
        None,
        "compiled",
        "",
        "its logits were computed by compiled code; its weight stepped without a gradient",
    ),
}


@pytest.mark.parametrize("scene", AFTERWARDS)
def test_the_report_says_what_happened(scene, monkeypatch):
    change, loss, before, after = AFTERWARDS[scene]
    plain, folded = twins(lambda: build("llama"))
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1])
    if change is not None:
        change(folded, *([monkeypatch] if change is replaced_on_the_class else []))
    call = torch.compile(folded, backend="eager") if loss == "compiled" else folded
    (head,) = fold.report().heads
    assert (head.how, head.why) == ("plain" if before else "folded", before)
    for step in range(2):
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            if callable(loss):
                loss(model, batch(step)).backward()
            else:
                (call if model is folded else plain)(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-11
    report = fold.report()
    (head,) = report.heads
    assert (head.how, head.why) == ("plain" if after else "folded", after)
    row = next(row for row in report.rows if row.name == "lm_head.weight")
    assert row.route == ("hooked" if head.dense else "folded")
    assert (row.handed, row.dense) == ((0, 2) if head.dense else (2, 0))
    assert f"head lm_head: {head.how}" in str(report)


def test_logits_that_were_computed_as_well_are_said():
    _, model = twins(lambda: build("llama"))
    optimizer = ours(model)
    fold = gradfold.fold(model, optimizer)
    for step in range(3):
        out = model(**batch(step))
        if step:
            out.logits.argmax(-1)
        out.loss.backward()
        optimizer.step()
    (head,) = fold.report().heads
    assert (head.how, head.losses, head.logits, head.dense) == ("folded", 3, 2, 0)
    assert "head lm_head: folded; also computed: its logits 2 times" in str(fold.report())
    with torch.no_grad():
        model(**batch(0))
    assert fold.report().heads == (head,)  # an evaluation is no training


def test_a_wrapper_around_the_forward_is_no_replacement():
    """As Accelerate's for mixed precision."""
    _, model = twins(lambda: build("llama"))
    fold = gradfold.fold(model, ours(model))
    inner = model.forward
    model.forward = lambda **inputs: [inner(**inputs)][0]
    assert fold.report().heads[0].why == "its model's forward was replaced after fold()"
    model(**batch(0)).loss.backward()
    assert fold.report().heads[0].how == "folded"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"head": "both"}, "head='both'"),
        ({"head_keep_bytes": -1}, "head_keep_bytes=-1"),
        ({"head_keep_bytes": 1e6}, "head_keep_bytes=1000000.0"),
        ({"head_keep_bytes": True}, "head_keep_bytes=True"),
        ({"head_keep_bytes": 0, "head": "plain"}, "head='plain'"),
    ],
)
def test_refused_options(options, says):
    model = build("llama")
    with pytest.raises(FoldError, match=says):
        gradfold.fold(model, ours(model), **options)
    assert type(model) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("keep_bytes", [None, 0, 10_000])
def test_bytes_to_keep_reach_the_head(keep_bytes, monkeypatch):
    _, model = twins(lambda: build("llama"))
    gradfold.fold(model, ours(model), head_keep_bytes=keep_bytes)
    seen = []
    apply = FoldedHead.apply
    monkeypatch.setattr(FoldedHead, "apply", lambda *args: seen.append(args[-2]) or apply(*args))
    model(**batch(0)).loss.backward()
    assert seen == [default_keep_bytes(model.lm_head.weight.numel()) if keep_bytes is None else keep_bytes]


def test_paused_and_removed():
    plain, folded = twins(lambda: build("llama_tied"))
    fold = gradfold.fold(folded, ours(folded))
    plain(**batch(0)).loss.backward()
    with fold.paused():
        folded(**batch(0)).loss.backward()
    assert_gradients(folded, plain)
    folded.zero_grad()
    fold.remove()
    folded(**batch(0)).loss.backward()
    assert_gradients(folded, plain)


def assert_gradients(folded, plain):
    for (name, p), q in zip(folded.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-12, name


def test_evaluation_is_the_plain_heads():
    """As Trainer evaluates: without grad, with labels, for loss and logits."""
    plain, folded = twins(lambda: build("gemma2"))
    gradfold.fold(folded, ours(folded))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            wanted, found = plain(**batch(0)), folded(**batch(0))
        assert type(found.logits) is torch.Tensor
        assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: {**b, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 2)},
        lambda b: {**b, "shift_labels": b["labels"].roll(-1, 1)},
        lambda b: {**b, "num_items_in_batch": torch.tensor(9)},
        lambda b: {"input_ids": b["input_ids"][:1], "labels": b["labels"][0]},
        lambda b: {"input_ids": b["input_ids"], "labels": b["labels"].t().contiguous().t()},
        lambda b: {**b, "ignore_index": 5},
    ],
    ids=["packed", "shift_labels", "items", "labels of one dimension", "strided labels", "another ignored word"],
)
def test_batches(change):
    plain, folded = twins(lambda: build("llama_tied"))
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        model(**change({**batch(0), "labels": batch(0)["labels"].clamp(min=0)})).loss.backward()
        optimizer.step()
    assert distance(folded, plain) <= 1e-12


def test_two_forwards_and_one_that_failed():
    plain, folded = twins(lambda: build("llama_tied"))
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        with pytest.raises((IndexError, RuntimeError)):
            model(**{**batch(0), "labels": torch.full((2, 7), 53)})
        model(**batch(1))
        (model(**batch(2)).loss + model(**batch(3)).loss).backward()
        optimizer.step()
    assert distance(folded, plain) <= 1e-12
    assert isinstance(folded(batch(0)["input_ids"]).logits, torch.Tensor)
    assert "_gradfold_lazy_logits" not in vars(folded.lm_head)


def test_compiled_models_take_the_plain_way():
    plain, folded = twins(lambda: build("llama"))
    optimizer = ours(folded)
    gradfold.fold(folded, optimizer)
    out = torch.compile(folded, backend="eager", fullgraph=True)(**batch(0))
    assert not isinstance(out.logits, LazyLogits)
    assert out.loss.item() == pytest.approx(plain(**batch(0)).loss.item(), abs=1e-12)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_hooks_that_wait_for_a_tensor():
    """On the head, on every module, on the model's output."""
    plain, folded = twins(lambda: build("llama"))
    gradfold.fold(folded, ours(folded))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(out)))
    folded(**batch(0))
    handle.remove()
    assert LazyLogits not in seen and len(seen) > 5
    for model in (plain, folded):
        model.register_forward_hook(lambda module, args, out: out.to_tuple())
    (_, wanted, *_), (_, found, *_) = plain(**batch(0)), folded(**batch(0))
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    folded.register_full_backward_hook(lambda module, grad, out: None)  # a Function around the outputs
    folded(**batch(0))[0].backward()
