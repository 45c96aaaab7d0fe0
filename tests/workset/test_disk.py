"""Files: generations, damage, a full disk, kill -9, and no copy in memory."""

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from gradfold._io import hold_folder
from gradfold.errors import FoldError
from gradfold.workset import DiskStore, files
from tests.workset.test_store import assert_same, some


@pytest.fixture
def disk(tmp_path):
    made = DiskStore(tmp_path)
    yield made
    made.close()


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_the_files_are_safetensors(disk, tmp_path):
    disk.put("a", some())
    assert_same(dict(sorted(load_file(next(tmp_path.iterdir())).items())), some())


def test_old_versions_go_unless_a_snapshot_holds_them(disk, tmp_path):
    disk.put("a", some(1.0))
    disk.put("a", some(2.0))
    assert len(names(tmp_path)) == 1
    first = disk.snapshot()
    disk.put("b", some(5.0))
    disk.put("a", {**disk.take("a", "cpu"), **some(3.0)})
    disk.put("a", some(4.0))
    assert len(names(tmp_path)) == 3
    disk.restore(first)
    assert disk.keys() == ["a"] and len(names(tmp_path)) == 1
    disk.put("a", some(6.0))
    disk.restore(first)
    assert_same(disk.take("a", "cpu"), some(2.0))
    disk.put("a", some(7.0))
    disk.release(first)
    assert len(names(tmp_path)) == 1
    with pytest.raises(FoldError, match="missing"):
        disk.restore(first)
    assert_same(disk.take("a", "cpu"), some(7.0))


def test_what_is_taken_stays_on_the_disk_until_its_next_version_is_whole(disk, tmp_path):
    disk.put("a", some(1.0))
    disk.take("a", "cpu")
    assert disk.keys() == [] and disk.snapshot() == {}
    again = DiskStore(tmp_path)  # as after a crash
    assert again.adopt() == ["a"]
    assert_same(again.peek("a"), some(1.0))
    disk.drop("a")
    assert names(tmp_path) == []


def test_another_process_goes_on_from_the_snapshot(tmp_path):
    one = DiskStore(tmp_path)
    one.put("a[0:2]", some(1.0))
    one.put("b", some(2.0))
    saved = one.snapshot()
    one.put("b", some(3.0))
    (tmp_path / ".writing-x.safetensors").write_bytes(b"half")
    two = DiskStore(tmp_path)
    assert two.keys() == [] and len(names(tmp_path)) == 3
    two.restore(saved)
    assert_same(two.peek("b"), some(2.0))
    two.put("b", some(4.0))
    two.restore(saved)  # the checkpoint is still there
    two.prune(saved)
    assert names(tmp_path) == sorted(saved.values())
    three = DiskStore(tmp_path)
    assert sorted(three.adopt()) == ["a[0:2]", "b"]
    assert_same(three.take("b", "cpu"), some(2.0))
    two.prune()  # what is current stays
    assert names(tmp_path) == sorted(saved.values())


def test_a_mapped_tensor_outlives_its_file_and_never_writes_to_it(disk):
    disk.put("a", some(1.0))
    seen = disk.peek("a")
    seen["exp_avg"].zero_()
    assert_same(disk.peek("a"), some(1.0))
    kept = disk.peek("a")
    disk.put("a", some(2.0))
    assert_same(kept, some(1.0))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda p: p.unlink(), "missing"),
        (lambda p: p.write_bytes(b""), "damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "damaged"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:20]), "damaged"),
        (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), "damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x99"), "CRC-32"),
    ],
)
def test_a_missing_or_damaged_file_is_named_and_nothing_changes(tmp_path, harm, says, ahead):
    disk = DiskStore(tmp_path)
    disk.put("a", some(1.0))
    disk.put("b", some(2.0))
    saved = disk.snapshot()
    harm(tmp_path / saved["a"])
    if ahead:
        disk.prefetch(["a"], "cpu")
    with pytest.raises(FoldError, match=says) as error:
        disk.take("a", "cpu")
    assert saved["a"] in str(error.value)
    assert sorted(disk.keys()) == ["a", "b"]
    if says != "CRC-32":  # data is checked when it is read
        disk.put("b", some(3.0))
        with pytest.raises(FoldError, match=says):
            disk.restore(saved)
        assert_same(disk.take("b", "cpu"), some(3.0))
    disk.close()


def test_a_snapshot_that_is_not_of_this_folder(disk):
    disk.put("a", some())
    disk.put("b", some())
    saved = disk.snapshot()
    with pytest.raises(FoldError, match="holds b, not a"):
        disk.restore({"a": saved["b"]})
    with pytest.raises(FoldError, match="not a file of"):
        disk.restore({"a": "../" + saved["a"]})


