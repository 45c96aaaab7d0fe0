"""Folded modules in regions that torch.compile has compiled: exact, and without a gradient in the graph."""

import copy
import gc
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import gradfold
from gradfold.errors import FoldError
from tests.llama import small_llama
from tests.zoo import CHECKPOINTS, SCENES, Net, batches, compare, distance, no_gradients, ours, torchs, twins

CLOSE = 1e-10
V, H = 17, 6


@pytest.fixture(autouse=True)
def forgotten():
    """Begin with no compiled code; a table of scenes is more than torch compiles one function for."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch.compiler.reset()


def folded(model):
    return any("plain_class" in vars(type(module)) for module in model.modules())


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# exact ----------------------------------------------------------------------------------------------------------------

QUICK = {("reentrant", "tied_and_direct"), ("non_reentrant", "tied"), ("mixed", "inside_and_after"), ("none", "summed")}


@pytest.mark.parametrize(
    ("kind", "scene"),
    [
        pytest.param(kind, scene, marks=() if (kind, scene) in QUICK else pytest.mark.slow)
        for kind in CHECKPOINTS
        for scene in SCENES
    ],
)
def test_layers_in_checkpoints(kind, scene):
    def run(model, optimizer, step):
        if step == 0 and folded(model):
            gradfold.compile_layers(model, backend="aot_eager", fullgraph=True)
        model.loss(batches(3)[step], kind, step).backward()

    assert compare(lambda: Net(scene), run) <= CLOSE


def test_a_checkpoint_inside_a_region():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V)

        def forward(self, ids):
            part = lambda x: torch.tanh(self.up(x))  # noqa: E731
            return self.down(torch.utils.checkpoint.checkpoint(part, self.embed(ids), use_reentrant=False))

    def run(model, optimizer, step):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(torch.arange(10).view(2, 5) + step).square().mean().backward()

    assert compare(Inside, run) <= CLOSE


def llama(tied):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(small_llama(96, 32, 2, tie_word_embeddings=tied, use_cache=False))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(use_cache=False, **sizes, **dropouts, **special))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "use_cache": False}
    return T5ForConditionalGeneration(T5Config(**sizes, **tokens, dropout_rate=0.0))


def moe():
    from tests.moe import MODELS

    model = MODELS["qwen3_moe"]("grouped_mm")
    model.config.use_cache = False
    return model


@pytest.fixture
def grouped_in_fp64(monkeypatch):
    """Let transformers take its own grouped product for fp64, which torch's does not multiply, in eager code too."""
    integrations = pytest.importorskip("transformers.integrations.moe")
    able = integrations._can_use_grouped_mm
    monkeypatch.setattr(
        integrations, "_can_use_grouped_mm", lambda x, w, offs: w.dtype != torch.float64 and able(x, w, offs)
    )


MODELS = {"llama": lambda: llama(False), "tied": lambda: llama(True), "gpt2": gpt2, "t5": t5, "moe": moe}


def logits_of(model, ids):
    more = {"decoder_input_ids": ids.flip(1)} if hasattr(model, "decoder") or hasattr(model, "encoder") else {}
    return model(input_ids=ids, **more).logits


