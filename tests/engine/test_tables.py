"""Every scene, checkpointed every way: gradients, and steps of every rule, against plain torch."""

import itertools

import pytest
import torch

import gradfold
from tests.pairs import in_turn
from tests.zoo import (
    CHECKPOINTS,
    RULES,
    SCENES,
    TORCH_RULES,
    Net,
    batches,
    distance,
    each_checkpoint,
    each_scene,
    modules_with_weights,
    no_gradients,
    ours,
    recorded,
    scene_run,
    torchs,
    twins,
)

# the whole product is large: all rules on the issue's own table, and every other pair of scene and checkpointing once
CORE = list(itertools.product(["untied", "tied", "bptt", "partial"], ["none", "reentrant", "non_reentrant"]))
# (by default each scene with two or three checkpointings: each gradient of all pairs is compared below)
PAIRS = [
    pytest.param(
        scene, kind, TORCH_RULES[(2 * s + k) % len(TORCH_RULES)], marks=pytest.mark.slow if (s + k) % 4 else ()
    )
    for (s, scene), (k, kind) in itertools.product(enumerate(SCENES), enumerate(CHECKPOINTS))
    if (scene, kind) not in CORE
]


@each_scene
@each_checkpoint
def test_each_gradient_equals_autograds(scene, kind):
    plain, folded = twins(lambda: Net(scene))
    recorder, optimizer = recorded(folded)
    seen = []
    for _, module in modules_with_weights(folded):  # no gradient may exist at any time, so look from inside backward
        module.register_forward_hook(
            lambda module, args, y: (
                y.register_hook(lambda grad: seen.append(no_gradients(folded))) and None if y.requires_grad else None
            )
        )
    for step, ids in enumerate(batches(5 if scene == "bptt_lengths" else 2)):
        plain.zero_grad()
        plain.loss(ids, kind, step).backward()
        recorder.grads.clear()
        folded.loss(ids, kind, step).backward()
        optimizer.step()
        assert no_gradients(folded)
        expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        assert recorder.grads.keys() == expected.keys()
        for name, grad in expected.items():
            assert (recorder.grads[name] - grad).norm() <= 1e-13 * recorder.bounds[name], name
    assert seen and all(seen)


def check_against_torch(scene, kind, rule, steps):
    plain, folded = twins(lambda: Net(scene))
    optimizer = ours(folded, rule)
    gradfold.fold(folded, optimizer)
    scene_run(plain, torchs(plain, rule), kind, steps)
    scene_run(folded, optimizer, kind, steps)
    assert no_gradients(folded)
    assert distance(folded, plain) <= 1e-10


@in_turn(2, where=CORE, rule=TORCH_RULES)
def test_ten_steps_equal_torchs(where, rule):
    check_against_torch(*where, rule, steps=10)


@pytest.mark.parametrize(("scene", "kind", "rule"), PAIRS)
def test_a_few_steps_equal_torchs(scene, kind, rule):
    check_against_torch(scene, kind, rule, steps=5 if scene == "bptt_lengths" else 3)


@in_turn(scene=["untied", "tied", "bptt", "partial"], kind=["none", "reentrant", "non_reentrant"])
def test_lion_folded_equals_lion_unfolded(scene, kind):
    plain, folded = twins(lambda: Net(scene))
    optimizer = ours(folded, "Lion")
    gradfold.fold(folded, optimizer)
    scene_run(plain, ours(plain, "Lion"), kind, steps=2)
    scene_run(folded, optimizer, kind, steps=2)
    assert distance(folded, plain) <= 1e-10


@in_turn(rule=TORCH_RULES, where=[("untied", "none"), ("tied", "reentrant"), ("bptt", "non_reentrant")])
def test_fp32_is_as_near_to_fp64_as_torch_is(rule, where):
    scene, kind = where
    plain, folded = twins(lambda: Net(scene), torch.float32)
    truth, _ = twins(lambda: Net(scene))
    truth.load_state_dict(plain.state_dict())
    optimizer = ours(folded, rule)
    gradfold.fold(folded, optimizer)
    for model, stepper in ((truth, torchs(truth, rule)), (plain, torchs(plain, rule)), (folded, optimizer)):
        scene_run(model, stepper, kind)
    assert distance(folded, truth) <= 2 * distance(plain, truth)


def test_the_tables_are_whole():
    assert len(RULES) == 13 and len(SCENES) == 12 and len(CHECKPOINTS) == 11
