"""What a release promises: one version, a dated changelog, a valid citation, and distributions that are looked into."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gradfold

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def load(path):
    """A module that is no part of any package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dist_check():
    pytest.importorskip("packaging.metadata")
    return load(ROOT / ".ci" / "dist_check.py")


# version, changelog, citation -----------------------------------------------------------------------------------------


def test_the_changelog_has_the_version_dated_and_in_sections():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(gradfold.__version__)} - \d{{4}}-\d\d-\d\d", headings[1])
    of_release = text.split(f"## {headings[1]}")[1]
    assert re.findall(r"^### (.*)$", of_release, re.M)[:4] == ["Added", "Changed", "Deprecated", "Fixed"]


def test_the_citation_is_valid_and_of_this_version():
    """By the fields of the Citation File Format 1.2.0 that we use."""
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert said["cff-version"] == "1.2.0" and said["type"] == "software"
    assert said["version"] == gradfold.__version__ and said["license"] == PROJECT["license"]
    heading = re.search(r"^## [\d.]+ - (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert str(said["date-released"]) == heading[1]
    assert said["repository-code"] == PROJECT["urls"]["Repository"]
    assert set(said) <= {
        "cff-version", "message", "type", "title", "abstract", "authors", "version", "date-released", "license",
        "repository-code", "url", "keywords", "references",
    }  # fmt: skip
    for person in [*said["authors"], *(author for each in said["references"] for author in each["authors"])]:
        assert set(person) in ({"name"}, {"given-names", "family-names"})
    for each in said["references"]:
        assert {"type", "title", "authors"} <= set(each) and each["identifiers"][0]["type"] == "other"


def test_urls_stand_for_an_owner():
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} <= set(PROJECT["urls"])
    assert all(url.startswith("https://") for url in PROJECT["urls"].values())


def test_the_package_index_shows_links_that_lead_somewhere():
    pytest.importorskip("hatchling")
    hook = load(ROOT / "hatch_build.py")
    told = hook.absolute_links("[a](docs/a.md#b) ![p](docs/p.png) [w](https://w) [h](#here)", "https://r", "v1")
    assert told == "[a](https://r/blob/v1/docs/a.md#b) ![p](https://r/raw/v1/docs/p.png) [w](https://w) [h](#here)"


# the workflow and the hooks -------------------------------------------------------------------------------------------


def test_the_workflow_runs_what_contributors_run():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    pythons = jobs["run"]["strategy"]["matrix"]["python"]
    assert [f"Programming Language :: Python :: {python}" for python in pythons] == [
        said for said in PROJECT["classifiers"] if "Python ::" in said
    ]
    said = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert sum(".ci/run" in line for line in said) == 2 and (ROOT / ".ci" / "run").exists()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([\w-]+)", " ".join(said)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_templates_and_hooks_parse_and_are_pinned():
    yaml = pytest.importorskip("yaml")
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    given = [need for repo in hooks for hook in repo["hooks"] for need in hook["additional_dependencies"]]
    assert {need.partition("==")[0] for need in given} == {"ruff", "pre-commit-hooks"}
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", need) for need in given)


# wheel and sdist ------------------------------------------------------------------------------------------------------


@pytest.fixture
def names(dist_check):
    """The paths of distributions that are in order."""
    info = "gradfold-0.1.0.dist-info"
    try:
        own = {path.removeprefix("src/") for path in dist_check.tracked("src")}
        everything = dist_check.tracked(*dist_check.FOLDERS)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    wheel = {*own, f"{info}/METADATA", f"{info}/RECORD", f"{info}/licenses/LICENSE"}
    return {"wheel": wheel, "sdist": {*everything, *dist_check.FILES}}


WRONG = {
    "tests installed": ("wheel", "+", "tests/conftest.py", "installs tests beside gradfold"),
    "a cache": ("wheel", "+", "gradfold/__pycache__/x.cpython-311.pyc", "holds gradfold/__pycache__"),
    "no licence in the wheel": ("wheel", "-", "gradfold-0.1.0.dist-info/licenses/LICENSE", "without its licence"),
    "no marker of types": ("wheel", "-", "gradfold/py.typed", "without gradfold/py.typed"),
    "a module left out": ("wheel", "-", "gradfold/dist/tiles.py", "without gradfold/dist/tiles.py"),
    "no licence in the sdist": ("sdist", "-", "LICENSE", "without LICENSE"),
    "a test left out": ("sdist", "-", "tests/conftest.py", "without tests/conftest.py"),
    "a run": ("sdist", "+", "runs/x/summary.json", "holds runs"),
    "somebody's notes": ("sdist", "+", "notes.txt", "holds notes.txt"),
    "weights": ("sdist", "+", "tests/model.gguf", "holds tests/model.gguf"),
}


def test_distributions_in_order_pass(dist_check, names):
    dist_check.check_wheel(names["wheel"])
    dist_check.check_sdist(names["sdist"])


@pytest.mark.parametrize(("what", "how", "name", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_distribution_is_named(dist_check, names, what, how, name, said):
    changed = names[what] | {name} if how == "+" else names[what] - {name}
    with pytest.raises(dist_check.Wrong, match=re.escape(said)):
        getattr(dist_check, f"check_{what}")(changed)


METADATA = """Metadata-Version: 2.4
Name: gradfold
Version: 0.1.0
Project-URL: Homepage, https://a
Project-URL: Repository, https://a
Project-URL: Issues, https://a
Project-URL: Changelog, https://a
License-Expression: Apache-2.0
License-File: LICENSE
Requires-Dist: numpy
Requires-Dist: tyro; extra == 'train'
Provides-Extra: train
Description-Content-Type: text/markdown

# gradfold

[there](https://a/b)
"""


def test_metadata_in_order_tells_what_it_asks_for(dist_check):
    needs = dist_check.check_metadata(METADATA, "0.1.0")
    assert needs == ["numpy", 'tyro; extra == "train"']
    assert [found.metadata["Name"] for found in dist_check.wanted(needs, ())] == ["numpy"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Version: 0.1.0\n", "Version: 0.1.0.dev0\n", "version 0.1.0.dev0"),
        ("https://a/b", "docs/b.md", "lead nowhere"),
        ("Project-URL: Issues, https://a\n", "", "its URLs"),
        ("text/markdown", "text/plain", "not the README"),
        ("License-File: LICENSE\n", "", "licence"),
        ("License-Expression: Apache-2.0", "License-Expression: Apache 2", "license"),
    ],
)
def test_what_is_wrong_with_metadata_is_named(dist_check, old, new, said):
    with pytest.raises(dist_check.Wrong, match=said):
        dist_check.check_metadata(METADATA.replace(old, new), "0.1.0")


def test_a_requirement_that_is_not_here_is_named(dist_check):
    with pytest.raises(dist_check.Wrong, match="no-such-package"):
        dist_check.wanted(["no-such-package-of-ours>=1"], ())


@pytest.mark.slow
def test_distributions_are_built_installed_and_used(tmp_path):
    """``make dist-check``."""
    for module in ("build", "hatchling", "packaging.metadata"):
        pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "dist_check.py", "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0 and "in order" in done.stdout, done.stderr
