"""TRL's trainers, folded by one line, end where they end with torch's optimizer; their fused head is ours."""

import contextlib
import copy
import functools
import inspect
import io

import pytest
import torch

import gradfold
from tests.integrations.runs import USUAL, Run, assert_same, causal
from tests.zoo import distance, same_bits

trl = pytest.importorskip("trl", reason="the framework: pip install trl")
datasets = pytest.importorskip("datasets", reason="TRL needs it: pip install datasets")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
PLAIN = {"head": "plain"}
SAVED = {"save_strategy": "steps", "save_steps": 2}
LONG = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@functools.cache
def tokenizer():
    from tests.train.tiny import build_tokenizer

    return build_tokenizer()


def words(seed):
    from tests.train.tiny import sentence

    return sentence(seed, 6)


def said(role, seed):
    return [{"role": role, "content": words(seed)}]


TEXTS = [{"text": words(seed)} for seed in range(14)]
CHATS = [{"messages": said("user", seed) + said("assistant", seed + 50)} for seed in range(14)]
PAIRS = [{"prompt": words(seed), "chosen": words(seed + 20), "rejected": words(seed + 40)} for seed in range(14)]
JUDGED = [{"chosen": words(seed), "rejected": words(seed + 40)} for seed in range(14)]
PROMPTS = [{"prompt": words(seed)} for seed in range(8)]
SHORT = {"max_steps": 3, "max_length": 24}


def trains(kind, settings, rows, **others):
    """Return what makes a trainer of TRL's."""

    def make(model, arguments, log):
        data = datasets.Dataset.from_list(rows)
        reference = {"ref_model": copy.deepcopy(model)} if kind == "DPOTrainer" else {}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return getattr(trl, kind)(
                model=model,
                args=getattr(trl, kind.replace("Trainer", "Config"))(**{**arguments, **settings}),
                train_dataset=data,
                processing_class=tokenizer(),
                callbacks=[log],
                **reference,
                **others,
            )

    return make


def lengths(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


SFT = functools.partial(trains, "SFTTrainer")
ADAPTED = "adapters"
GRPO = {"max_completion_length": 4, "num_generations": 4, "per_device_train_batch_size": 4, "beta": 0.0, "max_steps": 2}
MADE = {
    "SFT, text": SFT(SHORT, TEXTS),
    "SFT, chat": SFT(SHORT | {"neftune_noise_alpha": 5.0}, CHATS),
    "SFT, packing": SFT(SHORT | {"packing": True, "max_length": 16}, TEXTS),
    "SFT, dft": SFT(SHORT | {"loss_type": "dft"}, TEXTS),
    "DPO": trains("DPOTrainer", SHORT, PAIRS),
    "Reward": trains("RewardTrainer", SHORT, JUDGED),
    "GRPO": trains("GRPOTrainer", GRPO, PROMPTS, reward_funcs=lengths),
}
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 1}
SLOW = {
    "SFT, smoothing": SFT(SHORT | {"label_smoothing_factor": 0.1}, TEXTS),
    "SFT, no checkpoints": SFT(SHORT | {"gradient_checkpointing": False}, CHATS),
    "DPO, ipo": trains("DPOTrainer", SHORT | SYNCED | {"loss_type": ["ipo"]}, PAIRS),
    "DPO, precomputed": trains("DPOTrainer", SHORT | {"precompute_ref_log_probs": True}, PAIRS),
    "GRPO, entropy": trains("GRPOTrainer", GRPO | {"entropy_coef": 0.1}, PROMPTS, reward_funcs=lengths),
    "GRPO, two iterations": trains("GRPOTrainer", GRPO | {"num_iterations": 2}, PROMPTS, reward_funcs=lengths),
}  # fmt: skip
HEADLESS, QUICK = ("Reward",), ("SFT, text", "DPO")


def model_for(name):
    if name == "Reward":
        torch.manual_seed(0)
        config = causal(vocab_size=300).config
        config.num_labels = 1
        return transformers.LlamaForSequenceClassification(config).double()
    return causal(vocab_size=300)


def run(folder, fold, name, made=None, **arguments):
    return Run(folder, fold, make=made or (MADE | SLOW)[name], model=model_for(name), **arguments)


def exact(tmp_path, name):
    """All logged numbers are compared: entropies, rewards, margins and accuracies too."""
    plain = run(tmp_path / "plain", None, name)
    folded = run(tmp_path / "folded", PLAIN, name)
    assert_same(folded, plain)
    assert distance(folded.model, model_for(name)) > 1e-3
    assert {"loss", "grad_norm"} <= folded.logs[0].keys() and type(folded.trainer).__name__ == type(
        plain.trainer
    ).__name__
    return plain


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=LONG) for name in MADE])
def test_trainers(tmp_path, name):
    """Four micro-batches a step, clipping and a schedule; with TRL's own fused head, whose gradient is dense."""
    plain = exact(tmp_path, name)
    if name in HEADLESS:
        return
    folded = run(tmp_path / "head", {}, name)
    assert_same(folded, plain, weights=1e-5, logs=1e-4)  # TRL's log-probabilities are in fp32
    report = folded.fold.report()
    assert [(head.how, head.logits, head.dense) for head in report.heads] == [("folded", 0, 0)]
    assert {row.name: row.dense for row in report.rows}["lm_head.weight"] == 0


@LONG
@pytest.mark.parametrize("name", SLOW)
def test_more_trainers(tmp_path, name):
    exact(tmp_path, name)


@LONG
@pytest.mark.parametrize("name", ["SFT, text", "SFT, packing", "DPO", "Reward"])
def test_resume(tmp_path, name):
    whole = run(tmp_path, PLAIN, name, **SAVED)
    again = run(tmp_path, PLAIN, name, resume=f"{tmp_path}/checkpoint-2")
    assert same_bits(whole.model, again.model) and again.logs[-1]["grad_norm"] == whole.logs[-1]["grad_norm"]


