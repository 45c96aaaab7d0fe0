"""Recipes: what a field may hold, what a file may say, and what the message tells when it may not."""

import dataclasses
import inspect
from pathlib import Path

import pytest

import gradfold
from gradfold._options import OPTIMIZERS, FoldOptions, StorageFields, StorageOptions
from gradfold.planner.settings import Settings
from gradfold.train.errors import RecipeError
from gradfold.train.recipe import DEMO, Recipe
from gradfold.train.recipe_file import differing_fields, dump_recipe, field_types, load_recipe, unflatten
from gradfold.train.recipe_groups import (
    OPTIMIZER_SETTINGS,
    CheckpointRecipe,
    GradientRecipe,
    OptimizerRecipe,
    ScheduleRecipe,
    TextRecipe,
)
from gradfold.train.recipe_working_set import WorkingSetRecipe

EXAMPLES = Path(__file__).parents[2] / "examples"

BAD_FIELDS = [
    (Recipe, {"model": ""}, "model = ''"),
    (Recipe, {"model": 3}, "model = 3: takes text"),
    (Recipe, {"data": ()}, "data = (): name at least one file"),
    (Recipe, {"data": "a.jsonl"}, "data = 'a.jsonl': takes a list of names"),
    (Recipe, {"data": (1,)}, "data = 1: takes text"),
    (Recipe, {"steps": 0}, "steps = 0: give a whole number, 1 or more"),
    (Recipe, {"steps": 2.0}, "steps = 2.0: takes a whole number"),
    (Recipe, {"steps": True}, "steps = True: takes a whole number"),
    (Recipe, {"epochs": 0}, "epochs = 0.0: give a number above 0"),
    (Recipe, {"steps": 3, "epochs": 1}, "steps = 3 and epochs = 1: both say how long"),
    (Recipe, {"batch_size": 0}, "batch_size = 0"),
    (Recipe, {"sequence_length": 1}, "sequence_length = 1"),
    (Recipe, {"dtype": "float16"}, "dtype = 'float16': takes float32, bfloat16, float64; did you mean 'bfloat16'?"),
    (Recipe, {"fold": "yes"}, "fold = 'yes': takes true or false"),
    (Recipe, {"seed": -1}, "seed = -1"),
    (Recipe, {"out": ""}, "out = ''"),
    (Recipe, {"text": {"packing": True}}, "text = {'packing': True}: takes a group of fields"),
    (OptimizerRecipe, {"name": "AdamX"}, "optimizer.name = 'AdamX': takes AdamW, Adam, SGD"),
    (OptimizerRecipe, {"lr": 0}, "optimizer.lr = 0.0: give a number above 0"),
    (OptimizerRecipe, {"lr": float("nan")}, "optimizer.lr = nan: takes a finite number"),
    (OptimizerRecipe, {"weight_decay": -0.1}, "optimizer.weight_decay = -0.1: give 0 or more"),
    (OptimizerRecipe, {"betas": (0.9, 1.0)}, "optimizer.betas = (0.9, 1.0)"),
    (OptimizerRecipe, {"betas": (0.9,)}, "optimizer.betas = (0.9,): takes 2 numbers"),
    (OptimizerRecipe, {"eps": -1.0}, "optimizer.eps = -1.0"),
    (
        OptimizerRecipe,
        {"momentum": 0.9},
        "optimizer.momentum = 0.9: AdamW has no such setting; it has lr, weight_decay, betas",
    ),
    (GradientRecipe, {"accumulate": 0}, "gradient.accumulate = 0: how many backwards one step sums, 1 or more"),
    (GradientRecipe, {"accumulate": 2.0}, "gradient.accumulate = 2.0: takes a whole number"),
    (GradientRecipe, {"clip_norm": 0}, "gradient.clip_norm = 0.0: a number above 0, or None"),
    (GradientRecipe, {"clip_norm": float("inf")}, "gradient.clip_norm = inf: takes a finite number"),
    (GradientRecipe, {"clip_value": -1}, "gradient.clip_value = -1.0: a number above 0, or None"),
    (GradientRecipe, {"clip": "twice"}, "gradient.clip = 'twice': takes exact, two_pass, delayed"),
    (GradientRecipe, {"clip": "two_pass"}, "gradient.clip = 'two_pass' without clip_norm: say how far to clip"),
    (
        GradientRecipe,
        {"clip": "delayed", "clip_norm": 1, "accumulate": 2},
        "gradient.clip = 'delayed' with accumulate=2: the norm of a sum",
    ),
    (GradientRecipe, {"on_nonfinite": "ignore"}, "gradient.on_nonfinite = 'ignore': takes raise, skip"),
    (
        Recipe,
        {"fold": False, "gradient": GradientRecipe(clip="two_pass", clip_norm=1.0)},
        "gradient.clip = 'two_pass' with fold = False: stored gradients",
    ),
    (WorkingSetRecipe, {"chunks": 0}, "working_set.chunks = 0: give a whole number, 1 or more"),
    (WorkingSetRecipe, {"chunks": 2.0}, "working_set.chunks = 2.0: takes a whole number"),
    (WorkingSetRecipe, {"chunks": 4, "interval": 0}, "working_set.interval = 0: give a whole number, 1 or more"),
    (WorkingSetRecipe, {"chunks": 4, "prefetch": 2}, "working_set.prefetch = 2: give 0 or 1"),
    (WorkingSetRecipe, {"chunks": 4, "prefetch": -1}, "working_set.prefetch = -1: give 0 or 1"),
    (WorkingSetRecipe, {"chunks": 4, "by": "rows"}, "working_set.by = 'rows': takes bytes, bands, layer, module"),
    (WorkingSetRecipe, {"chunks": 4, "axis": "up"}, "working_set.axis = 'up': takes out, in"),
    (WorkingSetRecipe, {"chunks": 4, "order": "up"}, "working_set.order = 'up': takes forward, backward, random, imp"),
    (WorkingSetRecipe, {"chunks": 4, "states": "drop"}, "working_set.states = 'drop': takes keep, reset"),
    (WorkingSetRecipe, {"chunks": 4, "offload": "tape"}, "working_set.offload = 'tape': takes cpu, disk"),
    (WorkingSetRecipe, {"chunks": 4, "always": "norm"}, "working_set.always = 'norm': takes a list of names"),
    (
        WorkingSetRecipe,
        {"offload": "disk"},
        "working_set.offload = 'disk': does nothing without working_set.chunks; say how many",
    ),
    (WorkingSetRecipe, {"interval": 8}, "working_set.interval = 8: does nothing without working_set.chunks"),
    (WorkingSetRecipe, {"always": ("norm",)}, "working_set.always = ('norm',): does nothing without"),
    (
        Recipe,
        {"fold": False, "working_set": WorkingSetRecipe(chunks=4)},
        "working_set with fold = False: only a folded model has one",
    ),
    (Recipe, {"fold": False, "working_set": WorkingSetRecipe(by="layer")}, "working_set with fold = False"),
    (ScheduleRecipe, {"warmup": -1}, "schedule.warmup = -1.0"),
    (ScheduleRecipe, {"warmup": 1.5}, "schedule.warmup = 1.5: give a fraction of all steps"),
    (ScheduleRecipe, {"final": 2}, "schedule.final = 2.0"),
    (OptimizerRecipe, {"name": "AdamWScheduleFree"}, "optimizer.name = 'AdamWScheduleFree': a run evaluates"),
    (TextRecipe, {"held_out": 1.0}, "text.held_out = 1.0"),
    (TextRecipe, {"too_long": "crop"}, "text.too_long = 'crop': takes error, truncate, drop"),
    (CheckpointRecipe, {"keep": 0}, "checkpoint.keep = 0: give a whole number, 1 or more"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), BAD_FIELDS)
