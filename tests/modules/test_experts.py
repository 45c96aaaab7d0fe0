"""Uses of experts' weights by modules of one's own: what folds, what does not and is right all the same."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from gradfold.backends import Reference, Scratch
from tests.zoo import distance, no_gradients, ours, torchs

E, K, N, TOKENS = 4, 6, 5, 9


def routed(step, experts=E):
    """Tokens and their experts, sorted; one expert has none."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(TOKENS, K, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, experts - 1, (TOKENS,), generator=generator)
    return x, torch.where(ids >= 1, ids + 1, ids).sort().values  # never expert 1


def counts_of(ids):
    return torch.bincount(ids, minlength=E)


class Experts(nn.Module):
    """Weights ``[E, N, K]`` or, transposed, ``[E, K, N]``, used in one way."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        transposed = use.endswith("transposed")
        self.before = nn.Linear(K, K)
        self.w = nn.Parameter(torch.randn(E, K, N) if transposed else torch.randn(E, N, K))
        self.b = nn.Parameter(torch.randn(E, N))

    def forward(self, x, ids):
        return USES[self.use.removesuffix(" transposed")](self, self.before(x), ids)


def by_loop(product):
    def use(self, x, ids):
        parts, start = [], 0
        for expert, count in enumerate(counts_of(ids).tolist()):
            if count:
                parts.append(product(self, x[start : start + count], expert))
            start += count
        return torch.cat(parts)

    return use


def by_tensor(self, x, ids):
    """Experts that are hit, by a 0-d tensor, as transformers indexes."""
    y = x.new_zeros(len(x), N)
    for (expert,) in counts_of(ids).nonzero():
        rows = torch.where(ids == expert)[0]
        y = y.index_add(0, rows, F.linear(x[rows], self.w[expert]) + self.b[expert])
    return y


def gathered(self, x, ids):
    return torch.bmm(self.w[ids], x.unsqueeze(-1)).squeeze(-1) + self.b[ids]


def gathered_from_the_right(self, x, ids):
    w = self.w[ids] if self.use.endswith("transposed") else self.w[ids].transpose(1, 2)
    return (x.unsqueeze(1) @ w).squeeze(1)


def all_for_each(self, x, ids):
    """Every expert computes every token, and a mask keeps its own."""
    w = self.w if self.use.endswith("transposed") else self.w.transpose(1, 2)
    y = torch.bmm(x.expand(E, *x.shape), w)
    return y[ids, torch.arange(len(x))]


def all_from_the_left(self, x, ids):
    y = torch.matmul(self.w, x.t().expand(E, K, len(x)))
    return y[ids, :, torch.arange(len(x))]


USES = {
    "linear": by_loop(lambda self, x, e: F.linear(x, self.w[e], self.b[e])),
    "matmul": by_loop(lambda self, x, e: x @ self.w[e]),
    "matmul of a transpose": by_loop(lambda self, x, e: x @ self.w[e].T),
    "linear of a transpose": by_loop(lambda self, x, e: F.linear(x, self.w[e].t())),
    "matmul from the left": by_loop(lambda self, x, e: (self.w[e] @ x.T).T),
    "addmm": by_loop(lambda self, x, e: torch.addmm(self.b[e], x, self.w[e].mT)),
    "negative": by_loop(lambda self, x, e: F.linear(x, self.w[e - E], self.b[e - E])),
    "unbound": by_loop(lambda self, x, e: F.linear(x, self.w.unbind(0)[e])),
    "by tensor": by_tensor,
    "gathered": gathered,
    "gathered from the right": gathered_from_the_right,
    "all for each": all_for_each,
    "all from the left": all_from_the_left,
}
TRANSPOSED = ["matmul", "linear of a transpose", "gathered from the right", "all for each"]
KEPT = [use for use in USES if use not in ("matmul", "linear of a transpose")]
each_use = pytest.mark.parametrize("use", [*KEPT, *(f"{use} transposed" for use in TRANSPOSED)])


def twins(use):
    torch.manual_seed(0)
    model = Experts(use).double()
    return model, copy.deepcopy(model)


def train(models, optimizers, steps=4, loss=None, first=0):
    for step in range(first, first + steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            x, ids = routed(step)
            made = model(x, ids).pow(2).mean() if loss is None else loss(model, x, ids)
            made.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert no_gradients(models[1])


def routes(fold):
    return {row.name.rpartition(".")[2]: row.route for row in fold.report().rows}


@each_use
def test_uses_fold(use):
    plain, folded = twins(use)
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1])
    train((plain, folded), optimizers)
    assert routes(fold)["w"] == "folded"
    assert distance(folded, plain) <= 1e-12


OTHERS = {
    "a norm": lambda model, x, ids: model(x, ids).pow(2).mean() + model.w.pow(2).mean(),
    "one expert": lambda model, x, ids: model(x, ids).pow(2).mean() + model.w[1].abs().sum(),
    "an einsum": lambda model, x, ids: torch.einsum("tk,enk->ten", x, model.w).pow(2).mean() + model(x, ids).mean(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_uses_are_dense_and_right(other):
    """Outside the module's forward, and in ways that nobody knows: a dense gradient on top of the terms."""
    plain, folded = twins("linear")
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1])
    train((plain, folded), optimizers, loss=OTHERS[other])
    assert routes(fold)["w"] == "hooked"
    assert distance(folded, plain) <= 1e-12


