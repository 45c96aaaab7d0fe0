"""The two published documents, and signers that need no file."""

import copy

import pytest

from tests.provenance.makers import REGISTRIES, SEEDS, read_seed, signer


@pytest.fixture(scope="session")
def _seeds():
    return {name: read_seed(name) for name in SEEDS}


@pytest.fixture
def bundle(_seeds):
    return copy.deepcopy(_seeds["forge_bundle"])


@pytest.fixture
def state(_seeds):
    return copy.deepcopy(_seeds["chunkft_state"])


@pytest.fixture(scope="session")
def ada():
    return signer("ada", 1)


@pytest.fixture(scope="session")
def bob():
    return signer("bob", 2)


@pytest.fixture
def trusting():
    """The registry, and ada and bob as registries too."""
    return REGISTRIES
