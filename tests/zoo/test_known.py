"""The list of models that load, against the readers; `python -m tests.support.sweep_open_clip` checks open_clip's."""

import subprocess
import sys

import pytest

import vlm_jax
from tests.support.paths import ROOT
from vlm_jax.errors import UserError
from vlm_jax.zoo import known, save
from vlm_jax.zoo.__main__ import table
from vlm_jax.zoo.formats import open_clip_names, t5, transformers
from vlm_jax.zoo.formats.transformers_texts import TEXTS
from vlm_jax.zoo.formats.transformers_vision import VISION


def test_every_family_has_a_test_and_a_format():
    for one in known.MODELS:
        assert (ROOT / one.test).is_file() and len({*one.variants}) == len(one.variants) > 0, one
        assert not one.write or one.write in save.FORMATS, one
    assert known.configs_of_open_clip() == {*open_clip_names.configs()} and len(open_clip_names.configs()) == 115


def test_classes_are_those_of_the_readers():
    listed = {name for one in vlm_jax.list_models("transformers") for name in one.variants}
    assert {*transformers.ARCHITECTURES.values()} <= listed
    types = {*transformers.PAIRS, *VISION, *TEXTS, *t5.MODEL_TYPES} - {*transformers.ARCHITECTURES}
    assert types == {"altclip_text_model", "altclip_vision_model", "t5", "mt5"}


def test_a_part_of_a_name_chooses():
    (eva,) = vlm_jax.list_models("eva02-L")
    assert eva.variants == ("EVA02-L-14", "EVA02-L-14-336")
    assert {one.project for one in vlm_jax.list_models("siglip")} == {"transformers", "open_clip", "big_vision", "timm"}
    assert "    EVA02-L-14-336\n    agree: embeddings" in table([eva], every=True)
    with pytest.raises(UserError, match="no model that loads has `vitamin` in its name"):
        vlm_jax.list_models("vitamin")


@pytest.mark.subprocess
def test_listing_imports_no_jax():
    program = "import sys, vlm_jax; vlm_jax.list_models(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