class Odd(nn.Module):
    """Uses of its weight, inside the forward, that nobody knows."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, N, K))

    def forward(self, x, ids):
        copies = self.w[ids]
        return (copies * x[:, None]).sum(-1) + F.linear(x, self.w[0, :3]).sum() + self.w[1, 2].sum()


def test_copies_of_experts_that_are_not_multiplied_give_their_gradient():
    torch.manual_seed(0)
    plain = Odd().double()
    folded = copy.deepcopy(plain)
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    train((plain, folded), optimizers)
    assert distance(folded, plain) <= 1e-12


def test_changed_copies_of_experts_are_not_taken_for_the_weight():
    class Scaled(Odd):
        def forward(self, x, ids):
            copies = self.w[ids]
            copies *= 2
            return torch.bmm(copies, x.unsqueeze(-1))

    torch.manual_seed(0)
    plain = Scaled().double()
    folded = copy.deepcopy(plain)
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    train((plain, folded), optimizers)
    assert distance(folded, plain) <= 1e-12


@pytest.mark.parametrize("use", ["linear", "gathered", "all for each"])
def test_an_expert_without_tokens_steps_with_zeros(use):
    """Weight decay and moments go on, as torch's do with a gradient of zeros; at first it has seen tokens."""
    plain, folded = twins(use)
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    for step in range(4):
        before = folded.w.detach().clone()
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            x, ids = routed(step)
            model(x, torch.ones_like(ids) if step == 0 else ids).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(folded.w[1], before[1])
    assert distance(folded, plain) <= 1e-12


def test_experts_that_no_token_reaches_do_not_step():
    """The eager loop gives a weight no gradient at all where no expert is hit, and torch leaves it alone."""
    plain, folded = twins("by tensor")
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    before = folded.w.detach().clone()
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        x, ids = routed(0)
        (model(x[:0], ids[:0]).sum() + model.before(x).sum()).backward()
        optimizer.step()
    assert torch.equal(folded.w, before) and torch.equal(plain.w, before)
    assert distance(folded, plain) <= 1e-12


def test_autograd_grad_gets_the_whole_gradient():
    for use in ("linear", "gathered", "all for each", "by tensor"):
        plain, folded = twins(use)
        gradfold.fold(folded, ours(folded))
        x, ids = routed(0)
        found = [torch.autograd.grad(model(x, ids).pow(2).mean(), [model.w])[0] for model in (plain, folded)]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_paused_writes_gradients():
    plain, folded = twins("linear")
    fold = gradfold.fold(folded, ours(folded))
    x, ids = routed(0)
    with fold.paused():
        for model in (plain, folded):
            model(x, ids).pow(2).mean().backward()
    torch.testing.assert_close(folded.w.grad, plain.w.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", ["w", "b", "before.weight"])
def test_frozen(frozen):
    plain, folded = twins("by tensor")
    for model in (plain, folded):
        model.get_parameter(frozen).requires_grad_(False)
    optimizers = [made([p for p in m.parameters() if p.requires_grad], lr=1e-2) for made, m in
                  ((torch.optim.AdamW, plain), (gradfold.AdamW, folded))]  # fmt: skip
    gradfold.fold(folded, optimizers[1])
    train((plain, folded), optimizers)
    assert distance(folded, plain) <= 1e-12


class InKernels(Reference):
    """Says of every parameter that a kernel steps it, as the Triton backend may."""

    def route(self, weight, states, rule, by_expert=False):
        return "registers"


def test_the_report_says_that_no_kernel_takes_experts():
    _, folded = twins("linear")
    optimizer = ours(folded)
    fold = gradfold.fold(folded, optimizer, backend=InKernels(Scratch()))
    assert fold.report().backend == "reference: 4 in registers"
    folded(*routed(0)).sum().backward()
    assert fold.report().backend == "reference: 2 in reference (experts); 2 in registers"


class Block(Experts):
    """Experts that a block owns itself, beside a shared one with modules of its own."""

    def __init__(self):
        super().__init__("linear")
        self.shared = nn.Sequential(nn.Linear(K, K), nn.Sequential(nn.Linear(K, N), nn.Tanh()))

    def forward(self, x, ids):
        return super().forward(x, ids) + self.shared(x)


def test_experts_of_a_block_with_modules_below():
    torch.manual_seed(0)
    plain = Block().double()
    folded = copy.deepcopy(plain)
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1])
    train((plain, folded), optimizers)
    assert routes(fold)["w"] == "folded"
    assert distance(folded, plain) <= 1e-12


