"""The model and the pictures that tests of adaptation share."""

import pytest

from tests.support import few_shot


@pytest.fixture(scope="session")
def base():
    return few_shot.clip_like(scan=True)


@pytest.fixture(scope="session")
def pictures():
    return few_shot.pictures()
