"""The logits of a folded head: what the world does with them is what it would do with the plain head's."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree

import gradfold
from gradfold import FoldError
from gradfold.head.lazy_logits import LazyLogits
from tests.models.test_heads import MODELS, batch, build
from tests.pairs import each_pair
from tests.zoo import distance, ours, torchs, twins

transformers = pytest.importorskip("transformers")

WORDS = 53


def made(name="llama", dtype=torch.float64, **options):
    plain, folded = twins(lambda: build(name), dtype)
    return plain, folded, gradfold.fold(folded, ours(folded), **options)


def pending(logits):
    return isinstance(logits, LazyLogits) and logits._made is None


def test_what_is_known_is_not_computed():
    plain, folded, _ = made(dtype=torch.float32)
    wanted, found = plain(**batch(0)).logits, folded(**batch(0)).logits
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "itemsize"):
        assert getattr(found, name) == getattr(wanted, name), name
    for name in ("size", "dim", "numel", "nelement", "is_floating_point", "element_size", "get_device"):
        assert getattr(found, name)() == getattr(wanted, name)(), name
    assert found.size(-1) == WORDS and torch.is_tensor(found) and torch.is_floating_point(found)
    assert "not computed yet" in repr(found) and "not computed yet" in str(folded(**batch(0)))
    assert pending(found)


ASKED = {
    "an index": lambda out: out.logits[:, -1],
    "out[1]": lambda out: out[1],
    "to_tuple": lambda out: out.to_tuple()[1],
    "argmax": lambda out: out.logits.argmax(-1),
    "torch.argmax": lambda out: torch.argmax(out.logits, dim=-1),
    "float": lambda out: out.logits.float(),
    "double": lambda out: out.logits.to(torch.float64),
    "detached numbers": lambda out: torch.from_numpy(out.logits.detach().float().numpy()),
    "operators": lambda out: (1 - out.logits) * 2 + -out.logits / 3 - (2 / out.logits.abs().clamp(min=1)),
    "a product": lambda out: out.logits @ torch.ones(WORDS, 2, dtype=out.logits.dtype),
    "a comparison": lambda out: out.logits > 0,
    "rows": lambda out: torch.stack(list(out.logits)),
    "a list of them": lambda out: torch.cat([out.logits, out.logits], 0),
    "a function of torch": lambda out: F.log_softmax(out.logits, -1),
    "temperature": lambda out: torch.softmax(out.logits / 0.7, -1),
    "a change in place": lambda out: out.logits.masked_fill_(out.logits > 0.1, -1.0),
    "a view changed in place": lambda out: out.logits[..., 0].zero_() + out.logits[..., 0],
    "a clone": lambda out: out.logits.contiguous().clone(),
    "scaled in half precision": lambda out: torch.tanh(out.logits.float() / 2.0) * 2.0,
    "kept in a file": lambda out: _saved(out.logits),
    "pickled": lambda out: pickle.loads(pickle.dumps(out)).logits,
    "flattened": lambda out: _pytree.tree_flatten(out)[0][1],
    "mapped": lambda out: _pytree.tree_map_only(torch.Tensor, lambda t: t.detach() * 2, out).logits,
}


def _saved(logits):
    file = io.BytesIO()
    torch.save(logits, file)
    file.seek(0)
    return torch.load(file)


@each_pair(how=ASKED.keys(), autocast=[False, True], name=["llama", "gemma2", "phi"])
def test_whoever_asks_gets_the_plain_heads_logits(how, autocast, name):
    """Also outside the autocast they belong to."""
    plain, folded, _ = made(name, torch.float32)
    answers = []
    for model in (plain, folded):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**batch(0))
        answers.append(ASKED[how](out))
    wanted, found = answers
    assert found.dtype == wanted.dtype and found.requires_grad == wanted.requires_grad
    assert torch.equal(found, wanted)


def test_without_a_dict():
    plain, folded, _ = made()
    (_, wanted, *_), (_, found, *_) = (model(**batch(0), return_dict=False) for model in (plain, folded))
    assert pending(found) and torch.equal(found.detach(), wanted)


def test_copies_are_refused_as_torch_refuses_them():
    _, folded, _ = made()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(folded(**batch(0)).logits)


def test_accelerate():
    operations = pytest.importorskip("accelerate.utils.operations")
    plain, folded, _ = made(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = plain(**batch(0)), folded(**batch(0))
    wanted, found = operations.convert_to_fp32(wanted), operations.convert_to_fp32(found)
    assert pending(found.logits) and found.logits.dtype == torch.float32  # mixed precision asks this of every output
    sent = operations.send_to_device(found, "cpu")
    assert torch.equal(sent.logits, wanted.logits)
    doubled = operations.recursively_apply(lambda t: t * 2, found)
    assert torch.equal(doubled.logits, wanted.logits * 2)


@pytest.mark.usefixtures("precise")
@pytest.mark.parametrize("name", MODELS)
def test_they_are_part_of_the_graph(name):
    """Read under no_grad first, and used beside the loss."""
    plain, folded = twins(lambda: build(name))
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    for step in range(3):
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            out = model(**batch(step))
            with torch.no_grad():
                out.logits.argmax(-1)
            (out.loss + 0.1 * out.logits.pow(2).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(folded, plain) <= 1e-11


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_read_without_grad_they_keep_their_graph(context):
    plain, folded, _ = made()
    found = []
    for model in (plain, folded):
        out = model(**batch(0))
        with context():
            out.logits.argmax(-1)
        found.append(torch.autograd.grad(out.logits.pow(2).mean(), model.model.norm.weight)[0])
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-13)


def test_a_weight_that_is_computed_or_lent():
    """Parametrized after the fold, or given for one call: the logits are there, of the weight of that call."""
    plain, folded, _ = made()
    other = {"lm_head.weight": 2 * plain.lm_head.weight.detach()}
    wanted, found = (torch.func.functional_call(model, other, (), batch(0)) for model in (plain, folded))
    assert torch.equal(found.logits, wanted.logits) and abs(found.loss - wanted.loss) < 1e-6
    for model in (plain, folded):
        torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    wanted, found = plain(**batch(0)), folded(**batch(0))
    assert torch.equal(found.logits, wanted.logits) and abs(found.loss - wanted.loss) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_not_after_the_step(tied):
    """They would be another model's."""
    _, folded, _ = made("llama_tied" if tied else "llama")
    out, read = folded(**batch(0)), folded(**batch(0))
    before = read.logits.detach().clone()
    out.loss.backward()
    with pytest.raises(FoldError, match="read them before backward, or fold with head='plain'"):
        out.logits.argmax(-1)
    assert torch.equal(read.logits, before)  # these had been computed
    assert out.logits.shape == before.shape


