"""Every script in examples/ runs as it is, on a tiny model without a network, and is short."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# what it needs, and what it must have printed
SCRIPTS = {
    "plain_loop": (["transformers"], "gradient norm"),
    "hf_trainer": (["transformers", "accelerate"], "int8"),
    "trl_sft": (["trl", "datasets"], "head lm_head: folded"),
    "trl_dpo": (["trl", "datasets"], "rewards/margins"),
    "accelerate_loop": (["transformers", "accelerate"], "gradient norm"),
    "lightning_module": (["transformers", "lightning"], "grad_norm"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name, tmp_path, monkeypatch, capfd):
    needs, said = SCRIPTS[name]
    for module in needs:
        pytest.importorskip(module, reason=f"examples/{name}.py needs it: pip install {module}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert said in capfd.readouterr().out


def test_they_are_short_and_all_of_them_are_run():
    scripts = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in EXAMPLES.glob("*.py")}
    del scripts["megatron_wgrad"]  # an adapter, which tests/dist/test_megatron.py runs
    assert {name: len(lines) for name, lines in scripts.items() if len(lines) >= 40} == {}
    assert set(scripts) == {*SCRIPTS, "tiny"}
