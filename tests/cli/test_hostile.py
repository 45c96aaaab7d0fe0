"""Hostile command lines (`hostile.py`): one line on standard error, exit code 2, nothing written, and no long wait.

Those that are refused while words and files are read run in this process. The slow run takes every one of them, each in
a process of its own with little memory, and what only a whole process can show: closed pipes, no home, other locales.
"""

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from gradfold.cli.main import main
from gradfold.train.recipe_file import load_fields
from tests.cli import hostile

EVERY = hostile.all_cases()
AT_ONCE = [name for cases in (hostile.yaml_cases, hostile.record_cases, hostile.other_cases) for name, _ in cases()]
AT_ONCE += [
    name
    for name, words in hostile.train_cases()
    if words[5:6] and words[5] in (*hostile.INTEGERS, *hostile.FRACTIONS) and "out of range" not in name
]
SECONDS = 20
MEMORY_BYTES = 3 * 2**30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    hostile.furnish(folder)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spelled(words, place):
    return [word.replace(hostile.PLACE, str(place)) for word in words]


def names_in(place):
    return sorted(path.name for path in place.iterdir())


def judge(code, out, err, home, place, before):
    assert err.startswith("gradfold: ") and err.endswith("\n") and err.count("\n") == 1, err[-2000:]
    assert len(err) < 1100 and all(letter.isprintable() or letter == "\n" for letter in err)
    assert (code, out) == (2, ""), err
    assert not list(home.iterdir()) and names_in(place) == before