@pytest.mark.parametrize("where", ["_write_all", "fsync", "replace"])
def test_a_full_disk_loses_nothing(disk, tmp_path, monkeypatch, where):
    disk.put("a", some(1.0))
    before = names(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    tensors = some(2.0)
    with monkeypatch.context() as patch:
        patch.setattr(files if where == "_write_all" else files.os, where, full)
        with pytest.raises(FoldError, match="disk is full"):
            disk.put("a", tensors)
    assert names(tmp_path) == before
    assert_same(disk.peek("a"), some(1.0))
    assert_same(tensors, some(2.0))
    disk.put("a", tensors)
    assert_same(disk.take("a", "cpu"), some(2.0))


def test_a_dtype_the_format_lacks_and_a_folder_that_is_none(disk, tmp_path):
    with pytest.raises(FoldError, match="complex"):
        disk.put("a", {"x": torch.zeros(2, dtype=torch.complex128)})
    (tmp_path / "file").write_text("")
    with pytest.raises(FoldError, match="folder="):
        DiskStore(tmp_path / "file")


def test_keys_make_safe_and_different_names(disk, tmp_path):
    keys = ["a.b[0:1]", "a.b[0_1]", "A.b[0:1]", "../up", "/abs", "..", "", "ä", "x" * 400, "x" * 401, ".writing-a"]
    for i, key in enumerate(keys):
        disk.put(key, some(float(i)))
    assert len({name.lower() for name in names(tmp_path)}) == len(keys)
    again = DiskStore(tmp_path)
    assert sorted(again.adopt()) == sorted(keys)
    for i, key in enumerate(keys):
        assert_same(again.take(key, "cpu"), some(float(i)))


def test_the_parts_of_a_file_that_another_process_writes_stay(tmp_path):
    """And those of other programs."""
    part, letter = tmp_path / ".writing-x.safetensors.0123abcd", tmp_path / ".writing-letter.json.0123abcd"
    part.write_bytes(b"half")
    letter.write_bytes(b"half")
    with hold_folder(tmp_path):
        DiskStore(tmp_path)
        assert part.exists()
    DiskStore(tmp_path)
    assert names(tmp_path) == [letter.name]


def test_a_file_that_is_there_already_is_not_replaced(disk, tmp_path):
    """On a file system without locks two processes may choose the same version."""
    other = DiskStore(tmp_path)
    other.put("a", some(1.0))
    disk.put("a", some(2.0))
    assert_same(other.take("a", "cpu"), some(1.0))
    assert_same(disk.take("a", "cpu"), some(2.0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_neither_writes_nor_deletes(disk, tmp_path):
    disk.put("a", some(1.0))
    before = names(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            disk.put("a", some(2.0))
        except FoldError as error:
            disk.drop("a")
            disk.prune()
            os._exit(0 if "was forked from the one whose states are there" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert names(tmp_path) == before
    assert_same(disk.take("a", "cpu"), some(1.0))


WRITER = """
import sys, torch
from gradfold.workset import DiskStore
disk = DiskStore(sys.argv[1])
value = float(sys.argv[2])
disk.adopt()
while True:
    value += 1
    for key in ("a", "b"):
        disk.put(key, {"x": torch.full((64, 1024), value), "step": torch.tensor(value)})
        print(key, value, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_each_key_is_old_or_new(tmp_path):
    draw, value = random.Random(0), 0.0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(value)], stdout=subprocess.PIPE, text=True
        )
        said = {"a": 0.0, "b": 0.0}
        key, number = process.stdout.readline().split()
        said[key] = float(number)
        time.sleep(draw.uniform(0.0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        for line in process.communicate()[0].splitlines():
            key, number = line.split()
            said[key] = float(number)
        disk = DiskStore(tmp_path)
        kept = disk.adopt()
        for key in kept:
            found = disk.peek(key)
            number = float(found["step"])
            assert said[key] <= number <= said[key] + 1 or said[key] == 0.0
            assert torch.equal(found["x"], torch.full((64, 1024), number))
            value = max(value, number)
        assert said["a"] > 0 and "a" in kept
        assert not [name for name in names(tmp_path) if name.startswith(".")]
        disk.prune()
        assert len(names(tmp_path)) == len(kept)


MEMORY = """
import sys, torch
from gradfold.workset import DiskStore
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024
disk = DiskStore(sys.argv[1])
tensor = torch.randn(4 << 20 >> 2)  # 4 MiB
disk.put("warm", {"x": tensor})
before = resident()
for i in range(16):
    disk.put(f"k{i}", {"x": tensor + i})
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_putting_64_mib_keeps_none_of_it_in_memory(tmp_path):
    # glibc keeps freed blocks, by chance more or fewer; so that what is measured is what is held, it maps each one
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8
