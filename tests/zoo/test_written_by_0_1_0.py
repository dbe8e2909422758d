"""Files that version 0.1.0 wrote load and compute what they did: a workdir, an export, adapters of every kind."""

import tarfile

import numpy as np
import pytest

import vlm_jax
from tests.support.paths import GOLDEN

NAMES = ("red apple", "green book", "blue fish")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(GOLDEN / "written_by_0.1.0.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def wanted(written):
    return dict(np.load(written / "probabilities.npz"))


@pytest.fixture(scope="module")
def base(written):
    return vlm_jax.load(written / "workdir")


@pytest.mark.parametrize("kind", ["workdir", "native"])
def test_models(written, wanted, kind):
    model = vlm_jax.load(written / kind)
    np.testing.assert_allclose(model.embed_images(wanted["pictures"]), wanted["images"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.embed_texts(NAMES), wanted["texts"], rtol=1e-5, atol=1e-6)


ADAPTERS = [
    "gda",
    "tip_adapter_f",
    "tip_x",
    "cross_modal_probe",
    "prolip",
    "bias",
    "last_1",
    "lora",
    "adapter",
    "prefix",
    "coop",
    "cocoop",
    "vpt_deep",
    "maple",
    "upt",
]


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(written, wanted, base, name):
    model = vlm_jax.load_adapter(written / "adapters" / f"{name}.safetensors", base)
    assert model.classes == NAMES
    np.testing.assert_allclose(model.classify(wanted["pictures"]), wanted[name], rtol=1e-5, atol=1e-6)