def test_not_after_the_hidden_states_changed():
    _, folded, _ = made()
    out = folded(**batch(0), output_hidden_states=True)
    with torch.no_grad():
        out.hidden_states[-1].zero_()
    with pytest.raises(FoldError, match="its input has changed"):
        out.logits.sum()


def test_after_an_accumulated_backward():
    """The head has not stepped yet."""
    plain, folded, _ = made(accumulate=2)
    out = folded(**batch(0))
    out.loss.backward()
    assert torch.equal(out.logits, plain(**batch(0)).logits)


def test_after_the_fold_was_removed():
    plain, folded, fold = made()
    out = folded(**batch(0))
    fold.remove()
    assert torch.equal(out.logits, plain(**batch(0)).logits)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_nothing_is_lost_silently():
    """Custom autograd Functions see a tensor that is not computed, and would send it their gradient."""
    _, folded, _ = made()
    out = folded(**batch(0))
    with pytest.raises(FoldError, match="custom autograd Function"):
        (out.loss + Doubled.apply(out.logits).sum()).backward()
    folded.zero_grad()
    out = folded(**batch(0))
    with pytest.raises(RuntimeError, match="to not have been used"):
        torch.autograd.grad(out.loss, out.logits)
    for ask in (lambda logits: logits.retain_grad(), lambda logits: logits.register_hook(print)):
        with pytest.raises(FoldError, match="head='plain'"):
            ask(folded(**batch(0)).logits)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(FoldError, match="not been computed"):
        torch.add(folded(**batch(0)).logits, 1)


class Masked(transformers.LlamaForCausalLM):
    """Bans a word in place, before the loss."""

    scale = 0.0

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        logits[..., 7] = -30.0
        logits = logits / self.scale if self.scale else logits
        return self.loss_function(logits=logits, labels=labels, vocab_size=WORDS)


class Meddling(transformers.LlamaForCausalLM):
    """Changes the head's input before the loss."""

    def forward(self, input_ids, labels=None):
        hidden = self.model(input_ids=input_ids).last_hidden_state.detach()
        logits = self.lm_head(hidden)
        hidden.zero_()
        return self.loss_function(logits=logits, labels=labels, vocab_size=WORDS)


def test_an_input_changed_before_the_loss_is_refused():
    folded = twins(lambda: Meddling(MODELS["llama"]()))[1]
    gradfold.fold(folded, ours(folded))
    with pytest.raises(FoldError, match="its input has changed"):
        folded(**batch(0))


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_changes_in_place_before_the_loss_count(scale, monkeypatch):
    monkeypatch.setattr(Masked, "scale", scale)
    plain, folded = twins(lambda: Masked(MODELS["llama"]()))
    gradfold.fold(folded, ours(folded))
    assert torch.equal(folded(**batch(0)), plain(**batch(0)))


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = batch(index)["input_ids"][0]
        return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_reads_them_in_evaluation_only(bf16, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    compute, computed = LazyLogits.tensor, []
    monkeypatch.setattr(LazyLogits, "tensor", lambda promise: computed.append(1) or compute(promise))
    options = {"max_grad_norm": 0.0, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    losses = []
    for model, how in zip(twins(lambda: build("llama_tied"), torch.float32), ("plain", "fold"), strict=True):
        optimizer = ours(model)
        gradfold.fold(model, optimizer, head=how)
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(str(tmp_path), max_steps=3, logging_steps=1, bf16=bf16, **options),
            train_dataset=Sentences(),
            eval_dataset=Sentences(),
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        )
        trainer.train()
        predicted = trainer.predict(Sentences())
        assert predicted.predictions.shape == (8, 7, WORDS)
        logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        losses.append([*logged, predicted.metrics["test_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3 if bf16 else 1e-5) and len(losses[0]) == 4
    assert not computed
