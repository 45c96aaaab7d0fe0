"""Benchmarks as they are run: by path, with their own folder first on Python's path."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_transformers_loads_beside_our_files():
    """benchmarks/kernels.py was once taken for the package `kernels`."""
    code = "import common; from transformers import LlamaConfig, AutoModelForCausalLM; print(LlamaConfig().model_type)"
    found = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert found.stdout.strip() == "llama", found.stderr