class Tied(nn.Module):
    """Two modules with one weight, of which one reads it as it is and one transposed."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Experts("linear"), Experts("gathered")
        self.two.w = self.one.w

    def forward(self, x, ids):
        return self.one(x, ids) + self.two(x, ids)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"clip_norm": 0.1}], ids=str)
def test_tied(options):
    torch.manual_seed(0)
    plain = Tied().double()
    folded = copy.deepcopy(plain)
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1], **options)
    for step in range(3):
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            for i in range(options.get("accumulate", 1)):
                x, ids = routed(10 * step + i)
                model(x, ids).pow(2).mean().backward()
            if options.get("clip_norm") and model is plain:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert routes(fold)["w"] == "folded"
    assert distance(folded, plain) <= 1e-12


def test_removed_copied_and_pickled_modules_are_plain():
    _, folded = twins("linear")
    optimizer = ours(folded)
    fold = gradfold.fold(folded, optimizer)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert type(other) is Experts
        x, ids = routed(0)
        other(x, ids).sum().backward()
        assert other.w.grad is not None
    fold.remove()
    assert type(folded) is Experts
    folded(*routed(0)).sum().backward()
    assert folded.w.grad is not None


def test_states_go_to_torch_and_back():
    plain, folded = twins("by tensor")
    optimizers = torchs(plain), ours(folded)
    gradfold.fold(folded, optimizers[1])
    train((plain, folded), optimizers)
    swapped = torchs(folded_copy := copy.deepcopy(folded)), ours(plain_copy := copy.deepcopy(plain))
    swapped[0].load_state_dict(optimizers[1].state_dict())
    swapped[1].load_state_dict(optimizers[0].state_dict())
    gradfold.fold(plain_copy, swapped[1])
    train((folded_copy, plain_copy), swapped, first=4)
    assert distance(plain_copy, folded_copy) <= 1e-12


@pytest.mark.parametrize("use", ["linear", "gathered", "all for each"])
def test_autocast(use):
    """As torch under autocast: products in bf16, the weight in fp32."""
    plain, folded = (model.float() for model in twins(use))
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1])

    def loss(model, x, ids):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x.float(), ids).float().pow(2).mean()

    train((plain, folded), optimizers, loss=loss, steps=2)
    assert routes(fold)["w"] == "folded"
    assert distance(folded, plain) <= 1e-3


class Wide(nn.Module):
    """Experts of rows that codecs store in blocks."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, 48, 256) / 16)
        self.v = nn.Parameter(torch.randn(E, 256, 40) / 16)

    def forward(self, x, ids):
        parts, start = [], 0
        for expert, count in enumerate(counts_of(ids).tolist()):
            parts.append((F.linear(x[start : start + count], self.w[expert]).tanh(), expert))
            start += count
        hidden = torch.cat([part for part, _ in parts])
        return torch.bmm(self.v[ids].transpose(1, 2)[:, :, :48], hidden.unsqueeze(-1))


STORED = [
    {"states": "int8"},
    {"states": "int4"},
    {"states": "bf16", "rounding": "stochastic"},
    {"states": "int8", "rounding": "stochastic"},
]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        *((options, torch.float32) for options in STORED),
        (STORED[2], torch.bfloat16),
        ({"states": "int8", "master": "split8"}, torch.bfloat16),
        ({"master": "split16"}, torch.bfloat16),
    ],
    ids=str,
)
def test_stored_states_do_not_depend_on_how_tiles_are_cut(options, dtype):
    """Random bits belong to elements: much scratch memory or little, and a dense gradient of the same values."""
    results = []
    for scratch_bytes in (2**12, 2**14, 2**23):
        torch.manual_seed(0)
        model = Wide().to(dtype)
        optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-2, small_size=0, **options)
        fold = gradfold.fold(model, optimizer, backend=Reference(Scratch(scratch_bytes)))
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(TOKENS, 256, generator=generator).to(dtype)
            model(x, routed(step)[1]).float().pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert routes(fold)["w"] == "folded"
        results.append(model.w.detach().float())
    for other in results[1:]:
        gap = (results[0] - other).abs().max()
        assert gap <= (2e-2 if dtype == torch.bfloat16 else 1e-3)
        assert (results[0] == other).float().mean() > 0.98