@pytest.fixture
def alarm():
    """Ends what hangs."""

    def ring(*_):
        raise TimeoutError(f"still at it after {SECONDS} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("name", AT_ONCE)
def test_refused_at_once(name, place, home, capsys, monkeypatch, alarm):
    from gradfold.cli import plan, train

    def reached(*_):
        raise AssertionError("the words were taken")

    monkeypatch.setattr(train, "parsed_again", reached)  # what comes after all checks of the words and the recipe
    monkeypatch.setattr(plan, "parsed_again", reached)
    before = names_in(place)
    words = spelled(EVERY[name], place)
    code = main(words)
    said = capsys.readouterr()
    judge(code, said.out, said.err, home, place, before)
    if "/yaml/" in words[-1]:
        assert "recipe " in said.err or "steps = " in said.err or "lr = " in said.err
    elif words[0] == "train" and len(words) == 7:
        assert words[5].rpartition(".")[2].lstrip("-").replace("-", "_") in said.err


@pytest.mark.parametrize("name", hostile.HARMLESS)
def test_what_looks_odd_and_is_not(name, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(hostile.HARMLESS[name])
    assert load_fields(path) == ({"steps": 1} if b"steps" in hostile.HARMLESS[name] else {})


def test_a_long_line_keeps_its_ends(capsys, home):
    assert main(["train", "--config", "x" * 3000 + "/recipe.yaml"]) == 2
    said = capsys.readouterr().err
    assert "xxx ... xxx" in said and said.rstrip().endswith("recipe.yaml: cannot be read (File name too long)")


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_command_line(name, place, home):
    """In a forked process, with a limit of memory and of time."""
    before = names_in(place)
    words = spelled(EVERY[name], place)
    out_path, err_path = place.parent / f"{place.name}-out", place.parent / f"{place.name}-err"
    status, out, err = forked(words, out_path, err_path)
    judge(status, out, err, home, place, before)


def forked(words, out_path, err_path, user=None):
    """Run the command line in a forked process: (exit code, standard output, standard error)."""
    process = os.fork()
    if process == 0:
        child(words, out_path, err_path, user)
    started, status = time.monotonic(), None
    while status is None and time.monotonic() - started < 3 * SECONDS:
        ended, status_word = os.waitpid(process, os.WNOHANG)
        status = os.waitstatus_to_exitcode(status_word) if ended else None
        time.sleep(0.01)
    if status is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert status is not None, "it hangs"
    out, err = (path.read_bytes().decode("utf-8", errors="replace") for path in (out_path, err_path))
    return status, out, err


def child(words, out_path, err_path, user=None):
    """The command line in a forked process, which this ends."""
    code = 99
    try:
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        for path, number in ((out_path, 1), (err_path, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), errors="backslashreplace", write_through=True)
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
        code = main(words)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    finally:
        os._exit(code)


def run(words, home, **options):
    """`gradfold` as a process of its own: (exit code, standard error)."""
    options.setdefault("stdout", subprocess.PIPE)
    command = [sys.executable, "-m", "gradfold", *words]
    done = subprocess.run(command, cwd=home, stderr=subprocess.PIPE, timeout=120, **options)
    return done.returncode, done.stderr.decode()


VERIFY = ["record", "verify", "--all", hostile.BUNDLE]


@pytest.mark.slow
@pytest.mark.parametrize("words", [VERIFY, ["train", "--help"], ["--help"]], ids=" ".join)
def test_standard_output_is_closed(words, tmp_path):
    script = 'exec "$@" >&-'
    command = ["sh", "-c", script, "sh", sys.executable, "-m", "gradfold", *words]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.decode() == "gradfold: standard output is closed; redirect it to a file, or to /dev/null\n"


@pytest.mark.slow
@pytest.mark.parametrize("words", [VERIFY, ["train", "--help"], ["--help"]], ids=" ".join)
def test_nobody_reads_standard_output(words, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    code, err = run(words, tmp_path, stdout=writing)
    os.close(writing)
    assert (code, err) == (2, "gradfold: standard output was closed before everything was printed\n")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_standard_output_is_a_full_disk(tmp_path):
    with open("/dev/full", "wb") as full:
        code, err = run(VERIFY, tmp_path, stdout=full)
    assert (code, err) == (2, "gradfold: the disk is full; free some space\n")


@pytest.mark.slow
def test_bytes_that_are_no_text(tmp_path):
    code, err = run([b"train", b"--data", b"caf\xe9.txt"], tmp_path)
    assert code == 2 and err == (
        "gradfold: the word 'caf\\udce9.txt' holds bytes that are not UTF-8, or half a surrogate pair; "
        "rename the file, or spell it otherwise\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("home_variable", [None, "", "/nonexistent"])
def test_no_home(home_variable, tmp_path):
    (tmp_path / "config.json").write_text("[]")
    env = {key: value for key, value in os.environ.items() if key not in ("HOME", "HF_HOME", "XDG_CACHE_HOME")}
    env |= {} if home_variable is None else {"HOME": home_variable}
    assert run(VERIFY, tmp_path, env=env)[0] == 0
    for words, said in (
        (["train", "--model", "./none"], "none: no such folder"),
        (["plan", "--no-compare", "--model", "~/none"], "none"),
        (["plan", "--no-compare", "--model", str(tmp_path)], "no transformers config"),
    ):
        code, err = run(words, tmp_path, env=env)
        assert code == 2 and err.count("\n") == 1 and said in err, err


@pytest.mark.slow
def test_another_locale(tmp_path):
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    assert run(["record", "show", hostile.BUNDLE], tmp_path, env=env) == (0, "")
    code, err = run(["train", "--model", "caf\u00e9", "--steps", "x"], tmp_path, env=env)
    assert code == 2 and err.count("\n") == 1


@pytest.mark.slow
def test_a_folder_that_is_gone(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'rmdir "$1"; shift; exec "$@"'
    for words in (
        ["train", "--data", "a.txt"],
        ["plan", "--plot", "x.png"],
        ["record", "merge", hostile.BUNDLE, "-o", "x"],
    ):
        gone.mkdir(exist_ok=True)
        command = ["sh", "-c", script, "sh", str(gone), sys.executable, "-m", "gradfold", *words]
        done = subprocess.run(command, cwd=gone, capture_output=True, text=True, timeout=120, env=os.environ)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert not list(tmp_path.iterdir())


@pytest.fixture
def open_folder():
    """A folder that every user can reach; those of pytest are its own."""
    folder = Path(tempfile.mkdtemp(prefix="gradfold-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_files_of_somebody_else(open_folder, monkeypatch):
    """Without the rights of the superuser, whom no permission stops."""
    for name in ("recipe.yaml", "a.txt", "document.json"):
        (open_folder / name).write_text("{}")
        (open_folder / name).chmod(0)
    (open_folder / "locked").mkdir(mode=0o500)
    (open_folder / "bundle.json").write_bytes(Path(hostile.BUNDLE).read_bytes())
    for name in ("out", "err"):
        (open_folder / name).touch()
        (open_folder / name).chmod(0o666)
    monkeypatch.chdir(open_folder)
    import gradfold.cli.record
    import gradfold.cli.train  # noqa: F401

    user = 65534 if os.getuid() == 0 else None
    for words, said in (
        (["train", "--config", "recipe.yaml"], "recipe recipe.yaml: cannot be read (Permission denied)"),
        (["record", "verify", "document.json"], "document.json: cannot be read (Permission denied)"),
        (["record", "merge", "bundle.json", "-o", "locked/x"], "locked/x: cannot be written (Permission denied)"),
        (["record", "keygen", "-o", "locked/k.pem"], "locked/k.pem: cannot be written (Permission denied)"),
    ):
        code, out, err = forked(words, open_folder / "out", open_folder / "err", user)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1, err
    assert not list((open_folder / "locked").iterdir())
