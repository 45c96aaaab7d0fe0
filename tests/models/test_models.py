"""Real architectures, built small from their configurations: folded steps equal torch's, and the routes are known."""

import functools
import os

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("precise")

import gradfold  # noqa: E402
from tests.llama import small_llama  # noqa: E402
from tests.zoo import compare, distance, no_gradients, ours, recorded, torchs, twins  # noqa: E402

V, H, T = 23, 16, 6  # vocabulary, width, tokens
SIZE = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def ids(step, rows=2):
    return torch.randint(0, V, (rows, T), generator=torch.Generator().manual_seed(step))


def language(model, step):
    return model(input_ids=ids(step), labels=ids(step)).loss


def llama(tied):
    return transformers.LlamaForCausalLM(small_llama(**SIZE, num_key_value_heads=1, tie_word_embeddings=tied))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=H, n_layer=2, n_head=2, n_positions=2 * T, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZE, **NO_DROPOUT, max_position_embeddings=T))


def albert():
    config = transformers.AlbertConfig(**SIZE, **NO_DROPOUT, embedding_size=8, max_position_embeddings=T)
    return transformers.AlbertForMaskedLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=V, d_model=H, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bart():
    """Word embeddings that scale what they look up, tied to the head, and positions that look up shifted ones."""
    size = {f"{end}_{what}": n for end in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
    config = transformers.BartConfig(
        **size, vocab_size=V, d_model=H, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=2 * T,
        scale_embedding=True, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def gemma3():
    config = transformers.Gemma3TextConfig(**SIZE, num_key_value_heads=1, head_dim=8, pad_token_id=0)
    return transformers.Gemma3ForCausalLM(config)


def vit():
    size = {key: value for key, value in SIZE.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**size, **NO_DROPOUT, image_size=8, patch_size=4, num_labels=5)
    return transformers.ViTForImageClassification(config)


def images(step, size=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, size, size, generator=generator), torch.randint(0, 5, (4,), generator=generator)


def classify(model, step):
    pixels, labels = images(step)
    return model(pixel_values=pixels.to(model.dtype), labels=labels).loss


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.ReLU()
        )
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, pixels):
        return self.head(self.body(pixels).flatten(1))


def cnn_loss(model, step):
    pixels, labels = images(step)
    return nn.functional.cross_entropy(model(pixels.to(model.head.weight.dtype)), labels)


def sequence(model, step, width=H):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, T, width, generator=generator).to(next(model.parameters()).dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(H, 2, batch_first=True, kdim=H // 2, vdim=H // 2)
        self.project = nn.Linear(H, H // 2)

    def forward(self, x):
        kv = self.project(x)
        return self.attention(x, kv, kv)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.lstm = nn.LSTM(H, H, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * H, V)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0])


# name -> (model, loss(model, step))
MODELS = {
    "llama": (functools.partial(llama, False), language),
    "llama_tied": (functools.partial(llama, True), language),
    "gpt2": (gpt2, language),
    "bert": (bert, language),
    "albert": (albert, language),
    "t5": (t5, language),
    "bart": (bart, language),
    "gemma3": (gemma3, language),
    "vit": (vit, classify),
    "cnn": (CNN, cnn_loss),
    "transformer": (
        lambda: nn.Transformer(H, 2, 1, 1, 24, dropout=0.0, batch_first=True),
        lambda m, step: m(sequence(m, step), sequence(m, step + 50)).pow(2).mean(),
    ),
    "attention": (Attention, lambda m, step: m(sequence(m, step)).pow(2).mean()),
    "lstm": (Recurrent, lambda m, step: nn.functional.cross_entropy(m(ids(step)).flatten(0, 1), ids(step).flatten())),
}
each_model = pytest.mark.parametrize("name", MODELS)
CHECKPOINTED = [name for name in MODELS if name in ("llama", "llama_tied", "gpt2", "bert", "t5", "bart", "vit")]


def trained(name, prepare=lambda model: None, steps=3, rule="AdamW"):
    make, loss = MODELS[name]

    def prepared():
        model = make().train()
        prepare(model)
        return model

    return compare(prepared, lambda m, o, step: loss(m, step).backward(), steps, rule)


@each_model
@pytest.mark.parametrize("rule", ["AdamW", pytest.param("SGD", marks=pytest.mark.slow)])
def test_steps(name, rule):
    assert trained(name, steps=4, rule=rule) <= 1e-10


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_its_own_gradient_checkpointing(name, reentrant):
    def prepare(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()

    assert trained(name, prepare, steps=2) <= 1e-10


@each_model
def test_gradients_in_fp64(name):
    make, loss = MODELS[name]
    plain, folded = twins(lambda: make().train())
    recorder, _ = recorded(folded, rows=5)
    loss(plain, 0).backward()
    loss(folded, 0).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert recorder.grads.keys() == expected.keys()
    for parameter, grad in expected.items():
        assert (recorder.grads[parameter] - grad).norm() <= 1e-13 * recorder.bounds[parameter], parameter
    assert no_gradients(folded)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "albert", "t5", "vit", "transformer"])
