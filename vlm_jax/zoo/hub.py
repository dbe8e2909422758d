"""Checkpoint locations: paths, `hf:org/name` of the Hugging Face hub, `pkg:name/path` of an installed Python package.

huggingface_hub reads the hub, with its cache, offline switch and token.
"""

import os
from pathlib import Path

from vlm_jax.data.package_files import locate
from vlm_jax.errors import UserError

WANTED = ("*.json", "*.safetensors", "*.model", "vocab.txt", "merges.txt", "README.md")
OTHERWISE = ("*.bin", "*.npz")  # for repositories without safetensors


def local(spec: str | os.PathLike) -> Path:
    """Returns the path of a spec: a path itself, the downloaded "hf:org/name", or a package's path."""
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        raise UserError(f"the model is {spec!r:.60}; expected a path, hf:org/name or pkg:package/path")
    spec = os.fspath(spec)
    return download(spec.removeprefix("hf:")) if spec.startswith("hf:") else locate(spec)


def download(name: str) -> Path:
    """Returns the folder of a repository's snapshot, from the cache if possible.

    Args:
      name: "org/name" or "org/name@revision".

    Raises:
      UserError: huggingface_hub is not installed, or the repository is neither cached nor reachable.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError("hf: needs huggingface_hub; pip install 'vlm_jax[hf]'") from None
    repository, _, revision = name.partition("@")
    get = lambda patterns: Path(
        huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
    )
    try:
        folder = get(WANTED)
        return folder if any(folder.glob("*.safetensors")) else get((*WANTED, *OTHERWISE))
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"hf:{name}: there is no such repository, or it needs a token (`hf auth login`)") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"hf:{name}: the repository has no revision {revision}") from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"hf:{name} is not in the cache and cannot be downloaded; check the name, or go online"
        ) from error
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"hf:{name}: {' '.join(str(error).split())}") from error