def train(kind, how, steps=10, accumulate=1, working_set=None, **options):
    """Return the distance of a compiled folded model to its twin: torch's, or with a working set an eager fold."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    plain = MODELS[kind]().double().train()
    model = copy.deepcopy(plain)
    theirs, mine = torchs(plain) if working_set is None else ours(plain), ours(model)
    if working_set is not None:
        gradfold.fold(plain, theirs, accumulate=accumulate, head="plain", working_set=working_set, **options)
    fold = gradfold.fold(model, mine, accumulate=accumulate, head="plain", working_set=working_set, **options)
    called = model
    if how == "whole":
        called = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        gradfold.compile_layers(model, backend="aot_eager", fullgraph=True)
    generator, vocabulary = torch.Generator().manual_seed(1), model.config.vocab_size
    for step in range(steps):
        for _ in range(accumulate):
            ids = torch.randint(1, vocabulary, (2, (8, 10, 14)[step % 3]), generator=generator)
            for one in (plain, called):
                loss = F.cross_entropy(logits_of(one, ids).flatten(0, 1), ids.flatten()) / accumulate
                fold.backward(loss) if one is called else loss.backward()
        if working_set is None and options.get("clip_norm"):
            nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
        for optimizer in (theirs, mine):
            optimizer.step()
            optimizer.zero_grad()
        assert no_gradients(model)
    report = fold.report()
    assert not [row.name for row in report.rows if len(row.shape) > 1 and row.route == "hooked"]
    assert report.region_bytes > 0
    return distance(model, plain)


TRAINED = [
    pytest.param("llama", "whole", {}, id="llama"),
    pytest.param("tied", "layers", {"accumulate": 2, "clip_norm": 0.1}, id="tied-layers-clip"),
    pytest.param("gpt2", "whole", {"clip_norm": 0.1}, id="gpt2-clip", marks=pytest.mark.slow),
    *(
        pytest.param(kind, how, options, marks=pytest.mark.slow)
        for kind in MODELS
        for how in ("whole", "layers")
        for options in (
            {},
            {"accumulate": 2},
            {"accumulate": 3, "clip_norm": 0.1},
        )
    ),
]


@pytest.mark.usefixtures("grouped_in_fp64")
@pytest.mark.parametrize(("kind", "how", "options"), TRAINED)
def test_transformers(kind, how, options):
    assert train(kind, how, **options) <= CLOSE
    kinds = 1 if how == "whole" or kind != "t5" else 4  # T5's layers: with a bias of their own or not, twice
    assert graphs() <= 2 * kinds  # one length, then all others


@pytest.mark.slow
@pytest.mark.usefixtures("grouped_in_fp64")
@pytest.mark.parametrize("kind", MODELS)
def test_inductor(kind):
    """In fp32 a folded compiled run is at most twice as far from fp64 as torch's eager one."""
    torch.manual_seed(0)
    exact = MODELS[kind]().double().train()
    eager = copy.deepcopy(exact).float()
    model = copy.deepcopy(eager)
    # eps: where a gradient is rounding noise, Adam's first steps would decide by it, in eager torch too
    kinds = (torch.optim.AdamW, torch.optim.AdamW, gradfold.AdamW)
    optimizers = [
        kind(one.parameters(), lr=1e-2, eps=1e-4) for kind, one in zip(kinds, (exact, eager, model), strict=True)
    ]
    gradfold.fold(model, optimizers[-1], head="plain")
    gradfold.compile_layers(model, fullgraph=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(10):
        ids = torch.randint(1, exact.config.vocab_size, (2, (8, 10, 14)[step % 3]), generator=generator)
        for one, optimizer in zip((exact, eager, model), optimizers, strict=True):
            F.cross_entropy(logits_of(one, ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(model, exact) <= 2 * distance(eager, exact)


@pytest.mark.parametrize("by", ["layer", pytest.param("bytes", marks=pytest.mark.slow)])
def test_a_working_set(by):
    turns = gradfold.WorkingSet(chunks=None if by == "layer" else 3, by=by, interval=1)
    assert train("llama", "layers", working_set=turns) <= CLOSE
    if by == "layer":
        assert graphs() <= 2 * 3  # lengths, times a layer that is awake, asleep above one, asleep below all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    def run(model, optimizer, step):
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if folded(model) else model
        with torch.autocast("cpu", torch.bfloat16):
            y = called(torch.linspace(-1, 1, 4 * H).view(4, H))
        y.float().square().mean().backward()

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, H, bias=False))

    plain, model = twins(make, dtype)
    gradfold.fold(model, mine := ours(model))
    theirs = torchs(plain)
    for step in range(3):
        for one, optimizer in ((plain, theirs), (model, mine)):
            run(one, optimizer, step)
            optimizer.step()
            optimizer.zero_grad()
    assert distance(model, plain) <= 2e-2


def test_conv1d_and_padding():
    from transformers.pytorch_utils import Conv1D

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up = nn.Embedding(V, H, padding_idx=3), Conv1D(4, H)

        def forward(self, ids):
            return self.up(self.embed(ids))

    def run(model, optimizer, step):
        ids = torch.tensor([[3, 1, 4], [1, 3, 16]]) + 0 * step
        torch.compile(model, backend="aot_eager", fullgraph=True)(ids).square().mean().backward()

    assert compare(Both, run) <= CLOSE


# memory ---------------------------------------------------------------------------------------------------------------


def test_no_gradient_in_the_graph():
    """The backward's graph makes no tensor of a weight's shape."""
    made = []

    def look(graph, _):
        made.extend(
            tuple(node.meta["val"].shape)
            for node in graph.graph.nodes
            if node.op == "call_function"
            if isinstance(node.meta.get("val"), torch.Tensor) and "aten.t." not in str(node.target)
        )
        return make_boxed_func(graph)

    model = nn.Sequential(nn.Embedding(V, 5), nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 11, bias=False))
    gradfold.fold(model, ours(model))
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=look)
    torch.compile(model, backend=backend, fullgraph=True)(torch.arange(12).view(3, 4)).sum().backward()
    assert made
    assert not {(V, 5), (7, 5), (5, 7), (11, 7), (7, 11)} & set(made)