@LONG
def test_a_config_of_adapters(tmp_path):
    """TRL puts them on the model; the frozen head stays TRL's, which makes no gradient of it."""
    peft = pytest.importorskip("peft", reason="adapters: pip install peft")
    runs = []
    for fold in (None, {}):
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(1)
        made = trains("SFTTrainer", SHORT, TEXTS, peft_config=config)
        runs.append(run(tmp_path / str(fold), fold, "SFT, text", made))
    assert_same(runs[1], runs[0], weights=1e-6)
    (head,) = runs[1].fold.report().heads
    assert head.how == "plain" and "frozen" in head.why


# the fused head -------------------------------------------------------------------------------------------------------

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
IDS = torch.randint(4, 53, (2, 7), generator=torch.Generator().manual_seed(4))
LABELS = IDS.masked_fill(torch.arange(7) < 3, -100)
# what TRL's head is made with; how the model scales its logits
HEADS = {
    "plain": ({}, {}),
    "temperature": ({"temperature": 0.7}, {}),
    "scale": ({}, {"logit_scale": 0.3}),
    "soft-cap": ({"temperature": 1.3}, {"final_logit_softcapping": 2.0}),
    "all": ({"temperature": 1.3}, {"final_logit_softcapping": 2.0, "logit_scale": 0.3}),
}


def fused(name, outputs=("log_probs",), tied=False):
    settings, config = HEADS[name]
    model = causal(tie_word_embeddings=tied)
    for key, value in config.items():
        setattr(model.config, key, value)
    trl.trainer.utils.add_fused_lm_head(model, outputs=outputs, **settings)
    return model


def oracle(model, name):
    """Log-probabilities of the same labels, from logits in fp64."""
    settings, config = HEADS[name]
    logits = model(input_ids=IDS).logits[:, :-1] * config.get("logit_scale", 1.0)
    if cap := config.get("final_logit_softcapping"):
        logits = cap * torch.tanh(logits / cap)
    found = (logits / settings.get("temperature", 1.0)).log_softmax(-1)
    labels = LABELS[:, 1:]
    return found.gather(2, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels < 0, 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("outputs", [OUTPUTS, OUTPUTS[:1]], ids=len)
@pytest.mark.parametrize("name", HEADS)
def test_log_probabilities(name, outputs, tied):
    """All numbers are TRL's to the bit, in fp32; their gradient is that of the numbers in fp64."""
    plain, folded = (fused(name, outputs, tied) for _ in range(2))
    made, optimizers = [], []
    for model, kind in ((plain, torch.optim), (folded, gradfold)):
        optimizers.append(kind.SGD(model.parameters(), lr=0.1))
    fold = gradfold.fold(folded, optimizers[1])
    for model in (plain, folded):
        found = model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
        made.append(found)
    log_probs = oracle(plain, name)
    assert (made[1].log_probs - log_probs).abs().max() < 1e-5
    for key in OUTPUTS:
        mine, theirs = (getattr(found, key) for found in reversed(made))
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    weights = torch.linspace(-1, 1, log_probs.numel()).view_as(log_probs)
    for found in (log_probs, made[1].log_probs):
        (found * weights).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert distance(folded, plain) < 1e-13
    assert fold.report().heads[0].how == "folded" and not fold.report().heads[0].dense


def test_an_entropy_in_the_loss_is_reported():
    """Its gradient is TRL's, and dense."""
    plain, folded = (fused("plain", OUTPUTS) for _ in range(2))
    optimizers = torch.optim.SGD(plain.parameters(), lr=0.1), gradfold.SGD(folded.parameters(), lr=0.1)
    fold = gradfold.fold(folded, optimizers[1])
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        out = model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
        (out.loss - 0.1 * out.entropy.sum()).backward()
        optimizer.step()
    assert distance(folded, plain) < 1e-6
    assert str(fold.report().heads[0]) == "head lm_head: folded; also computed: a dense gradient of its weight once"


def test_a_plain_head_is_reported():
    model = fused("plain")
    optimizer = gradfold.SGD(model.parameters(), lr=0.1)
    fold = gradfold.fold(model, optimizer, head="plain")
    model(input_ids=IDS, labels=LABELS, fused_lm_head=True).loss.backward()
    optimizer.step()
    report = fold.report()
    assert report.heads[0].why == "head='plain'" and report.heads[0].dense == 1
    assert {row.name: row.route for row in report.rows}["lm_head.weight"] == "hooked"


def test_the_forward_is_given_back():
    model = fused("plain", OUTPUTS)
    before = model.forward
    fold = gradfold.fold(model, gradfold.SGD(model.parameters(), lr=0.1))
    assert model.forward is not before and "input_ids" in inspect.signature(model.forward).parameters
    logits = model(input_ids=IDS).logits
    with torch.no_grad():
        scored = model(input_ids=IDS, labels=LABELS, fused_lm_head=True)
    copied = copy.deepcopy(model)
    fold.remove()
    assert model.forward == before and torch.equal(model(input_ids=IDS).logits, logits)
    with torch.no_grad():
        for one in (model, copied):
            assert torch.equal(one(input_ids=IDS, labels=LABELS, fused_lm_head=True).log_probs, scored.log_probs)


def test_a_version_that_is_not_known(monkeypatch):
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            """Something else."""

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Other)
    model = fused("plain")
    (head,) = gradfold.fold(model, gradfold.SGD(model.parameters(), lr=0.1)).report().heads
    assert head.how == "plain" and head.why == "this version's fused head of TRL is not known"


def test_usual_arguments():
    assert USUAL["gradient_accumulation_steps"] == 4
