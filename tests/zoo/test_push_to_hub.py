"""Uploads to the hub, against a stub of huggingface_hub's API that keeps a repository's files in memory."""

import json
from fnmatch import fnmatch
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

import vlm_jax
from vlm_jax import convert
from vlm_jax.errors import UserError

CLIP = "pkg:vlm_jax/zoo/clip_tiny"


class Api:
    """One repository: its files, whether it is private, the branch and number of its commits."""

    def __init__(self, files=None, status=None):
        self.files, self.status, self.private, self.commits = dict(files or {}), status, None, []

    def __call__(self, library_name):
        return self

    def create_repo(self, repo_id, private, exist_ok):
        if self.status:
            answer = mock.Mock(status_code=self.status, headers={})
            raise errors.HfHubHTTPError(f"{self.status} Forbidden", response=answer)
        self.private = private if self.private is None and exist_ok else self.private

    def file_exists(self, repo_id, filename, revision):
        return filename in self.files

    def upload_folder(self, *, repo_id, folder_path, revision, ignore_patterns, delete_patterns, commit_message):
        kept = {name: data for name, data in self.files.items() if not any(fnmatch(name, p) for p in delete_patterns)}
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        new = {name: data for name, data in files.items() if name not in (ignore_patterns or ())}
        self.files = kept | new
        self.commits.append((repo_id, revision))


@pytest.fixture
def hub(monkeypatch):
    """A function that puts a repository in the place of the hub."""

    def of(**options):
        api = Api(**options)
        monkeypatch.setattr(huggingface_hub, "HfApi", api)
        return api

    return of


def test_what_is_pushed_loads_as_the_same_model(hub, tmp_path):
    old = {"model.safetensors": b"old", "tokenizer.json": b"old", "README.md": b"mine", "notes.txt": b"mine"}
    api, model = hub(files=old), vlm_jax.load(CLIP)
    vlm_jax.push_to_hub(model, "me/clip")
    assert api.private and api.commits == [("me/clip", None)]
    assert api.files["README.md"] == api.files["notes.txt"] == b"mine"
    assert {*api.files} == {"README.md", "notes.txt", "config.json", "params.safetensors"}
    for name, data in api.files.items():
        (tmp_path / name).write_bytes(data)
    again = vlm_jax.load(tmp_path)
    np.testing.assert_array_equal(again.embed_texts(["a cat"]), model.embed_texts(["a cat"]))


def test_convert_writes_there_too(hub):
    api = hub()
    convert.convert(CLIP, "hf:me/clip@half", dtype="bfloat16")
    assert api.commits == [("me/clip", "half")] and b"license" in api.files["README.md"]
    assert json.loads(api.files["config.json"])["model"]["image"]["pool"] == "concat"


def test_what_cannot_be_pushed_says_so(hub):
    model = vlm_jax.load(CLIP)
    for name, status, expected in (
        ("me/clip/x", None, "hf:me/clip/x: Repo id must be"),
        ("me/clip", 403, r"403 Forbidden, or it needs a token that may write \(`hf auth login`\)"),
    ):
        api = hub(status=status)
        with pytest.raises(UserError, match=expected):
            vlm_jax.push_to_hub(model, name)
        assert not api.commits
    lost = type("ConnectError", (Exception,), {"__module__": "httpx2"})
    with mock.patch.object(Api, "create_repo", side_effect=lost("no route to host")):
        hub()
        with pytest.raises(UserError, match=r"hf:me/clip: no route to host$"):
            vlm_jax.push_to_hub(model, "me/clip")
    api = hub()
    with pytest.raises(UserError, match="it can be written as native, stablehlo"):
        vlm_jax.push_to_hub(model, "me/clip", "hf")
    assert not api.commits
