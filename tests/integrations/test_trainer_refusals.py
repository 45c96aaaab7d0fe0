"""What a folded Trainer refuses, in words, before anything has moved or the trainer has changed."""

import copy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import gradfold
from tests.integrations.runs import ROWS, Run, causal, plain_trainer
from tests.zoo import same_bits

transformers = pytest.importorskip("transformers", reason="the framework: pip install transformers")
accelerate = pytest.importorskip("accelerate", reason="Trainer needs it: pip install accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[2]


class Log(transformers.TrainerCallback):
    """It logs nothing."""


def trainer(folder, model=None, **arguments):
    others = {key: arguments.pop(key) for key in ("optimizers", "optimizer_cls_and_kwargs") if key in arguments}
    usual = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "max_steps": 2, "disable_tqdm": True,
             "save_strategy": "no", "per_device_train_batch_size": 2}  # fmt: skip
    return plain_trainer(model or causal(), {**usual, **arguments}, Log(), **others)


def sparse_adam(model):
    return {"optimizers": (torch.optim.SparseAdam(model.parameters()), None)}


# of the Trainer, of the fold, the message
REFUSED = {
    "adafactor": (
        {"optim": "adafactor"},
        {},
        "optim='adafactor' cannot be folded; these can: adagrad, .*sgd",
    ),
    "galore": ({"optim": "galore_adamw", "optim_target_modules": "all-linear"}, {}, "optim='galore_adamw' cannot be f"),
    "lomo": ({"optim": "lomo"}, {}, "optim='lomo' cannot be folded"),
    "betas of optim_args": ({"optim_args": "betas=0.9"}, {}, "betas=0.9 is no option of gradfold.AdamW"),
    "no option of optim_args": (
        {"optim_args": "beta=3"},
        {},
        "beta=3 is no option of gradfold.AdamW; these are",
    ),
    "rate in optim_args": (
        {"optim_args": "lr=1"},
        {},
        r"lr=1 has no effect.*TrainingArguments\(learning_rate=",
    ),
    "decay in optim_args": ({"optim_args": "weight_decay=1"}, {}, r"use TrainingArguments\(weight_decay="),
    "optim_args": ({"optim_args": "states"}, {}, "optim_args='states': 'states' is not key=value"),
    "clip_norm": ({}, {"clip_norm": 1.0}, "clip_norm=1.0 follows from TrainingArguments.max_grad_norm; set it there"),
    "accumulate": ({}, {"accumulate": 2}, "accumulate=2 follows from TrainingArguments.gradient_accumulation_steps"),
    "norm_type": ({}, {"norm_type": 1}, "norm_type=1 follows from Trainer, which clips by the norm of order 2"),
    "an option": (
        {},
        {"state": "int8"},
        "fold_trainer: state='int8' is no option; these are: backend, cap",
    ),
    "clip": ({}, {"clip": "twice"}, "clip='twice': one of 'exact', 'two_pass', 'delayed'"),
    "two_pass, accumulate": (
        {"gradient_accumulation_steps": 4},
        {"clip": "two_pass"},
        "clip='two_pass' with 4 micro-batches a step.*use clip='exact'",
    ),
    "delayed, free": ({"max_grad_norm": 0.0}, {"clip": "delayed"}, "clip='delayed', and max_grad_norm=0 clips nothing"),
    "two_pass, retries": ({"auto_find_batch_size": True}, {"clip": "two_pass"}, "with auto_find_batch_size.*'exact'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_before_training(tmp_path, name):
    """At once, where the trainer is folded."""
    arguments, options, message = REFUSED[name]
    made = trainer(tmp_path, **arguments)
    kind = type(made)
    with pytest.raises(gradfold.FoldError, match=message):
        gradfold.hf.fold_trainer(made, **options)
    assert type(made) is kind and not hasattr(made, "fold_options") and type(made.model.lm_head) is nn.Linear


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_as_training_begins(tmp_path, name):
    """In a class of one's own."""
    arguments, options, message = REFUSED[name]
    made = trainer(tmp_path, **arguments)
    kind, start = type(made), copy.deepcopy(made.model)

    class Mine(gradfold.hf.FoldMixin, kind):
        fold_options = options

    made.__class__ = Mine
    with pytest.raises(gradfold.FoldError, match=message.removeprefix("fold_trainer")):
        made.train()
    assert same_bits(made.model, start) and type(made.model.lm_head) is nn.Linear and made.fold is None


def test_optimizers_that_cannot_be_folded(tmp_path):
    model = causal()
    start = copy.deepcopy(model)
    made = gradfold.hf.fold_trainer(trainer(tmp_path, model, **sparse_adam(model)))
    with pytest.raises(gradfold.FoldError, match="SparseAdam cannot be folded: it needs sparse gradients"):
        made.train()
    assert same_bits(model, start)
    model = causal()
    optimizer = gradfold.AdamW(model.parameters(), states=None)
    made = gradfold.hf.fold_trainer(trainer(tmp_path, model, optimizers=(optimizer, None)), states="bf16")
    with pytest.raises(gradfold.FoldError, match="states='bf16': the optimizer is gradfold's AdamW already"):
        made.train()
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(model, optimizer)
    made = gradfold.hf.fold_trainer(trainer(tmp_path, model, optimizers=(optimizer, None)))
    with pytest.raises(gradfold.FoldError, match=r"folded into a model already; call remove\(\)"):
        made.train()
    fold.remove()
    made.train()
    assert made.fold is not fold


def test_the_mixin_comes_first():
    message = r"Trainer comes before FoldMixin.*class Late\(gradfold.hf.FoldMixin, Trainer"
    with pytest.raises(gradfold.FoldError, match=message):

        class Late(transformers.Trainer, gradfold.hf.FoldMixin):
            """It would not be folded."""

    class Base(gradfold.hf.FoldMixin):
        def create_optimizer(self, *args):
            return super().create_optimizer(*args)

    class Early(Base, transformers.Trainer):
        """It is."""

    assert Early.create_optimizer is Base.create_optimizer


@pytest.mark.parametrize("what", ["a model", None], ids=str)
def test_no_trainer(what):
    with pytest.raises(gradfold.FoldError, match=r"fold_trainer\((str|NoneType)\): give a transformers.Trainer"):
        gradfold.hf.fold_trainer(what)


def test_a_clip_that_a_callback_changes(tmp_path):
    class Change(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.max_grad_norm = 1.0 if state.global_step == 0 else 0.25

    made = gradfold.hf.fold_trainer(trainer(tmp_path))
    made.add_callback(Change())
    with pytest.raises(gradfold.FoldError, match=r"max_grad_norm=0.25.*the fold has clip_norm=1.0"):
        made.train()
    assert made.state.global_step == 1


# several devices ------------------------------------------------------------------------------------------------------


def processes(made):
    made.accelerator.state._shared_state["num_processes"] = 2
    made.accelerator.state._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU


def sharded(made):
    made.accelerator.state._shared_state["distributed_type"] = accelerate.DistributedType.FSDP


def gpus(made):
    made.args._n_gpu = 2


def deepspeed(made):
    made.is_deepspeed_enabled = True


def fsdp(made):
    made.is_fsdp_enabled = True


def two_devices(made):
    made.model.model.layers[0].to("meta")


def shards(made):
    made.model.lm_head.weight.device_mesh = "mesh of 2"


def mesh(made):
    made.accelerator.state._shared_state["parallelism_config"] = types.SimpleNamespace(total_size=2)


SEVERAL = {
    processes: "Accelerate is set up for MULTI_GPU with 2 processes: a folded model trains on one device, in one",
    sharded: "Accelerate is set up for FSDP with 1 process: .*CUDA_VISIBLE_DEVICES=0",
    gpus: "2 GPUs are visible, over which Trainer puts DataParallel.*CUDA_VISIBLE_DEVICES=0",
    deepspeed: "DeepSpeed: a folded model trains on one device",
    fsdp: "FSDP: fold_trainer trains on one device.*gradfold.hf.prepare",
    two_devices: "the model lies on cpu, meta .device_map=.*one device",
    shards: "lm_head.weight is a shard .Parameter on mesh of 2.",
    mesh: "Accelerate has a parallelism_config",
}


@pytest.fixture
def accelerators():
    """Accelerate's state is the process's; it is put back."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("several", SEVERAL, ids=lambda f: f.__name__)
def test_several_devices(tmp_path, accelerators, several):
    made = trainer(tmp_path)
    kind = type(made)
    later = gradfold.hf.fold_trainer(trainer(tmp_path))
    for one in (made, later):
        several(one)
    with pytest.raises(gradfold.FoldError, match=SEVERAL[several]):
        gradfold.hf.fold_trainer(made)
    with pytest.raises(gradfold.FoldError, match=SEVERAL[several]):
        later.create_optimizer()
    assert type(made) is kind and made.optimizer is None and type(made.model.lm_head) is nn.Linear


# gradient caches ------------------------------------------------------------------------------------------------------


class CachedLoss(nn.Module):
    """The contract of a loss that caches gradients: embed all mini-batches, take the gradient by the embeddings, and
    embed each of them again inside ``loss.backward()``, with a backward of its own."""

    def __init__(self, model, mini_batch_size=1):
        super().__init__()
        self.model, self.mini_batch_size, self.cache = model, mini_batch_size, None

    def embed(self, ids):
        return self.model.model(ids).last_hidden_state.mean(1)

    def forward(self, ids):
        with torch.no_grad():
            whole = torch.cat([self.embed(part) for part in ids.split(self.mini_batch_size)])
        whole.requires_grad_()
        similar = whole @ whole.T
        loss = nn.functional.cross_entropy(similar, torch.arange(len(ids)))
        loss.backward()
        self.cache = whole.grad
        loss = loss.detach().requires_grad_()
        loss.register_hook(lambda grad: self.again(ids, grad))
        return loss

    def again(self, ids, grad):
        with torch.enable_grad():
            for part, cached in zip(ids.split(self.mini_batch_size), self.cache.split(self.mini_batch_size)):
                ((self.embed(part) * cached).sum() * grad).backward()


class Embeds(transformers.Trainer):
    """A Trainer with a loss that holds the model, as sentence-transformers'."""

    loss: nn.Module

    def compute_loss(self, model, inputs, **kwargs):
        return self.loss(inputs["input_ids"])


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_losses_that_cache_gradients(tmp_path, clip, monkeypatch):
    """Each step has many backwards, of which none knows whether it is the last."""

    def make(model, arguments, log):
        made = plain_trainer(model, arguments, log)
        made.__class__, made.loss = Embeds, CachedLoss(model)
        return made

    model = causal()
    model.lm_head.requires_grad_(False)
    runs = [
        Run(tmp_path / str(index), fold, make=make, model=copy.deepcopy(model), max_grad_norm=clip)
        for index, fold in enumerate((None, {}))
    ]
    assert [log["grad_norm"] for log in runs[1].logs] == pytest.approx(
        [log["grad_norm"] for log in runs[0].logs], rel=1e-9
    )
    for mine, theirs in zip(runs[1].model.parameters(), runs[0].model.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-12
    with pytest.raises(gradfold.FoldError, match="a loss that caches gradients.*use clip='exact'"):
        made = make(causal(), {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}, Log())
        gradfold.hf.fold_trainer(made, clip="two_pass")


def test_rows_are_there():
    assert len(ROWS) == 18


TWO_PROCESSES = """
import sys
import transformers
import gradfold.hf
from tests.integrations.runs import ROWS, causal

arguments = transformers.TrainingArguments(sys.argv[1], use_cpu=True, report_to=[], max_steps=1, disable_tqdm=True)
trainer = transformers.Trainer(causal(), arguments, train_dataset=ROWS)
try:
    gradfold.hf.fold_trainer(trainer)
except gradfold.FoldError as error:
    print("REFUSED", error)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*launch, str(tmp_path)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout.count("REFUSED Accelerate is set up for MULTI_CPU with 2 processes") == 2, done.stderr
