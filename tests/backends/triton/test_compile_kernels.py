"""Kernels compiled for processors that are not here: no spills, and nothing stored but weight, states and norms.

Compiles what training launches (``benchmarks/compile_kernels.py``). That no gradient is stored is shown
twice: in Triton's own language every store is traced to the argument that it writes to, and its bytes are counted; in
machine code the global stores have the same bytes, and there is no other way to global memory.
"""

# ruff: noqa: E402

import pytest

triton = pytest.importorskip("triton", reason="kernels need triton: pip install 'gradfold[gpu]'")

import torch
import triton.language as tl
from triton.runtime.driver import driver

import gradfold
from benchmarks import compile_kernels, inspect_ptx, kernels
from benchmarks.compile_kernels import CompiledKernel, KernelJob, compile_kernel, compiling_for
from gradfold.backends import UNCHANGED, DenseTerm, Scratch
from gradfold.backends.triton import Triton, backend, batched, tile_configs
from gradfold.backends.triton.kernels.batched import fold_batched
from gradfold.engine.stepper import GroupStep, ParamStepper

HOPPER = KernelJob(90)
# The product with a bias is the one without, and more; all others, and other processors, are slow.
QUICK = [
    KernelJob(90, norm_only=True),
    KernelJob(90, kind=tile_configs.GATHER, states="int8"),
    KernelJob(90, biased=True),
]
MATRIX = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}


@pytest.fixture(autouse=True, scope="module")
def kept(request):
    """CompiledKernel kernels lie beside pytest's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(request.config.cache.mkdir("triton-kernels")))
        patch.setenv("TRITON_DISABLE_LINE_INFO", "1")
        yield


def keeps_its_promises(job):
    row = kernels.measure_kernel(job)
    assert row["problems"] == []
    assert row["stored_arguments"][-1] == "seconds.2" or "seconds.1" not in row["stored_arguments"]
    if job.kind in (tile_configs.PRODUCT, tile_configs.GROUPED) and job.operands == "bf16":
        assert row["matrix"] == MATRIX[job.arch]
    if job.arch == 90 and job.kind in (tile_configs.PRODUCT, tile_configs.GROUPED) and job.operands == "bf16":
        assert row["programs_per_multiprocessor"] >= 2
    return row


@pytest.mark.parametrize("job", QUICK, ids=lambda job: job.id)
def test_kernel(job):
    keeps_its_promises(job)


@pytest.mark.slow
@pytest.mark.parametrize("job", [job for job in kernels.every() if job not in QUICK], ids=lambda job: job.id)
def test_every_kernel(job):
    keeps_its_promises(job)


def test_every_row_of_the_table_is_compiled_on_some_processor():
    compiled = {(job.kind, 4 if job.operands == "fp32" else 2, job.family) for job in kernels.every()}
    assert compiled >= {row for row in tile_configs._TILE_CONFIGS if row[2] != "amd"}
    kinds = {tile_configs.PRODUCT, tile_configs.GROUPED, tile_configs.GATHER, tile_configs.DENSE}
    assert {kind for kind, _, _ in compiled} == kinds


def test_stores_are_those_of_weight_states_and_norm():
    job = KernelJob(90, kind=tile_configs.DENSE, rule="Lion")
    elements = job.tiles.bn * job.tiles.bk
    expected = {"norms": 4, "firsts.0": 2 * elements, "firsts.1": 4 * elements}
    assert inspect_ptx.bytes_by_argument(inspect_ptx.stores(compile_kernel(job).asm["ttir"])) == expected


def test_experts_store_no_more(monkeypatch):
    """In tiles that compile quickly, of which one program takes one expert's."""
    tiny = tile_configs.TileConfig(16, 128, 16, 0, warps=4, stages=1)
    monkeypatch.setitem(tile_configs._TILE_CONFIGS, (tile_configs.PRODUCT, 2, "hopper"), tiny)
    row = kernels.measure_kernel(KernelJob(90, kind=tile_configs.GROUPED, rule="Lion", states="bf16"))
    assert row["problems"] == [] and row["matrix"] == "wgmma"
    assert row["stored_arguments"] == ["firsts.0", "firsts.1", "norms"]
    assert row["stored_bytes_per_element"] == 4 + 4 / (16 * 128)


@pytest.mark.parametrize("kind", [tile_configs.PRODUCT, tile_configs.GROUPED])
def test_a_weight_of_one_row_compiles(monkeypatch, kind):
    """Its dY has a stride of 1, which Triton hands to the kernel as a constant."""
    tiny = tile_configs.TileConfig(16, 128, 16, 0, warps=4, stages=1)
    monkeypatch.setitem(tile_configs._TILE_CONFIGS, (tile_configs.PRODUCT, 2, "hopper"), tiny)
    kept = compile_kernels.stored_by
    monkeypatch.setattr(compile_kernels, "stored_by", lambda job: kept(job, (1, compile_kernels.COLUMNS)))
    monkeypatch.setattr(compile_kernels, "ROWS", 1)
    assert compile_kernel(KernelJob(90, kind=kind, rule="Lion", states="bf16")).asm["cubin"]


