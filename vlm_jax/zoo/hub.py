"""Where checkpoints are: paths, `hf:org/name` of the Hugging Face hub (also to write), `pkg:name/path` of a package.

huggingface_hub reads the hub, with its cache, offline switch and token.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_jax.data.package_files import locate
from vlm_jax.errors import UserError

WANTED = ("*.json", "*.safetensors", "*.model", "vocab.txt", "merges.txt", "README.md")
NAMED = re.compile(r"(open_clip|timm):([\w.-]+):(.+)", re.DOTALL)  # a name in a project, a path
CARD = "README.md"
LIBRARIES = ("huggingface_hub", "httpx", "httpx2", "requests")  # whose errors tell of the hub or the network
# Files of a model, which go from a repository when another model takes its place.
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.npz", "*.model", "*.stablehlo", "vocab.txt", "merges.txt")
OTHERWISE = ("*.bin", "*.npz")  # for repositories without safetensors


def name_of(spec: str | os.PathLike) -> tuple[str, str] | None:
    """Returns ("open_clip", "ViT-B-32") of "open_clip:ViT-B-32:PATH", or None if the spec names no model."""
    found = NAMED.fullmatch(os.fspath(spec)) if isinstance(spec, str | os.PathLike) else None
    return found and (found[1], found[2])


def local(spec: str | os.PathLike) -> Path:
    """Returns the path of a spec: a path itself, the downloaded "hf:org/name", or a package's path; without a name."""
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        raise UserError(f"the model is {spec!r:.60}; expected a path, hf:org/name or pkg:package/path")
    spec = os.fspath(spec)
    if found := re.match("(open_clip|timm):", spec):
        if not name_of(spec):
            example = {"open_clip": "ViT-B-32", "timm": "vit_base_patch16_224"}[found[1]]
            raise UserError(
                f"the model is {spec:.80}; expected {found[0]}NAME:PATH, such as {found[0]}{example}:weights.pt"
            )
        spec = NAMED.fullmatch(spec)[3]
    return download(spec.removeprefix("hf:")) if spec.startswith("hf:") else locate(spec)


def download(name: str) -> Path:
    """Returns the folder of a repository's snapshot, from the cache if possible.

    Args:
      name: "org/name" or "org/name@revision".

    Raises:
      UserError: huggingface_hub is not installed, or the repository is neither cached nor reachable.
    """
    huggingface_hub = _library()
    repository, _, revision = name.partition("@")
    get = lambda patterns: Path(
        huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
    )
    with _telling(name, "or it needs a token"):
        folder = get(WANTED)
        return folder if any(folder.glob("*.safetensors")) else get((*WANTED, *OTHERWISE))


@contextlib.contextmanager
def uploading(name: str, private: bool = True) -> Iterator[Path]:
    """Yields the path of a folder to make, whose files are uploaded at the end, in one commit.

    Files of another model go from the repository; a model card that is there stays.

    Args:
      name: "org/name" or "org/name@branch".
      private: whether a new repository is private.

    Raises:
      UserError: huggingface_hub is not installed, or the repository cannot be written.
    """
    huggingface_hub = _library()
    repository, _, revision = name.partition("@")
    with _telling(name, "or the token has no access"):
        huggingface_hub.utils.validate_repo_id(repository)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        yield folder
        if not folder.is_dir():
            raise UserError(f"hf:{name} takes a folder; choose another format than one of a single file")
        api = huggingface_hub.HfApi(library_name="vlm_jax")
        with _telling(name, "or it needs a token that may write"):
            api.create_repo(repository, private=private, exist_ok=True)
            kept = [CARD] if api.file_exists(repository, CARD, revision=revision or None) else None
            api.upload_folder(
                repo_id=repository, folder_path=folder, revision=revision or None, ignore_patterns=kept,
                delete_patterns=list(MODEL_FILES), commit_message="Upload of a model by vlm_jax",
            )  # fmt: skip


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("hf: needs huggingface_hub; pip install 'vlm_jax[hf]'") from None
    return huggingface_hub


@contextlib.contextmanager
def _telling(name: str, otherwise: str) -> Iterator[None]:
    """Turns the errors of huggingface_hub into a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"hf:{name}: there is no such repository, {otherwise} (`hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"hf:{name}: the repository has no revision {name.partition('@')[2]}") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"hf:{name} is not in the cache and cannot be downloaded; check the name, or go online"
        ) from error
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in LIBRARIES:
            raise
        denied = getattr(getattr(error, "response", None), "status_code", 0) in (401, 403)
        login = f", {otherwise} (`hf auth login`)" if denied else ""
        raise UserError(f"hf:{name}: {' '.join(str(error).split())}{login}") from error
