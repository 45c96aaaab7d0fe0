"""`import gradfold` is cheap, and its names are what they would be if it were not."""

import subprocess
import sys


def test_torch_loads_with_the_first_name_and_fold_stays_a_function():
    code = """
import sys
import gradfold
assert "torch" not in sys.modules
assert set(gradfold.__all__) <= set(dir(gradfold))
from gradfold.fold import Fold  # binds a module to the name of a function, if nothing prevents it
assert callable(gradfold.fold) and gradfold.fold.__module__ == "gradfold.fold"
assert gradfold.Fold is Fold and "torch" in sys.modules
from gradfold import *
assert fold is gradfold.fold and AdamW is gradfold.AdamW
assert gradfold.optim.AdamW is AdamW
assert "gradfold.plan.make" not in sys.modules
import gradfold.plan.units as units  # a package, which can be called
assert callable(gradfold.plan) and gradfold.plan.units is units
try:
    gradfold.plan(3)
except gradfold.PlanError as error:
    assert "model=3" in str(error)
else:
    raise AssertionError
try:
    gradfold.nothing
except AttributeError as error:
    assert "'gradfold' has no attribute 'nothing'" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
