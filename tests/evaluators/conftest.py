"""Untrained models of the configs' smallest size, shared by the evaluators' tests."""

import pytest

from configs import cappa, clip
from tests.support.models import untrained


@pytest.fixture(scope="session")
def captioner():
    return untrained(cappa.get_config("smoke"), opinionated=True)


@pytest.fixture(scope="session")
def two_tower():
    return untrained(clip.get_config("smoke"))
