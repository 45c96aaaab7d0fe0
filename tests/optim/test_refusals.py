"""What an optimizer or a fold will not take is refused by name, before anything has changed."""

import copy
import inspect

import pytest
import torch
from torch import nn

import gradfold
from tests.cases import NAMES, each_rule

# optimizer -> (argument, bad value, other arguments)
NAN = float("nan")
BETAS = [("betas", (1.0, 0.9)), ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)), ("betas", (0.9,)), ("betas", (0.9, NAN))]
BAD = {
    "AdamW": [("lr", -0.1), ("lr", NAN), ("eps", -1e-8), ("weight_decay", -0.1), *BETAS],
    "Adam": [("lr", -0.1), ("eps", -1e-8), ("weight_decay", -0.1), *BETAS],
    "SGD": [("lr", -0.1), ("momentum", -0.5), ("weight_decay", -0.1)],
    "Lion": [("lr", -0.1), ("weight_decay", -0.1), *BETAS],
    "RMSprop": [("lr", -0.1), ("alpha", -0.1), ("eps", -1e-8), ("weight_decay", -0.1), ("momentum", -0.5)],
    "Adagrad": [
        ("lr", -0.1),
        ("lr_decay", -0.1),
        ("weight_decay", -0.1),
        ("initial_accumulator_value", -0.1),
        ("eps", -1e-10),
    ],
    "NAdam": [("lr", -0.1), ("eps", -1e-8), ("weight_decay", -0.1), ("momentum_decay", -0.1), *BETAS],
    "RAdam": [("lr", -0.1), ("eps", -1e-8), ("weight_decay", -0.1), *BETAS],
    "Adadelta": [("lr", -0.1), ("rho", -0.1), ("rho", 1.1), ("rho", NAN), ("eps", -1e-8), ("weight_decay", -0.1)],
    "Adamax": [("lr", -0.1), ("eps", -1e-8), ("weight_decay", -0.1), *BETAS],
    "ASGD": [("lr", -0.1), ("weight_decay", -0.1)],
    "Rprop": [
        ("lr", -0.1),
        ("etas", (0.0, 1.2)),
        ("etas", (0.5, 1.0)),
        ("etas", (1.0, 1.2)),
        ("etas", (0.5,)),
        ("step_sizes", (0.1,)),
    ],
    "AdamWScheduleFree": [
        ("lr", -0.1),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("r", -0.1),
        ("weight_lr_power", -1.0),
        ("betas", (0.0, 0.9)),
        ("capturable", True),
        *BETAS,
    ],
    "AdamMini": [("lr", -0.1), ("eps", -1e-8), ("weight_decay", -0.1), ("capturable", True), *BETAS],
    "LAMB": [("lr", -0.1), ("eps", -1e-8), ("weight_decay", -0.1), ("capturable", True), *BETAS],
    "LARS": [
        ("lr", -0.1),
        ("momentum", -0.1),
        ("weight_decay", -0.1),
        ("trust_coefficient", -0.1),
        ("eps", -1e-8),
        ("capturable", True),
    ],
    "Adafactor": [
        ("lr", -0.1),
        ("beta2_decay", 0.1),
        ("eps", (-1.0, 1e-3)),
        ("eps", (None, -1.0)),
        ("eps", (1e-3,)),
        ("d", 0.5),
        ("d", NAN),
        ("weight_decay", -0.1),
        ("capturable", True),
    ],
}
BAD_ROWS = [(name, key, value) for name, rows in BAD.items() for key, value in rows]


