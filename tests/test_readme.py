"""The front door: what the README and the pages beside it tell a stranger to paste runs; commands are understood."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import gradfold

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
LOOP_PAGE, COMMAND_PAGE, FIGURES = (
    ROOT / "docs" / f"{name}.md" for name in ("in_your_loop", "command_line", "figures")
)
PAGES = (README, LOOP_PAGE, COMMAND_PAGE, FIGURES)
RESULTS = ROOT / "benchmarks" / "results"


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    """The fenced blocks of a language in a page, with what stands behind the language's name."""
    return re.findall(rf"^```{language} *(\w*)\n(.*?)^```", read(page), re.S | re.M)


def commands(page):
    """Every command of a page as its words: lines of shell blocks, and code in the text that begins with a program."""
    shell = "\n".join(code for _, code in blocks(page, "sh")).replace("\\\n", " ")
    lines = [
        *shell.splitlines(),
        *re.findall(r"`((?:OMP_NUM_THREADS=1 )?(?:gradfold|make|pip|python) [^`]+)`", read(page)),
    ]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


def of(program):
    return [pytest.param(words, id=f"{page.stem} {' '.join(words)[:60]}") for page in PAGES for words in commands(page)
            if program in (words[0], words[1] if words[0].startswith("OMP_NUM_THREADS") else None)]  # fmt: skip


# Python ---------------------------------------------------------------------------------------------------------------


def test_the_snippet_runs_as_pasted(capsys):
    """In an empty namespace, as a stranger's interpreter has; the loss falls, and no gradient was stored."""
    pytest.importorskip("transformers")
    (_, code), *_ = blocks(README, "python")
    assert 10 <= len([line for line in code.splitlines() if line.strip()]) <= 16
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    said = re.fullmatch(r"loss (\d+\.\d+), gradients stored: 0\n", capsys.readouterr().out)
    assert said and float(said[1]) < 7.0  # a model that has learned nothing: ln 2048 = 7.6


def test_two_lines_of_the_snippet_are_ours():
    (_, code), *_ = blocks(README, "python")
    ours = [line for line in code.splitlines() if "gradfold." in line]
    assert len(ours) == 2 and "two lines" in read(README)


@pytest.mark.slow
def test_the_snippet_runs_in_an_interpreter_of_its_own(tmp_path):
    (_, code), *_ = blocks(README, "python")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "gradients stored: 0" in done.stdout


def test_the_trainers_lines_run(tmp_path):
    """Each with a small trainer of the framework that it is for."""
    transformers, lightning = pytest.importorskip("transformers"), pytest.importorskip("lightning")
    accelerate = pytest.importorskip("accelerate")
    from tests.train.tiny import build_model

    (code,) = [code for _, code in blocks(README, "python") if "fold_trainer" in code]
    for_trainer, for_accelerate, for_lightning = code.splitlines()
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    names = {"gradfold": gradfold, "trainer": transformers.Trainer(build_model(), arguments)}
    exec(for_trainer, names)
    assert isinstance(names["trainer"], gradfold.hf.FoldMixin)

    model = build_model()
    loader = torch.utils.data.DataLoader([torch.arange(8)], batch_size=1)
    optimizer = torch.optim.AdamW(model.parameters())
    names |= {"accelerator": accelerate.Accelerator(cpu=True), "model": model, "optimizer": optimizer, "loader": loader}
    exec(for_accelerate, names)
    ids = next(iter(names["loader"]))
    names["accelerator"].backward(names["model"](input_ids=ids, labels=ids).loss)
    names["optimizer"].step()
    assert all(param.grad is None for param in model.parameters())

    exec(
        for_lightning.replace("Trainer(", "Trainer(accelerator='cpu', logger=False, "), names | {"lightning": lightning}
    )


def test_the_blocks_of_the_loop_page_run():
    """Each on the model that the page's first block makes."""
    pytest.importorskip("transformers")
    (kind, setup), *others = blocks(LOOP_PAGE, "python")
    assert kind == "setup" and len(others) == 2
    for _, code in others:
        names = {}
        exec(compile(setup, str(LOOP_PAGE), "exec"), names)
        before = [param.detach().clone() for param in names["model"].parameters()]
        exec(compile(code, str(LOOP_PAGE), "exec"), names)
        assert all(not torch.equal(a, b) for a, b in zip(before, names["model"].parameters(), strict=True))
        assert all(param.grad is None for param in names["model"].parameters())


def test_the_pages_name_what_there_is():
    """Names in code that begin with gradfold, wherever they stand in the four pages."""
    found = {name for page in PAGES for name in re.findall(r"\bgradfold((?:\.[A-Za-z_]\w*)+)", read(page))}
    assert {".fold", ".linear_cross_entropy", ".optim.from_torch"} <= found
    for path in sorted(found):
        module, *rest = path[1:].split(".")
        if module == "lightning" and importlib.util.find_spec("lightning") is None:
            continue
        thing = getattr(gradfold, module)
        for part in rest:
            thing = getattr(thing, part)


