"""Worlds of two and of four ranks, each shared by all cases of a session."""

import pytest
import torch.distributed

from tests.dist.world import World


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/dist/" in item.nodeid:
            item.add_marker(pytest.mark.dist)


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