def test_a_bad_value_is_named(kind, fields, message):
    with pytest.raises(RecipeError) as caught:
        kind(**fields)
    assert message in str(caught.value)


def test_values_take_the_type_of_their_field():
    optimizer = OptimizerRecipe(lr=1, betas=[0, 0.5])
    assert (optimizer.lr, optimizer.betas) == (1.0, (0.0, 0.5))
    assert isinstance(optimizer.lr, float)


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEMO.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", OPTIMIZER_SETTINGS)
def test_the_settings_of_each_optimizer_are_the_ones_it_takes(name):
    taken = set(inspect.signature(getattr(gradfold, name)).parameters) - {"params", "lr", "weight_decay", "storage"}
    if name == "Muon":  # three numbers; and the rate of what AdamW steps, which is its groups'
        taken = taken - {"ns_coefficients"} | {"adamw_lr"}
    taken -= {"eps"} if name == "Adafactor" else set()  # two numbers
    assert set(OPTIMIZER_SETTINGS[name]) == taken
    known = {f.name for f in dataclasses.fields(OptimizerRecipe)}
    assert set(OPTIMIZER_SETTINGS[name]) <= known


BAD_FILES = [
    ("optimzer:\n  lr: 1.0\n", "unknown field optimzer; did you mean 'optimizer'?"),
    ("optimizer:\n  lrr: 1.0\n", "unknown field optimizer.lrr; did you mean 'optimizer.lr'?"),
    ("lr: 1.0\n", "unknown field lr; did you mean 'optimizer.lr'?"),
    ("sequence_lenght: 12\n", "did you mean 'sequence_length'?"),
    ("max_grad_norm: 1.0\n", "unknown field max_grad_norm; did you mean 'gradient.clip_norm'?"),
    ("gradient:\n  clip_nrm: 1.0\n", "did you mean 'gradient.clip_norm'?"),
    ("gradient:\n  clip: delayed\n", "gradient.clip = 'delayed' without clip_norm: say how far to clip"),
    ("working_set:\n  chunk: 4\n", "unknown field working_set.chunk; did you mean 'working_set.chunks'?"),
    ("working_set:\n  order: random\n", "working_set.order = 'random': does nothing without working_set.chunks"),
    ("fold: false\nworking_set:\n  chunks: 4\n", "working_set with fold = False"),
    ("zzzzzz: 12\n", "unknown field zzzzzz"),
    ("steps: ten\n", "steps = 'ten': takes a whole number"),
    ("steps: 1.5\n", "steps = 1.5: takes a whole number"),
    ("optimizer:\n  lr: fast\n", "optimizer.lr = 'fast': takes a number"),
    ("optimizer: AdamW\n", "optimizer: holds str, not `name: value` lines"),
    ("fold: 1\n", "fold = 1: takes true or false"),
    ("- steps\n", "the file: holds list"),
    ("steps: 1\nsteps: 2\n", "line 2: steps is given twice"),
    ("steps: [1\n", "line 2: is not YAML"),
    ("steps: !!python/object:os.system 1\n", "is not YAML"),
    ("data: {a: 1}\n", "data = {'a': 1}: takes a list of names"),
    ("text:\n  held_out: 2\n", "text.held_out = 2.0"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_one_message(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_a_file_may_be_short_and_write_numbers_as_people_do(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: notes.txt\noptimizer:\n  lr: 1e-4\n  betas: [0.9, 0.95]\ntext:\n", encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.data == ("notes.txt",)
    assert recipe.optimizer == OptimizerRecipe(lr=1e-4, betas=(0.9, 0.95))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        DEMO,
        Recipe(
            data=("ü b.txt", "null"),
            epochs=0.1,
            optimizer=OptimizerRecipe(name="SGD", lr=0.1 + 0.2, momentum=0.9, nesterov=True),
            gradient=GradientRecipe(clip_norm=0.3, clip="two_pass", on_nonfinite="skip"),
            working_set=WorkingSetRecipe(chunks=4, order="random", always=("norm", "head"), offload="disk"),
        ),
    ],
)
def test_a_recipe_comes_back_equal_from_its_file(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_the_example_of_the_demo_is_the_demo():
    assert load_recipe(EXAMPLES / "smollm2-pydoc.yaml") == DEMO


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_loads(path):
    load_recipe(path)


def test_each_setting_of_a_working_set_counts_as_a_difference():
    base = unflatten({"working_set.chunks": 4}, Recipe())
    others = {"chunks": 5, "interval": 2, "by": "layer", "axis": "in", "order": "random", "always": ("norm",),
              "states": "reset", "offload": "cpu", "prefetch": 0, "schedule": "step", "rest": "sgd",
              "rest_scale": 0.5}  # fmt: skip
    assert others.keys() == {spec.name for spec in dataclasses.fields(WorkingSetRecipe)}
    for name, value in others.items():
        if name == "rest_scale":  # which does nothing alone
            base = unflatten({"working_set.rest": "sgd"}, base)
        assert list(differing_fields(base, unflatten({f"working_set.{name}": value}, base))) == [f"working_set.{name}"]
    taken = {spec.name: spec.default for spec in dataclasses.fields(gradfold.WorkingSet)}
    assert others.keys() | {"folder", "seed"} == taken.keys()
    assert {spec.name: spec.default for spec in dataclasses.fields(WorkingSetRecipe)}.items() <= taken.items()


def test_options_have_one_default_wherever_they_stand():
    given = inspect.signature(gradfold.fold).parameters
    for kind in (FoldOptions, GradientRecipe, Settings):
        for spec in dataclasses.fields(kind):
            if spec.name in given and spec.name not in ("optimizer", "working_set"):
                assert given[spec.name].default == spec.default, (kind, spec.name)
    storage = {spec.name for spec in dataclasses.fields(StorageFields)}
    assert storage <= StorageOptions.__annotations__.keys()
    assert set(OPTIMIZER_SETTINGS) == set(OPTIMIZERS) - {"AdamWScheduleFree"}  # refused: a run saves what trains


def test_only_what_changes_the_run_counts_as_a_difference():
    harmless = {
        "out": "x",
        "steps": 9,
        "evaluation.interval_steps": 3,
        "checkpoint.interval_steps": 1,
        "checkpoint.keep": 7,
    }
    assert differing_fields(Recipe(), unflatten(harmless, Recipe())) == {}
    for dotted in set(field_types()) - set(harmless) - {"epochs"}:
        changed = _another_value(Recipe(), dotted)
        if changed is not None:
            assert list(differing_fields(Recipe(), changed)) == [dotted]


def _another_value(recipe, dotted):
    for value in (
        "another",
        7,
        0.125,
        ("another",),
        (0.5, 0.5),
        True,
        False,
        "all",
        "drop",
        "skip",
        "linear",
        "Adam",
        "float64",
    ):
        try:
            changed = unflatten({dotted: value}, recipe)
        except RecipeError:
            continue
        if changed != recipe:
            return changed
    return None