def test_every_name_of_the_library_stands_in_the_loop_page_or_the_docs():
    """What ``gradfold.__all__`` lists is found by somebody who searches the pages."""
    said = " ".join(read(page) for page in (README, *(ROOT / "docs").glob("*.md")))
    assert [name for name in gradfold.__all__ if not re.search(rf"\b{name}\b", said)] == []


# commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", of("gradfold"))
def test_a_gradfold_command_is_understood(words, monkeypatch, tmp_path):
    """Its flags and values are read and checked as the command does, without the work."""
    pytest.importorskip("tyro")
    from gradfold.cli import plan, train
    from gradfold.cli.main import COMMANDS, main
    from gradfold.train import loop

    assert words[1] in COMMANDS or words[1] == "COMMAND"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: d.jsonl\n")
    if words[1] == "plan":
        options, _ = plan._read(words[2:])
        plan._budgets(options)
    elif words[1] == "train" and "--help" not in words:
        asked = []
        monkeypatch.setattr(loop, "train", lambda recipe, out, saved: asked.append(recipe))
        monkeypatch.setattr(train, "_find_saved", lambda resume, given: Saved)
        assert main(words[1:]) == 0 and len(asked) == 1
    elif words[-1] == "--help":
        assert main([word for word in words[1:] if word != "COMMAND"]) == 0
    else:
        assert len(words) == 2  # the bare name


class Saved:
    """A checkpoint that --resume finds."""

    from gradfold.train.recipe import Recipe

    recipe = Recipe(model="m", data=("d.jsonl",))


@pytest.mark.parametrize("words", of("make"))
def test_a_make_target_exists(words):
    assert re.search(rf"^{words[1]}:.*?## ", read(ROOT / "Makefile"), re.M)


@pytest.mark.parametrize("words", of("pip"))
def test_a_pip_line_names_extras_that_exist(words):
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    assert words[1] == "install"
    for word in words[2:]:
        assert word in ("-e", "torch", ".") or re.fullmatch(r"(?:\.|gradfold)\[(\w+)\]", word)[1] in extras, word


def test_the_recipe_and_the_row_of_the_command_page_are_read(tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    from gradfold.train.recipe_file import load_recipe

    ((_, recipe),), ((_, row),) = blocks(COMMAND_PAGE, "yaml"), blocks(COMMAND_PAGE, "json")
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe)
    assert load_recipe("recipe.yaml").optimizer.states == "int8"
    assert [message["role"] for message in json.loads(row)["messages"]] == ["user", "assistant"]


# figures and links ----------------------------------------------------------------------------------------------------


def rows_of(page):
    """Rows of the page's tables whose last column names a result."""
    lines = [line.strip("|").split(" | ") for line in read(page).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in cells] for cells in lines if re.search(r"`\w+`, \(?[0-9a-f]{7}", cells[-1])]


def test_every_figure_names_the_revision_of_its_result():
    """`NAME`, REVISION: of the JSON if it says so, else in brackets that of the commit which brought it."""
    for page, least in ((README, 3), (FIGURES, 15)):
        found = [(name, revision) for row in rows_of(page) for name, revision in
                 re.findall(r"`(\w+)`, (\(?[0-9a-f]{7}\)?\+?)", row[-1])]  # fmt: skip
        assert len(found) >= least
        for name, revision in found:
            known = json.loads(read(RESULTS / f"{name}.json")).get("revision", "")
            said = known[:7] + "+" * known.endswith("-dirty")
            assert revision == said or revision.startswith("("), f"{page.name}: {name} is of {said}"


@pytest.mark.parametrize(
    ("method", "storage", "said"),
    [
        ("folded", {}, "folded **0.72 / 0.85 / 0.99**"),
        ("coded", {"states": "int8", "rounding": "stochastic"}, "int8 states 0.94 / 0.89 / 1.03"),
        ("hooks", {}, "hooks 0.77 / 0.96 / 1.01"),
        ("floor", {}, "floor 0.57 / 0.79 / 0.93"),
    ],
)
def test_the_step_times_are_those_of_the_file(method, storage, said):
    rows = json.loads(read(RESULTS / "step_time.json"))["rows"]
    ratios = [row["ratio_median"] for row in rows if row["method"] == method and row["storage"] == storage]
    assert [float(figure) for figure in re.findall(r"\d+\.\d+", said)] == [round(ratio, 2) for ratio in ratios]
    assert said in read(FIGURES)


def test_links_of_the_readme_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#[^)]*)?\)", read(page)):
            path = (page.parent / target).resolve()
            assert path.exists(), f"{page.name}: {target}"


def test_the_readme_is_short_and_says_what_is_predicted():
    text = read(README)
    of_others = re.findall(r"<!-- (?:largest models|peers) -->.*?<!-- end", text, re.S)  # tables that benchmarks write
    assert len(text) - sum(map(len, of_others)) <= 7000 and len(of_others) == 2
    picture = text.index("step_memory.png")
    assert "Predicted" in text[picture - 120 : picture] and "*Predicted" in text[picture : picture + 60]


def test_snippets_parse_on_the_oldest_python():
    for page in PAGES:
        for _, code in blocks(page, "python"):
            ast.parse(code, feature_version=(3, 11))