def test_norm_only_stores_one_number():
    found = inspect_ptx.stores(compile_kernel(KernelJob(90, norm_only=True)).asm["ttir"])
    assert found == [inspect_ptx.KernelStore("norms", 1, 4, wide=False)]


def test_driver_is_what_it_was():
    before = driver._active
    with pytest.raises(KeyError), compiling_for(90):
        assert driver.active is not before
        raise KeyError
    assert driver._active is before


# what must be found out ---------------------------------------------------------------------------------------------


def test_the_kernel_of_many_small_parameters_does_not_spill(monkeypatch):
    """Its gradients are there already: autograd wrote them."""
    param = torch.nn.Parameter(torch.empty(4096, dtype=torch.bfloat16))
    optimizer = gradfold.AdamW([param], states="fp32", rounding="stochastic", master="split8")
    gradient, made = [DenseTerm(torch.empty(4096))], []
    monkeypatch.setattr(batched, "fold_batched", Warming(made))
    monkeypatch.setattr(backend, "_reachable", lambda weight: True)  # a CPU's tensors, which nothing reads
    with torch.no_grad(), compiling_for(90):
        stepper = ParamStepper(param, optimizer, Triton(Scratch()))
        job, _ = stepper.begin(gradient, GroupStep(optimizer.param_groups[0], optimizer.rule), UNCHANGED)
        found = batched.kind_of(job)
        assert found is not None
        batched.step_batched(found[0], [job], [found[1]], "hopper", False)
    code, usage = inspect_ptx.read_cubin(made[0].asm["cubin"])
    assert not code.spills and not usage.local_bytes and not usage.stack_bytes


class Warming:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, made):
        self.made = made

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.made.append(fold_batched.warmup(*args, grid=grid, **kwargs))


@triton.jit
def leaking(x, norms, out, WIDTH: tl.constexpr, HOW: tl.constexpr):
    tile = tl.load(x + tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    where = out + tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(norms, tl.sum(tl.sum(tile, 1), 0))
    if HOW == 1:
        tl.store(where, tile)
    elif HOW == 2:
        tl.atomic_add(where, tile)
    elif HOW == 3:
        for i in tl.range(0, tl.load(norms + 1).to(tl.int32)):
            tl.store(where + i * WIDTH * WIDTH, tile)
    elif HOW == 4:
        elsewhere = tl.load(x.to(tl.pointer_type(tl.int64))).to(tl.pointer_type(tl.float32))
        tl.store(elsewhere + tl.arange(0, WIDTH), tl.sum(tile, 1))


def leaked(how):
    x = torch.empty(64, 64)
    with compiling_for(90):
        kernel = leaking.warmup(x, x, x, WIDTH=64, HOW=how, num_warps=8, enable_fp_fusion=False, grid=(1,))
    return CompiledKernel(HOPPER, dict(kernel.asm), kernel.metadata, {"norms": 4}, 64 * 64)


def complaints(kernel):
    code, _ = inspect_ptx.read_cubin(kernel.asm["cubin"])
    return list(kernels.stray_stores(kernel, inspect_ptx.stores(kernel.asm["ttir"]), code))


def test_a_kernel_that_stores_a_norm_alone_passes():
    assert complaints(leaked(0)) == []


def test_a_stored_gradient_is_found():
    assert complaints(leaked(1)) == [f"a program stores {{'norms': 4, 'out': {4 * 64 * 64}}}, not {{'norms': 4}}"]


def test_a_stored_gradient_is_found_in_machine_code():
    kernel = leaked(1)
    code, _ = inspect_ptx.read_cubin(kernel.asm["cubin"])
    norm = [store for store in inspect_ptx.stores(kernel.asm["ttir"]) if store.argument == "norms"]
    assert any("machine code stores" in what for what in kernels.stray_stores(kernel, norm, code))


@pytest.mark.parametrize("how, why", [(2, "not a plain store"), (3, "cannot be traced"), (4, "cannot be traced")])
def test_atomics_loops_and_pointers_from_memory_are_refused(how, why):
    with pytest.raises(ValueError, match=why):
        inspect_ptx.stores(leaked(how).asm["ttir"])


def test_atomics_are_found_in_machine_code():
    code, _ = inspect_ptx.read_cubin(leaked(2).asm["cubin"])
    assert code.other_writes


def test_spills_are_found(monkeypatch):
    monkeypatch.setattr(tile_configs, "_DENSE", tile_configs.TileConfig(128, 128, 16, 0, warps=4, stages=1, maxnreg=64))
    assert any(
        "spills" in what
        for what in kernels.measure_kernel(KernelJob(90, kind=tile_configs.DENSE, rule="SGD"))["problems"]
    )


def test_lonely_programs_are_found(monkeypatch):
    lonely = tile_configs.TileConfig(128, 128, 64, 4, warps=8, stages=5)
    monkeypatch.setitem(tile_configs._TILE_CONFIGS, (tile_configs.PRODUCT, 2, "hopper"), lonely)
    assert kernels.measure_kernel(KernelJob(90, norm_only=True))["problems"] == ["1 program per multiprocessor"]
