"""`import gradfold` is cheap, and its names are what they would be if it were not."""

import subprocess
import sys


def test_torch_loads_with_the_first_name_and_fold_stays_a_function():
    code = """
import sys
import gradfold
assert "torch" not in sys.modules
assert set(gradfold.__all__) <= set(dir(gradfold))
from gradfold import Fold, fold, plan
assert callable(fold) and fold is gradfold.fold and gradfold.Fold is Fold
assert callable(plan) and plan is gradfold.plan and "torch" in sys.modules
import gradfold._fold, gradfold.planner.bytes  # no module has the name of a function
assert gradfold.fold is fold and gradfold.plan is plan
from gradfold import *
assert fold is gradfold.fold and AdamW is gradfold.AdamW
assert gradfold.optim.AdamW is AdamW
for name in gradfold.planner.__all__:
    getattr(gradfold.planner, name)
assert gradfold.planner.plan is gradfold.plan
assert not {"transformers", "matplotlib", "datasets"} & set(sys.modules)
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
