"""Builds wheel and sdist, looks into them, installs the wheel into an empty environment and uses it there.

    python .ci/dist_check.py                # `make dist-check`: what the wheel asks for is linked from this environment
    python .ci/dist_check.py --download     # installed by pip instead, torch first

Nothing is fetched: downloading torch again would take minutes. So the empty environment gets links to those packages of
this one that the wheel's metadata names, and those that they name in turn, and nothing else: a dependency that was
forgotten cannot be imported, and pip, which installs the wheel without an index, refuses a version that does not suit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILES = ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "Makefile")
FILES += ("pyproject.toml", "hatch_build.py", "PKG-INFO")
FOLDERS = ("src", "tests", "docs", "benchmarks", "examples")
MAY_BE = ("mkdocs.yml", ".gitignore")
JUNK = re.compile(
    r"(^|/)(__pycache__|\.venv[^/]*|\.git|\.[a-z_]+_cache|[^/]+\.egg-info)/|\.(pyc|orig|rej|log|bin|gguf)$|^(runs|site|dist)/"
)
MOST_BYTES = {"wheel": 3 << 20, "sdist": 12 << 20}


class Wrong(Exception):
    """Something about the distributions is not as it must be."""


# what lies in them ----------------------------------------------------------------------------------------------------


def check_sdist(names: Iterable[str]) -> None:
    """Check the paths of an sdist, below its one folder. Raises Wrong."""
    found = set(names)
    if missing := [name for name in FILES if name not in found] or sorted(tracked(*FOLDERS) - found):
        raise Wrong(f"sdist: without {', '.join(missing[:5])}")
    if more := sorted({name.split("/")[0] for name in found} - {*FILES, *FOLDERS, *MAY_BE}):
        raise Wrong(f"sdist: holds {', '.join(more)}, which nobody has listed")
    _no_junk("sdist", found)


def check_wheel(names: Iterable[str]) -> None:
    """Check the paths of a wheel: the package, its metadata and licence, and no more. Raises Wrong."""
    found = set(names)
    for wanted in ("gradfold/__init__.py", "gradfold/py.typed", "gradfold/backends/triton/kernels/step.py"):
        if wanted not in found:
            raise Wrong(f"wheel: without {wanted}")
    tops = {name.split("/")[0] for name in found}
    (info,) = [top for top in tops if top.endswith(".dist-info")]
    if more := sorted(tops - {"gradfold", info}):
        raise Wrong(f"wheel: installs {', '.join(more)} beside gradfold")
    if f"{info}/licenses/LICENSE" not in found:
        raise Wrong("wheel: without its licence")
    if missing := sorted({path.removeprefix("src/") for path in tracked("src")} - found):
        raise Wrong(f"wheel: without {', '.join(missing[:5])}")
    _no_junk("wheel", found)


def tracked(*folders: str) -> set[str]:
    """Return the files of these folders that git knows."""
    given = ["git", "ls-files", "-z", *folders]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}


def check_metadata(text: str, version: str) -> list[str]:
    """Check METADATA as the package index does, and that its links lead somewhere. Returns what it asks for.

    Raises Wrong.
    """
    try:
        found = Metadata.from_email(text, validate=True)
    except Exception as error:  # a group of them
        raise Wrong(f"METADATA: {error}: {getattr(error, 'exceptions', '')}") from error
    if str(found.version) != version:
        raise Wrong(f"METADATA: version {found.version}; src/gradfold/_version.py has {version}")
    if not {"homepage", "repository", "issues", "changelog"} <= {name.lower() for name in found.project_urls or {}}:
        raise Wrong(f"METADATA: its URLs are {found.project_urls}")
    if found.description_content_type != "text/markdown" or "# gradfold" not in (found.description or ""):
        raise Wrong("METADATA: the description is not the README in Markdown")
    if relative := re.findall(r"\]\((?!https?://|#)[^)]*\)", found.description or ""):
        raise Wrong(f"METADATA: links of the description lead nowhere on the index: {', '.join(relative)}")
    if found.license_expression != "Apache-2.0" or "LICENSE" not in (found.license_files or []):
        raise Wrong("METADATA: the licence is not Apache-2.0, or LICENSE is not named")
    return [str(need) for need in found.requires_dist or ()]


def _no_junk(what: str, names: set[str]) -> None:
    if junk := sorted(name for name in names if JUNK.search(name)):
        raise Wrong(f"{what}: holds {', '.join(junk[:5])}")


# an environment with it -----------------------------------------------------------------------------------------------


def wanted(needs: Iterable[str], extras: Iterable[str]) -> list[importlib.metadata.Distribution]:
    """Return what these requirements ask for with these extras, and what that asks for in turn, as installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = [(line, frozenset(extras) | {""}) for line in needs]
    seen = set()
    while pending:
        line, chosen = pending.pop()
        need = Requirement(line)
        name = canonicalize_name(need.name)
        applies = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in chosen)
        if not applies or (name, *sorted(need.extras)) in seen:
            continue
        seen.add((name, *sorted(need.extras)))
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise Wrong(f"{need} is asked for, and not installed here") from None
        pending += [(line, frozenset(need.extras) | {""}) for line in found[name].requires or ()]
    return list(found.values())


