"""What the Triton kernels cost, compiled for processors that need not be there: registers, spills, stores, occupancy.

Compiles every row of ``backends/triton/tile_configs.py`` as training launches it, with several ways to store weight and
states, and writes the table of docs/kernels.md. Exits with 1 if a kernel spills registers, stores anything but weight,
states, scales and one norm per tile, does not fit its processor, takes more instructions than ``MOST_INSTRUCTIONS``,
or if two programs of a default kernel (bf16 products) do not fit a Hopper multiprocessor.

    python -m benchmarks.kernels            # some minutes; what is compiled is kept in Triton's cache
    python -m benchmarks.kernels --quick    # a look, under a minute
    python -m benchmarks.kernels --all      # every combination
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # line info is no code and makes files larger

import triton

from gradfold.backends.triton import tile_configs

from . import inspect_ptx
from .common import fill_table, print_table, write_result
from .compile_kernels import CompiledKernel, KernelJob, compile_kernel

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"


class Processor(NamedTuple):
    """Resources of a multiprocessor (CUDA programming guide, technical specifications per compute capability)."""

    shared_bytes: int
    program_shared_bytes: int  # at most, of one program
    threads: int
    programs: int


KIB = 1024
PROCESSORS = {
    80: Processor(164 * KIB, 163 * KIB, 2048, 32),
    89: Processor(100 * KIB, 99 * KIB, 1536, 24),
    90: Processor(228 * KIB, 227 * KIB, 2048, 32),
    100: Processor(228 * KIB, 227 * KIB, 2048, 32),
    120: Processor(100 * KIB, 99 * KIB, 1536, 24),
}
REGISTERS = 64 * KIB  # registers per multiprocessor, the same on all processors
RESERVED_BYTES = 1 * KIB  # shared memory that the system reserves per program
TENSOR_COLUMNS = 512  # columns of tensor memory per Blackwell multiprocessor

STORAGES = (
    {"weight": "fp32", "states": "fp32", "rounding": None},
    {"weight": "bf16", "states": "fp32"},
    {"weight": "bf16", "states": "bf16"},
    {"weight": "bf16", "states": "int8"},
    {"weight": "bf16", "states": "int4"},
    {"weight": "bf16", "states": "int8", "master": "split8"},
)
RULES: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    ("SGD", (("momentum", 0.9),)),
    ("Lion", ()),
    ("RMSprop", ()),
    ("Adagrad", ()),
    ("NAdam", ()),
    ("RAdam", ()),
    ("Adadelta", ()),
    ("Adamax", ()),
    ("ASGD", ()),
    ("Rprop", ()),
)
DEFAULT = KernelJob(90)
# AdamW on Hopper, bf16 weights rounded stochastically: most instructions an element after the last loop. Above them the
# step of a few hundred tokens is bound by the integer pipe, not by memory (docs/roofline.md).
MOST_INSTRUCTIONS = {
    (None, "fp32"): 42,
    (None, "bf16"): 54,
    (None, "int8"): 78,
    (None, "int4"): 90,
    ("split8", "int8"): 90,
}


def quick() -> Iterator[KernelJob]:
    """Yield the default kernel on every generation, and the most demanding ones."""
    yield DEFAULT
    yield replace(DEFAULT, states="int8")
    yield replace(DEFAULT, norm_only=True)
    yield KernelJob(80)
    yield KernelJob(100)


def usual() -> Iterator[KernelJob]:
    """Yield all kernels on Hopper, and the most demanding ones elsewhere."""
    yield from on(90)
    for arch in PROCESSORS:
        if arch != 90:
            yield from (KernelJob(arch, **STORAGES[i]) for i in (1, 4))
            yield KernelJob(arch, operands="fp32", **STORAGES[0])
            yield KernelJob(arch, kind=tile_configs.GROUPED, **STORAGES[3])


def every() -> Iterator[KernelJob]:
    """Yield every combination."""
    for arch in PROCESSORS:
        yield from on(arch)


def on(arch: int) -> Iterator[KernelJob]:
    """Yield all kernels of one processor."""
    yield from (KernelJob(arch, **storage) for storage in STORAGES)
    yield from (KernelJob(arch, rule=rule, hyper=hyper) for rule, hyper in RULES)
    yield from (KernelJob(arch, operands="fp32", **STORAGES[i]) for i in (0, 4))
    yield from (
        KernelJob(arch, kind=kind, **STORAGES[i]) for kind in (tile_configs.GATHER, tile_configs.DENSE) for i in (0, 4)
    )
    yield from (KernelJob(arch, operands=operands, norm_only=True) for operands in ("bf16", "fp32"))
    yield from (KernelJob(arch, biased=True, **STORAGES[i]) for i in (1, 3))
    yield from (KernelJob(arch, kind=tile_configs.GROUPED, **STORAGES[i]) for i in (1, 2, 3, 4, 5))
    yield KernelJob(arch, kind=tile_configs.GROUPED, operands="fp32", **STORAGES[0])
    yield KernelJob(arch, kind=tile_configs.GROUPED, norm_only=True)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="compile five kernels and write nothing")
    size.add_argument("--all", action="store_true", help="compile every storage and rule for every processor")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of parallel compilations")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/kernels.json)")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown page whose table is replaced")
    args = parser.parse_args()

    start = time.monotonic()
    wanted = list(quick() if args.quick else every() if args.all else usual())
    rows = []
    for row in measure_all(wanted, args.jobs):
        rows.append(row)
        print(f"[{len(rows)}/{len(wanted)}] {row['kernel']}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    header, lines = kernel_table(rows)
    print_table(header, lines)
    if not args.quick:
        out = write_result("kernels", rows, args.out, versions=tool_versions())
        fill_table(args.page, "table", header, lines)
        print(f"\nwritten to {out} and {args.page.name}")
    problems = [f"{row['kernel']}: {what}" for row in rows for what in row["problems"]]
    spilling = sum(row["spill_instructions"] > 0 for row in rows)
    slow = sum(row["slow_path_spill_instructions"] > 0 for row in rows)
    print(f"\n{len(rows)} kernels: {spilling or 'zero'} with spills; {slow} more save registers on the slow path of a")
    print("division, by the scale of a block whose largest element is not finite or beyond 2^126")
    sys.exit("\n".join(problems) if problems else 0)


def measure_all(wanted: list[KernelJob], jobs: int) -> Iterator[dict[str, Any]]:
    """Yield a row per job, compiled in several processes."""
    if jobs == 1:
        yield from map(measure_kernel, wanted)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(measure_kernel, wanted)


def measure_kernel(job: KernelJob) -> dict[str, Any]:
    """Compile, inspect and judge one kernel."""
    kernel = compile_kernel(job)
    found = inspect_ptx.stores(kernel.asm["ttir"])
    code, usage = inspect_ptx.read_cubin(kernel.asm["cubin"])
    tiles, metadata = job.tiles, kernel.metadata
    threads = 32 * tiles.warps
    row = {
        "kernel": job.id,
        "arch": f"sm_{job.arch}",
        "gradient_from": job.kind,
        "operands": job.operands,
        "rule": None if job.norm_only else job.rule,
        "weight": job.weight,
        "states": None if job.norm_only else job.states,
        "master": job.master,
        "tile": [tiles.bn, tiles.bk, tiles.bt],
        "sub_tiles": 2**tiles.levels,
        "warps": tiles.warps,
        "stages": tiles.stages,
        "maxnreg": tiles.maxnreg,
        "registers": usage.registers,
        "stack_bytes": usage.stack_bytes,
        "local_bytes": usage.local_bytes,
        "spill_instructions": code.spills,
        "slow_path_spill_instructions": code.slow_spills,
        "shared_bytes": metadata.shared,
        "programs_per_multiprocessor": programs(job, usage.registers, metadata),
        "instructions_per_element": code.straight * threads / kernel.tile,
        "instructions_after_loops": code.after * threads / kernel.tile,
        "integer_after_loops": code.integer * threads / kernel.tile,
        "instructions_in_loops": code.looped,
        "matrix": code.matrix,
        "stored_bytes_per_element": sum(store.nbytes for store in found) / kernel.tile,
        "stored_arguments": sorted({store.argument for store in found}),
    }
    return row | {"problems": list(problems(job, row, kernel, found, code))}


def programs(job: KernelJob, registers: int, metadata: Any) -> int:
    """Return how many programs a multiprocessor holds."""
    has, warps = PROCESSORS[job.arch], job.tiles.warps
    of_warp = -(-registers * 32 // 256) * 256  # registers are handed out to a warp, 256 at a time
    limits = [
        REGISTERS // (of_warp * warps),
        has.shared_bytes // (metadata.shared + RESERVED_BYTES),
        has.threads // (32 * warps),
        has.programs,
    ]
    if columns := getattr(metadata, "tmem_size", 0):
        limits.append(TENSOR_COLUMNS // columns)
    return min(limits)


def problems(
    job: KernelJob,
    row: dict[str, Any],
    kernel: CompiledKernel,
    found: list[inspect_ptx.KernelStore],
    code: inspect_ptx.Code,
) -> Iterator[str]:
    """Yield broken promises."""
    if row["spill_instructions"] or (
        row["stack_bytes"] + row["local_bytes"] and not row["slow_path_spill_instructions"]
    ):
        yield f"spills {row['stack_bytes']} bytes ({row['spill_instructions']} instructions)"
    if row["shared_bytes"] > PROCESSORS[job.arch].program_shared_bytes:
        yield f"{row['shared_bytes']} bytes of shared memory do not fit"
    if job.arch == 90 and job.kind in (tile_configs.PRODUCT, tile_configs.GROUPED) and job.operands == "bf16":
        if row["programs_per_multiprocessor"] < 2:
            yield f"{row['programs_per_multiprocessor']} program per multiprocessor"
    most = MOST_INSTRUCTIONS.get((job.master, job.states))
    if job == KernelJob(90, states=job.states, master=job.master) and most is not None:
        if row["instructions_after_loops"] > most:
            yield f"{row['instructions_after_loops']:.1f} instructions an element after the last loop, more than {most}"
    yield from stray_stores(kernel, found, code)


def stray_stores(kernel: CompiledKernel, found: list[inspect_ptx.KernelStore], code: inspect_ptx.Code) -> Iterator[str]:
    """Yield global stores beyond weight, states, scales and a norm, such as a gradient."""
    stored = inspect_ptx.bytes_by_argument(found)
    if stored != kernel.store_bytes:
        yield f"a program stores {stored}, not {kernel.store_bytes}"
    if code.other_writes:
        yield f"writes to global memory by {', '.join(code.other_writes)}"
    for space in ("global_scratch_size", "profile_scratch_size"):
        if getattr(kernel.metadata, space, 0):
            yield f"{space} is {getattr(kernel.metadata, space)}"
    threads = 32 * kernel.job.tiles.warps
    # Of a tile every element is stored by one thread. Where there are more threads than numbers (one per row, a bias)
    # each thread has an instruction of its own, and all but one of those that hold the same number are masked off.
    expected = sum(
        store.nbytes if store.wide and store.elements >= threads else store.nbytes // store.elements * threads
        for store in found
    )
    if code.stg_bytes * threads != expected:
        yield f"machine code stores {code.stg_bytes * threads} bytes, masked ones included, not {expected}"


def tool_versions() -> dict[str, str]:
    """Return the versions of the CUDA tools."""
    found = {name: re.search(r"V[\d.]+", inspect_ptx.tool(name, "--version")) for name in ("ptxas", "ptxas-blackwell")}
    return {"triton": triton.__version__, **{name: match[0] if match else "?" for name, match in found.items()}}


def kernel_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table."""
    header = [
        "kernel", "tile", "sub-tiles", "warps", "registers", "spilled bytes", "shared KiB", "programs / SM",
        "instructions / element", "after the last loop", "products", "stored bytes / element",
    ]  # fmt: skip
    lines = [
        [
            row["kernel"],
            "x".join(map(str, row["tile"])),
            str(row["sub_tiles"]),
            str(row["warps"]),
            str(row["registers"]),
            spilled(row),
            f"{row['shared_bytes'] / KIB:.0f}",
            str(row["programs_per_multiprocessor"]),
            f"{row['instructions_per_element']:.0f}",
            f"{row['instructions_after_loops']:.1f}",
            row["matrix"],
            f"{row['stored_bytes_per_element']:.3f}",
        ]
        for row in rows
    ]
    return header, lines


def spilled(row: dict[str, Any]) -> str:
    """Describe the spills of a row."""
    count = row["stack_bytes"] + row["local_bytes"]
    return f"0 ({count})" if count and not row["spill_instructions"] else str(count)


if __name__ == "__main__":
    main()
