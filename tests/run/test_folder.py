"""The folder of a run."""

import pytest

from vlm_jax.errors import UserError
from vlm_jax.run.folder import locked


def test_what_fails_at_once_leaves_no_empty_folder(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        raise KeyError
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    with locked(tmp_path / "kept"):
        (tmp_path / "kept" / "results.json").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "mine"]


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_a_place_that_cannot_be_a_folder_is_named(name, tmp_path):
    (tmp_path / "file").touch()
    mistake = pytest.raises(UserError, match=rf"/{name} cannot be written \(.+\); give another folder")
    with mistake, locked(tmp_path / name):
        pass