ROOT = Path(__file__).parents[2]
WIDE, ROWS, LAYERS = 512, 64, 10

MEASURE = f"""
import sys, torch, gradfold
from torch import nn
from tests.allocator import peak_bytes

backend = sys.argv[1]
torch.manual_seed(0)

class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        layers = (nn.Sequential(nn.Linear({WIDE}, {WIDE}, bias=False), nn.Tanh()) for _ in range({LAYERS}))
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

x = torch.randn({ROWS}, {WIDE})

def measured(how):
    model = Tower()
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer)
    called = model
    if how == "whole":
        called = torch.compile(model, backend=backend, fullgraph=True)
    elif how == "layers":
        for layer in model.layers:
            layer[0].compile(backend=backend, fullgraph=True)

    def step():
        called(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    return peak_bytes(step)

print(*map(measured, ("eager", "whole", "layers")))
"""


def peaks_bytes(backend):
    """Peak of the allocator over a step, eager, compiled as a whole, by layers; in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, backend], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()[-3:]]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_memory_of_a_step(backend):
    """All gradients are 10 MiB; the uses of a region, two tensors of 128 KiB each."""
    use = 2 * ROWS * WIDE * 4
    eager, whole, layers = peaks_bytes(backend)
    assert whole <= eager + LAYERS * use + 2**20
    assert layers <= eager + use + 2**20


def test_what_a_region_holds_is_in_the_report():
    model = nn.Sequential(nn.Linear(H, H, bias=False), nn.Tanh(), nn.Linear(H, 2 * H, bias=False))
    fold = gradfold.fold(model, ours(model))
    torch.compile(model, backend="aot_eager", fullgraph=True)(torch.ones(4, H)).sum().backward()
    assert fold.report().region_bytes == 4 * 4 * (H + H + H + 2 * H)
    assert "compiled regions hold the uses of their weights until they end" in str(fold.report())


# layers ---------------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.body = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.Tanh()) for _ in range(4))}
        )
        self.empty = nn.ModuleList([nn.Tanh()])

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.body["layers"]:
            x = layer[1](layer[0](x))
        return x


def test_layers_are_found_or_named():
    assert gradfold.compile_layers(Deep(), backend="eager") == [f"body.layers.{index}" for index in range(4)]
    assert gradfold.compile_layers(Deep(), layers=["body.layers.*.0"], backend="eager") == [
        f"body.layers.{index}.0" for index in range(4)
    ]


def test_one_graph_for_all_layers():
    model = Deep()
    gradfold.fold(model, ours(model))
    gradfold.compile_layers(model, layers=["body.layers.*.0"], backend="aot_eager", fullgraph=True)
    before = graphs()
    model(torch.arange(6).view(2, 3)).sum().backward()
    assert graphs() - before == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "reduce-overhead"}, "mode='reduce-overhead'"),
        ({"options": {"triton.cudagraphs": True}}, "CUDA graph"),
        ({"layers": ["nowhere.*"]}, "no module of the model matches 'nowhere.*'"),
        ({"layers": ["body.layers.*", "body.layers.1.0"]}, "'body.layers.1.0' is inside of another one"),
    ],
)
def test_refused(options, words):
    with pytest.raises(FoldError, match=".*") as raised:
        gradfold.compile_layers(Deep(), **options)
    assert words in str(raised.value)


def test_nothing_to_compile():
    with pytest.raises(FoldError, match="Linear has no nn.ModuleList of layers"):
        gradfold.compile_layers(nn.Linear(2, 2))


def test_a_cache_of_keys_is_warned_of():
    pytest.importorskip("transformers")
    model = llama(False)
    model.config.use_cache = True
    with pytest.warns(UserWarning, match=r"set model\.config\.use_cache = False"):
        gradfold.compile_layers(model, backend="eager")


# nothing silent -------------------------------------------------------------------------------------------------------


class Reads(nn.Linear):
    """A forward of its own, whose weight goes to a function."""

    def forward(self, x):
        return F.linear(x, self.weight * 1.0)


def test_dense_gradients_of_compiled_code_are_told_once():
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H))
    reads = F.linear
    fold = gradfold.fold(model, optimizer := ours(model))
    called = torch.compile(lambda x: reads(model[0](x), model[1].weight), backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match=r"1 weights of folded modules had dense gradients, .* MiB: 1\.weight"):
        called(torch.ones(2, H)).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called(torch.ones(2, H)).sum().backward()
        optimizer.step()
    routes = {row.name: row.route for row in fold.report().rows}
    assert routes["0.weight"] == "folded"
    assert routes["1.weight"] == "hooked"


def compiled_pair():
    model = nn.Sequential(nn.Linear(H, H, bias=False), nn.Tanh(), nn.Linear(H, H, bias=False)).double()
    fold = gradfold.fold(model, optimizer := ours(model))
    return model, fold, optimizer, torch.compile(model, backend="aot_eager", fullgraph=True)


def test_paused_writes_gradients():
    model, fold, _, called = compiled_pair()
    plain = copy.deepcopy(model)
    x = torch.linspace(-1, 1, 2 * H, dtype=torch.float64).view(2, H)
    with fold.paused():
        for _ in range(2):
            called(x).square().sum().backward()
            plain(x).square().sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)
            one.grad = None


def test_autograd_grad_is_refused():
    model, _, _, called = compiled_pair()
    y = called(torch.ones(2, H, dtype=torch.float64)).sum()
    with pytest.raises(FoldError, match=r"2\.weight: autograd\.grad asks a compiled region"):
        torch.autograd.grad(y, list(model.parameters()))


def test_another_tensor_in_the_weights_place_is_refused():
    model, *_ = compiled_pair()
    before = [param.clone() for param in model.parameters()]
    others = {name: torch.zeros_like(param, requires_grad=True) for name, param in model.named_parameters()}

    def call(x):
        return torch.func.functional_call(model, others, (x,))

    called = torch.compile(call, backend="aot_eager")
    with pytest.raises(FoldError, match="another tensor in its place"):
        called(torch.ones(2, H, dtype=torch.float64)).sum().backward()
    assert all(map(torch.equal, before, model.parameters()))


def test_export_is_refused_while_it_trains():
    model, fold, *_ = compiled_pair()
    x = torch.ones(2, H, dtype=torch.float64)
    with pytest.raises(Exception, match="an exported program cannot step weights"):
        torch.export.export(model, (x,))
    with torch.no_grad():
        torch.export.export(model, (x,))
    fold.remove()
    torch.export.export(model, (x,))


def test_after_the_fold():
    model, fold, optimizer, called = compiled_pair()
    x = torch.ones(2, H, dtype=torch.float64)
    called(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    fold.remove()
    called(x).sum().backward()
    assert all(param.grad is not None for param in model.parameters())


def test_copies_are_plain():
    model, *_ = compiled_pair()
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any("gradfold" in name for module in made.modules() for name in vars(module))
        assert not folded(made)


def test_frozen_and_unfrozen():
    model, _, optimizer, called = compiled_pair()
    plain = copy.deepcopy(model)
    theirs = torchs(plain)
    x = torch.linspace(-1, 1, 2 * H, dtype=torch.float64).view(2, H)
    for trains in (True, False, True):
        for one in (plain, model):
            one[0].weight.requires_grad_(trains)
        for call, stepper in ((plain, theirs), (called, optimizer)):
            call(x).square().sum().backward()
            stepper.step()
            stepper.zero_grad()
    assert distance(model, plain) <= CLOSE


def test_a_model_that_is_gone_leaves_nothing():
    import weakref

    model, fold, optimizer, called = compiled_pair()
    called(torch.ones(2, H, dtype=torch.float64)).sum().backward()
    optimizer.step()
    gone = weakref.ref(fold._state)
    del model, fold, optimizer, called
    torch.compiler.reset()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("how", [pytest.param("whole", marks=pytest.mark.slow), "layers"])
def test_a_plan_is_of_the_eager_model(how):
    pytest.importorskip("transformers")
    model = llama(False)
    wanted = gradfold.plan(model, tokens=8).peak_bytes
    if how == "layers":
        gradfold.compile_layers(model, backend="eager")
    with pytest.warns(UserWarning, match="LlamaForCausalLM is compiled; its eager form is planned"):
        found = gradfold.plan(torch.compile(model, backend="eager") if how == "whole" else model, tokens=8)
    assert found.peak_bytes == wanted