def link(distributions: Iterable[importlib.metadata.Distribution], site: Path) -> None:
    """Link what these distributions have installed, by its first folder or file, into another environment."""
    for each in distributions:
        for file in each.files or ():
            top = file.parts[0]
            target = site / top
            if top in ("..", "__pycache__") or target.exists():
                continue
            target.symlink_to(Path(str(each.locate_file(top))).resolve())


def run(*words: str | Path, cwd: Path, expect: str = "") -> str:
    """Run a command outside of the checkout, with nothing of it in the environment. Raises Wrong."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    given = [str(word) for word in words]
    done = subprocess.run(given, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or expect not in done.stdout:
        shown = shlex.join(word[:200] for word in given)
        raise Wrong(f"{shown}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


FOLDED_STEP = """
import copy, importlib.util, sys
import torch
from torch import nn
import gradfold

assert gradfold.__file__.startswith(sys.prefix), gradfold.__file__
for name in ("tests", "benchmarks", "examples", "hatch_build"):
    assert importlib.util.find_spec(name) is None, name + " is installed, too"
torch.manual_seed(0)
plain = nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 11)).double()
folded = copy.deepcopy(plain)
tokens = torch.arange(22).remainder(11)
given = torch.optim.AdamW(plain.parameters(), lr=1e-2), gradfold.AdamW(folded.parameters(), lr=1e-2)
fold = gradfold.fold(folded, given[1])
for _ in range(3):
    for model, optimizer in zip((plain, folded), given):
        nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
        assert model is plain or all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
far = max((a - b).abs().max().item() for a, b in zip(plain.parameters(), folded.parameters()))
assert far < 1e-12, far
small = nn.Linear(256, 4).bfloat16()
coded = gradfold.AdamW(small.parameters(), states="int8", rounding="stochastic")
gradfold.fold(small, coded)
small(torch.ones(2, 256, dtype=torch.bfloat16)).sum().backward()
coded.step()
print("one step is torch's:", far)
"""
"""Run with the library's own dependencies only."""

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "vocab_size": 64,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
"""A config.json, for `gradfold plan`."""


def smoke(python: Path, folder: Path, version: str, link_extras) -> None:
    """Use the installed library and its commands. Raises Wrong."""
    run(python, "-c", FOLDED_STEP, cwd=folder, expect="one step is torch's")
    command = python.parent / "gradfold"
    run(command, "--version", cwd=folder, expect=f"gradfold {version}")
    run(command, "--help", cwd=folder, expect="fine-tune every weight")
    link_extras()
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    said = run(
        command, "plan", "--model", "tiny", "--batch", "1", "--tokens", "32", "--no-compare", "--json", cwd=folder
    )
    if json.loads(said)["peak_bytes"] <= 0:
        raise Wrong(f"gradfold plan: {said[:500]}")
    run(command, "train", "--help", cwd=folder, expect="--optimizer.states")


def main() -> None:
    """Build, check, install and use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", action="store_true", help="install everything by pip: minutes, gigabytes")
    parser.add_argument("--torch", default="torch", help="what --download installs first, as pip takes it")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheel and the sdist")
    args = parser.parse_args()
    try:
        print(_check(args))
    except Wrong as error:
        sys.exit(f"dist-check: {error}")


def _check(args: argparse.Namespace) -> str:
    version = re.search(r'"(.+)"', (ROOT / "src/gradfold/_version.py").read_text(encoding="utf-8").split("=")[1])[1]
    for old in args.out.glob("gradfold-*"):
        old.unlink()
    alone = () if args.download else ("--no-isolation",)
    run(sys.executable, "-m", "build", *alone, "--outdir", args.out, ROOT, cwd=ROOT)
    (wheel,), (sdist,) = args.out.glob("*.whl"), args.out.glob("*.tar.gz")
    for what, path in (("wheel", wheel), ("sdist", sdist)):
        if path.stat().st_size > MOST_BYTES[what]:
            raise Wrong(f"{what}: {path.stat().st_size:,} bytes, at most {MOST_BYTES[what]:,}")
    with tarfile.open(sdist) as held:
        check_sdist(member.name.partition("/")[2] for member in held.getmembers() if member.isfile())
    with zipfile.ZipFile(wheel) as held:
        check_wheel(held.namelist())
        (name,) = [name for name in held.namelist() if name.endswith(".dist-info/METADATA")]
        needs = check_metadata(held.read(name).decode("utf-8"), version)

    with tempfile.TemporaryDirectory(prefix="gradfold-dist-") as scratch:
        folder = Path(scratch)
        venv.create(folder / "venv")  # without pip: with nothing at all
        python = folder / "venv" / "bin" / "python"
        pip = (sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check")
        if args.download:
            run(*pip, "install", *shlex.split(args.torch), cwd=folder)
            run(*pip, "install", wheel, cwd=folder)
            smoke(python, folder, version, lambda: run(*pip, "install", f"{wheel}[train,plot]", cwd=folder))
        else:
            base = str(folder / "venv")
            site = Path(sysconfig.get_path("purelib", "venv", {"base": base, "platbase": base}))
            link(wanted(needs, ()), site)
            run(*pip, "install", "--no-index", wheel, cwd=folder)
            smoke(python, folder, version, lambda: link(wanted(needs, ("train", "plot")), site))
        run(*pip, "check", cwd=folder)
    sizes = [f"{path.name} ({path.stat().st_size:,} bytes)" for path in (wheel, sdist)]
    return f"{' and '.join(sizes)} are in order"


if __name__ == "__main__":
    main()