def params():
    return [nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(("name", "key", "value"), BAD_ROWS, ids=str)
def test_a_bad_value_is_named(name, key, value):
    with pytest.raises(ValueError) as raised:
        getattr(gradfold, name)(params(), **{key: value})
    assert f"{key}={value}" in str(raised.value)
    with pytest.raises(ValueError):  # in one group of several, too
        getattr(gradfold, name)([{"params": params()}, {"params": params(), key: value}])


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_bad_value_above(name):
    signature = inspect.signature(getattr(gradfold, name).__init__).parameters
    switches = {"amsgrad", "maximize", "decoupled_weight_decay", "nesterov", "centered"}
    unbounded = {"dampening", "lambd", "alpha", "t0"} if name != "RMSprop" else set()  # torch takes any
    assert {key for key, _ in BAD[name]} == set(signature) - {"self", "params", "storage"} - switches - unbounded


@pytest.mark.parametrize("extra", [{"momentum": 0}, {"momentum": 0.9, "dampening": 0.1}], ids=str)
def test_nesterov_needs_momentum_without_dampening(extra):
    with pytest.raises(ValueError, match=f"nesterov=True with momentum={extra['momentum']}"):
        gradfold.SGD(params(), nesterov=True, **extra)


@pytest.mark.parametrize("name", NAMES)
def test_lr_is_one_number(name):
    with pytest.raises(ValueError, match="lr: a tensor of 2 elements"):
        getattr(gradfold, name)(params(), lr=torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("name", NAMES)
def test_text_is_no_number(name):
    with pytest.raises(TypeError, match="lr='1e-3': text; give a number"):
        getattr(gradfold, name)(params(), lr="1e-3")


@pytest.mark.parametrize("name", NAMES)
def test_what_torch_refuses_is_refused(name):
    make = getattr(gradfold, name)
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    with pytest.raises(ValueError, match="can't optimize a non-leaf"):
        make([params()[0] * 2])
    with pytest.raises(ValueError, match="more than one parameter group"):
        shared = params()
        make([{"params": shared}, {"params": shared}])
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        make(params(), learning_rate=0.1)


# gradients ------------------------------------------------------------------------------------------------------------


@each_rule
def test_a_complex_gradient_is_refused(row):
    """Squares of complex numbers are not their magnitudes: the rules would be silently wrong."""
    param = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = row.ours([param])
    param.grad = torch.ones_like(param)
    with pytest.raises(gradfold.FoldError, match=r"complex parameter of shape \(3,\).*view it as real"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3, dtype=torch.complex64)) and not optimizer.state_dict()["state"]


@each_rule
def test_a_sparse_gradient_is_refused(row):
    model = nn.Embedding(5, 3, sparse=True)
    before = model.weight.detach().clone()
    optimizer = row.ours(model.parameters())
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(gradfold.FoldError, match=r"sparse.*shape \(5, 3\).*sparse=False"):
        optimizer.step()
    assert torch.equal(model.weight.detach(), before) and not optimizer.state_dict()["state"]


def test_a_sparse_embedding_is_refused_by_fold():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    with pytest.raises(gradfold.FoldError, match=r"0: .*sparse=False"):
        gradfold.fold(model, gradfold.AdamW(model.parameters()))


class Rotation(nn.Module):
    """A complex weight, as spectral layers have."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, x):
        return (self.linear(x) * self.phase).real.sum()


def test_a_complex_parameter_is_refused_by_fold():
    model = Rotation()
    with pytest.raises(gradfold.FoldError, match="phase: torch.complex64 parameters cannot be folded"):
        gradfold.fold(model, gradfold.AdamW(model.parameters()))


def test_a_complex_parameter_unfrozen_after_folding_is_refused():
    model = Rotation()
    model.phase.requires_grad_(False)
    optimizer = gradfold.NAdam(model.parameters())
    gradfold.fold(model, optimizer)
    model.phase.requires_grad_(True)
    with pytest.raises(gradfold.FoldError, match="complex"):
        model(torch.ones(1, 2)).backward()
        optimizer.step()


def test_a_complex_parameter_added_after_folding_is_refused_and_changes_nothing():
    model = Rotation()
    model.phase.requires_grad_(False)
    optimizer = gradfold.NAdam(model.linear.parameters())
    fold = gradfold.fold(model, optimizer)
    model.phase.requires_grad_(True)
    with pytest.raises(gradfold.FoldError, match="phase: torch.complex64"):
        optimizer.add_param_group({"params": [model.phase]})
    assert len(optimizer.param_groups) == 1
    model.phase.requires_grad_(False)
    assert [row.route for row in fold.report().rows if row.name == "phase"] == ["frozen"]
    optimizer.step()


# fold() ---------------------------------------------------------------------------------------------------------------

UNFOLDABLE = {
    "LBFGS": "evaluates the loss many times",
    "SparseAdam": "needs sparse gradients",
}


@pytest.mark.parametrize("name", [n for n in UNFOLDABLE if hasattr(torch.optim, n)])
def test_optimizers_that_cannot_be_folded_are_refused_by_name(name):
    model = nn.Linear(3, 2, bias=False)
    with pytest.raises(gradfold.FoldError) as raised:
        gradfold.fold(model, getattr(torch.optim, name)(model.parameters()))
    message = str(raised.value)
    assert (
        message.startswith(f"{name} cannot be folded") and UNFOLDABLE[name] in message and "gradfold.AdamW" in message
    )
    assert type(model) is nn.Linear


@pytest.mark.parametrize("name", [n for n in NAMES if n != "Lion"])
def test_torchs_own_optimizers_are_pointed_to_ours(name):
    model = nn.Linear(3, 2)
    with pytest.raises(gradfold.FoldError, match=f"{name} is not one of gradfold's; use gradfold.{name} "):
        gradfold.fold(model, getattr(torch.optim, name)(model.parameters()))
    assert type(model) is nn.Linear


def test_every_optimizer_of_torch_is_refused_by_name():
    """A new one in a later torch lands in the table, or in gradfold."""
    theirs = {name for name, kind in vars(torch.optim).items() if inspect.isclass(kind) and name != "Optimizer"}
    assert theirs <= {*UNFOLDABLE, *NAMES, "Adafactor", "Muon"}


@pytest.mark.parametrize(
    "thing",
    [None, "AdamW", object(), gradfold.AdamW, nn.Sequential(nn.Linear(3, 2)), torch.ones(2)],
    ids=["none", "name", "object", "class", "model", "tensor"],
)
def test_something_else_than_an_optimizer(thing):
    with pytest.raises(gradfold.FoldError, match="is not one of gradfold's"):
        gradfold.fold(nn.Linear(3, 2), thing)


def two(model):
    return [gradfold.SGD(model[0].parameters()), gradfold.AdamW(model[1].parameters())]


# in place of one optimizer, or a list of them; what the message says of it
SEVERAL = {
    "dict": (lambda model: dict(zip("ab", two(model), strict=True)), r"optimizer=dict of 2 \(SGD, AdamW\)"),
    "set": (lambda model: set(two(model)), "optimizer=set of 2"),
    "values": (lambda model: dict(zip("ab", two(model), strict=True)).values(), r"of 2 \(SGD, AdamW\)"),
    "generator": (lambda model: iter(two(model)), r"of 2 \(SGD, AdamW\)"),
    "none": (lambda model: [], "optimizer=list of 0: give one"),
    "nested": (lambda model: [two(model)], r"optimizer=list of 2 \(SGD, AdamW\)"),
    "torch's": (
        lambda model: [torch.optim.SGD(model[0].parameters()), gradfold.AdamW(model[1].parameters())],
        r"SGD is not one of gradfold's; use gradfold\.SGD",
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_no_list_of_optimizers(name):
    make, message = SEVERAL[name]
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(gradfold.FoldError, match=message) as raised:
        gradfold.fold(model, make(model))
    assert name == "torch's" or "gradfold.fold(model, [first, second])" in str(raised.value)
    assert type(model[0]) is nn.Linear


def test_one_optimizer_of_two_is_pointed_to_the_list():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(gradfold.FoldError, match=r"1\.weight: .*two optimizers share a model, give fold both"):
        gradfold.fold(model, gradfold.SGD(model[0].parameters()))


def test_what_these_messages_advise_is_exact():
    """Submodules folded apart, beside one that torch's Muon trains."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)).double()
    model = copy.deepcopy(plain)
    muon = getattr(torch.optim, "Muon", torch.optim.SGD)
    kinds = [(torch.optim.SGD, gradfold.SGD), (muon, muon), (torch.optim.AdamW, gradfold.AdamW)]
    optimizers = [[ours[way](one.parameters(), lr=0.1) for one, ours in zip(m, kinds, strict=True)]
                  for way, m in enumerate((plain, model))]  # fmt: skip
    gradfold.fold(model[0], optimizers[1][0], clip_norm=0.1, joint=True)
    gradfold.fold(model[2], optimizers[1][2], joint=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    for _ in range(3):
        for one, steps in zip((plain, model), optimizers, strict=True):
            one(x).square().sum().backward()
            if one is plain:
                nn.utils.clip_grad_norm_(plain[0].parameters(), 0.1)
            for optimizer in steps:
                optimizer.step()
                optimizer.zero_grad()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_an_optimizer_is_folded_once():
    model = nn.Linear(3, 2)
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(model, optimizer)
    with pytest.raises(gradfold.FoldError, match="folded into a model already"):
        gradfold.fold(model, optimizer)
    fold.remove()
    gradfold.fold(model, optimizer)


@pytest.mark.parametrize("scratch_bytes", [0, -1])
def test_scratch_bytes_is_positive(scratch_bytes):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=f"scratch_bytes={scratch_bytes}"):
        gradfold.fold(model, gradfold.AdamW(model.parameters()), scratch_bytes=scratch_bytes)
    assert type(model) is nn.Linear


@pytest.mark.parametrize(("backend", "message"), [("triton", "use backend='auto'"), ("cuda", "unknown")])
def test_backends_by_name(backend, message):
    model = nn.Linear(3, 2)
    with pytest.raises(gradfold.FoldError, match=f"backend='{backend}'.*{message}"):
        gradfold.fold(model, gradfold.AdamW(model.parameters()), backend=backend)
    assert type(model) is nn.Linear
