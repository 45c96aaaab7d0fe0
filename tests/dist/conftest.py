"""Worlds of two and of four ranks, each shared by all cases of a session."""

import pytest
import torch.distributed

from tests.dist.world import World

# One case of each kind, so that the default run of all of them stays under a minute; all others are slow.
QUICK = (
    "test_tensor_parallel.py::test_as_on_one_process",
    "test_tp_plan.py::test_llama",
    "test_shards.py::test_bits_are_those_of_one_process",
    "test_shards.py::test_places_of_slices",
    "test_shards.py::test_tokens_and_unequal_shards",
    "test_norms.py::test_global_norm",
    "test_norms.py::test_pools",
    "test_norms.py::test_copies_that_drift",
    "test_votes.py::test_nonfinite_gradient_of_one_rank",
    "test_votes.py::test_rank_that_raises_in_backward",
    "test_votes.py::test_rank_that_dies",
    "test_votes.py::test_what_fold_refuses",
    "test_fsdp.py::test_as_on_one_process",
    "test_fsdp.py::test_models_and_meshes",
    "test_fsdp.py::test_uneven_and_empty_shards",
    "test_fsdp.py::test_refused_before_anything_moves",
    "test_fsdp_tiles.py::test_messages_are_as_large_as_the_formulas_say",
    "test_replicas.py::test_as_on_one_process",
    "test_replicas.py::test_refusals",
    "test_pipeline.py::test_as_on_one_process[ScheduleInterleaved1F1B]",
    "test_pipeline.py::test_refusals",
    "test_vocabulary_head.py::test_refusals",
    "test_vocabulary_head.py::test_training[tp",
    "test_states.py::test_checkpoints_of_two_ranks",
    "test_states.py::test_refusals",
    "test_working_set.py::test_goes_on_from_a_distributed_checkpoint",
    "test_train.py::test_one_run[fsdp]",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/dist/" not in item.nodeid:
            continue
        item.add_marker(pytest.mark.dist)
        spreads = {"two", "four", "world"} & set(item.fixturenames) or "test_rank_that_dies" in item.nodeid
        name = item.nodeid.rpartition("/")[2]
        whole = name.partition("[")[0]  # without parameters
        if spreads and not any(whole == quick or ("[" in quick and name.startswith(quick)) for quick in QUICK):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def two():
    yield from _world(2)


@pytest.fixture(scope="session")
def four():
    yield from _world(4)


def _world(size):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    world = World(size)
    yield world
    world.stop()