def test_under_autocast(name):
    """A step of SGD under bf16 autocast is as near to the exact one as torch's own is."""
    make, loss = MODELS[name]
    plain, folded = twins(lambda: make().train(), torch.float32)
    exact = twins(lambda: make().train())[0]
    optimizer = ours(folded, "SGD")
    gradfold.fold(folded, optimizer)
    start = [p.detach().clone() for p in plain.parameters()]
    for model, stepper in ((plain, torchs(plain, "SGD")), (folded, optimizer)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model, 0)
        value.backward()
        stepper.step()
    stepper = torchs(exact, "SGD")
    loss(exact, 0).backward()
    stepper.step()
    assert any(not torch.equal(a, b) for a, b in zip(start, folded.parameters(), strict=True))
    assert distance(folded, exact) <= 1.5 * distance(plain, exact)


# The parameters that are not folded, by the ends of their names. All others are, once a backward has shown it.
HOOKED = {
    "llama": ("norm.weight",),
    "llama_tied": ("norm.weight",),
    "gpt2": (".bias", "ln_1.weight", "ln_2.weight", "ln_f.weight"),
    "bert": (".bias", "LayerNorm.weight"),
    "albert": (".bias", "ayer_norm.weight", "LayerNorm.weight"),
    "t5": ("layer_norm.weight",),
    "bart": (".bias", "layer_norm.weight", "layernorm_embedding.weight"),
    "gemma3": ("norm.weight",),
    "vit": (
        ".bias",
        "cls_token",
        "position_embeddings",
        "norm.weight",
        "_before.weight",
        "_after.weight",
    ),
    "cnn": ("bias", "body.1.weight"),
    "transformer": ("bias", "norm1.weight", "norm2.weight", "norm3.weight", "norm.weight"),
    "attention": ("bias",),
    "lstm": ("bias", "_l0", "_l1", "_reverse"),
}


@each_model
def test_routes(name):
    make, loss = MODELS[name]
    model = make().train()
    fold = gradfold.fold(model, ours(model))
    loss(model, 0).backward()
    report = fold.report()
    hooked = {row.name for row in report.rows if row.route == "hooked"}
    assert hooked == {n for n, _ in model.named_parameters() if n.endswith(HOOKED[name])}
    assert {row.route for row in report.rows} <= {"folded", "hooked"}
    assert any(row.route == "folded" for row in report.rows)


def test_generation_and_evaluation_between_steps():
    def run(model, optimizer, step):
        model.eval()
        with torch.no_grad():
            model(input_ids=ids(step))
            model.generate(ids(step)[:1], max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=V - 1)
        model.train()
        language(model, step).backward()

    assert compare(gpt2, run) <= 1e-10


def test_part_of_a_model():
    """Classic fine-tuning: the trunk is frozen."""

    def make():
        model = llama(False)
        model.model.requires_grad_(False)
        model.model.layers[1].requires_grad_(True)
        return model

    assert compare(make, lambda m, o, step: language(m, step).backward()) <= 1e-10
