"""Compiling: how often, where it is kept, and what happens where it cannot be done."""

import os
import stat
import subprocess
import sys
import textwrap
import warnings

import pytest

from gradfold.backends import native
from gradfold.backends.native import build
from tests.cases import BUSY

from .eager import case, clone, differences, make, native_step


@pytest.fixture
def compiles(monkeypatch):
    """Counts the compiler's runs."""
    runs = []
    compile_ = build._compile
    monkeypatch.setattr(build, "_compile", lambda *args: (runs.append(args[2]), compile_(*args)))
    return runs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def step(given, shape=(3, 300)):
    parts, grad = make(given, shape)
    native_step(given, parts, grad)
    return parts


def test_one_compile_per_rule_codecs_and_guards(folder, forgotten, compiles):
    for taken in (1, 2, 3):
        for shape in [(252, 507), (1, 1), (3, 129), (5, 1000)]:
            step(case(BUSY["AdamW"], "bf16 stochastic", "int8", step=taken), shape)
    assert len(compiles) == 2, "the kernel, and once for all kernels products.c"
    step(case(BUSY["AdamW"], "bf16", "int8"))
    assert len(compiles) == 3


def test_the_same_kernel_comes_back(folder, forgotten):
    one, other = case(BUSY["AdamW"], "bf16", "int8", step=2), case(BUSY["AdamW"], "bf16", "int8", step=9)
    assert one.numbers != other.numbers and one.kernel() is other.kernel()


PROGRAM = """
    import torch
    from gradfold.backends import native
    from gradfold.backends.native import build
    from gradfold.codecs import weight_codec
    from gradfold.rules import SGDRule

    build._compile = lambda *args, real=build._compile: (print("compiled"), real(*args))
    group = dict(lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)
    numbers = SGDRule().advance({}, group, False)
    kernel = native.kernel(SGDRule(), numbers, weight_codec(torch.float32), [], [False])
    weight = torch.ones(2, 3)
    kernel({"values": weight}, [], torch.ones(2, 3), numbers, [None], 0, 3)
    print(weight.sum().item())
"""


def start() -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)], env=env, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_other_processes(folder):
    """Two that compile at the same time, and one that finds it done."""
    both = [start(), start()]
    assert [one.communicate(timeout=100)[0].splitlines()[-1] for one in both] == ["3.0", "3.0"]
    assert start().communicate(timeout=100)[0].splitlines() == ["3.0"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.suffix for path in folder.iterdir()} == {".c", ".so"}, "and no rubbish is left"


SOURCE = "int answer(void) { return 7; }"


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "text"])
def test_a_damaged_file_is_compiled_again(folder, damage, compiles):
    build.load(SOURCE)
    (path,) = folder.glob("*.so")
    content = path.read_bytes()
    made = {"cut": content[: len(content) // 2], "changed": content[:4000] + b"?" * 64 + content[4064:], "empty": b""}
    path.unlink()  # what is loaded is mapped from this file
    path.write_bytes(made.get(damage, b"not a shared object"))
    assert build.load(SOURCE).answer() == 7 and len(compiles) == 2
    assert build.load(SOURCE).answer() == 7 and len(compiles) == 2


def test_a_folder_that_others_can_write_to_is_not_used(folder):
    folder.mkdir()
    folder.chmod(0o777)
    assert build.load(SOURCE).answer() == 7
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADFOLD_CACHE", str(tmp_path / "file" / "cache"))
    assert build.load(SOURCE).answer() == 7


def test_the_usual_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("GRADFOLD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "gradfold"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "gradfold"


def refused(why: str) -> None:
    given = case(BUSY["Lion"])
    with pytest.warns(UserWarning, match="eager torch operations"):
        assert given.kernel() is None
    assert why in (native.reason() or "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert given.kernel() is None and case(BUSY["AdamW"]).kernel() is None, "one warning per process"


def test_no_compiler(folder, forgotten, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    refused("no C compiler ($CC, cc, gcc, clang)")


ANSWERS = '#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit\n'


@pytest.mark.parametrize(
    "does, why",
    [
        ('echo "x.c:1: error: no"; exit 1', "cc failed: x.c:1: error: no"),
        ('while [ "$1" != -o ]; do shift; done; : > "$2"', "does not load"),
        ("exit 0", "No such file"),
    ],
)
def test_a_compiler_that_fails(does, why, folder, forgotten, tmp_path, monkeypatch):
    fake = tmp_path / "cc"
    fake.write_text(ANSWERS + does + "\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    refused(why)


def test_switched_off(monkeypatch):
    given = case(BUSY["Lion"])
    monkeypatch.setenv("GRADFOLD_COMPILE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert given.kernel() is None and native.reason() == "GRADFOLD_COMPILE=0"
    monkeypatch.delenv("GRADFOLD_COMPILE")
    assert given.kernel() is not None


@pytest.mark.parametrize(
    "flag",
    [
        pytest.param("-fno-tree-vectorize", marks=pytest.mark.slow),
        pytest.param("-O1", marks=pytest.mark.slow),
        "-U__AVX2__",  # without what prelude.h has
    ],
)
@pytest.mark.parametrize("states", ["int8", "int4"])
def test_results_do_not_depend_on_vectors(flag, states, folder, forgotten, monkeypatch):
    given = case(BUSY["AdamW"], "bf16 stochastic", states, step=2)
    parts, grad = make(given, (9, 507))
    other = clone(parts)
    native_step(given, parts, grad)
    for name in ("_kernels", "_loaded"):
        monkeypatch.setattr(native, name, {})
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, flag])
    native_step(given, other, grad)
    assert differences(parts, other) == {}
    assert len(list(folder.glob("*.so"))) == 4, "the kernel and products.c, twice"


def test_what_is_compiled_can_be_read(folder, forgotten):
    kernel = case(BUSY["AdamW"], "bf16", "int8").kernel()
    assert kernel is not None
    sources = {path.read_text() for path in folder.glob("*.c")}
    assert sources == {kernel.source, native.PRODUCTS.read_text()}
