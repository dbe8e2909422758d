"""configs/dino.py and configs/clip_rocket.py: each variant builds, its ops keep what its objective reads."""

import numpy as np
import pytest

import vlm_jax
from configs import clip_rocket, dino
from tests.support.pictures import write_pictures
from vlm_jax import config, models, objectives
from vlm_jax.errors import UserError
from vlm_jax.train import train

ROCKET = [f"{recipe}-{name}-smoke" for recipe in ("basic", "strong") for name in clip_rocket.LOSSES]
VARIANTS = [(dino, f"{name}-smoke") for name in dino.METHODS] + [(clip_rocket, name) for name in ROCKET]


@pytest.mark.parametrize(("recipe", "name"), VARIANTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_variants_build(recipe, name):
    settings = config.plain(recipe.get_config(name))
    objective = objectives.build(settings["objective"], models.build(settings["model"]))
    assert len(objective.terms) == {"dino": 1, "clip_rocket": 2 + name.startswith("strong")}[recipe.__name__[8:]]
    ops = {source["ops"] for source in settings["data"].get("sources", {"": settings["data"]}).values()}
    for options in settings["objective"]["terms"].values():
        views, of = options.get("views", ()), options.get("of", ())
        for key in {*views, *of, *filter(None, [options.get("crops")])} - {"text"}:
            assert all(f"{key!r}" in string.split("keep(")[-1] for string in ops)


@pytest.mark.parametrize(
    ("recipe", "name"), [(dino, "dream-base"), (dino, "huge"), (clip_rocket, "strong-moco"), (clip_rocket, "weak")]
)
def test_what_does_not_exist_is_named(recipe, name):
    with pytest.raises(UserError, match=f"there is no variant `{name}` of"):
        recipe.get_config(name)


def test_an_image_tower_trains_without_texts_and_embeds_pictures(tmp_path):
    """No tokenizer, no text tower; metrics tell of a collapse; a model that reads texts needs a tokenizer."""
    write_pictures(tmp_path, 16)
    whole = "random_resized_crop(16) | normalize"
    tower = dict(width=16, depth=1, heads=2, patch=8, pool="gap")
    ops = f"decode | views('second', 1, {whole}) | {whole} | keep('image', 'second')"
    settings = dict(
        data=dict(uri=f"jsonl:{tmp_path}/data.jsonl", ops=ops),
        model=dict(image=tower, text=None),
        objective=dict(name="vicreg", of=("image", "second"), projector=dict(hidden=8, out=8)),
        optimizer=dict(name="adamw", lr=1e-3),
        preprocess="decode | resize(16) | normalize",
        batch_size=8,
        duration="2 steps",
        log=dict(tensorboard=False, every=1),
    )
    results = train(settings, tmp_path / "run")
    assert results["step"] == 2 and "image_effective_rank" in (tmp_path / "run" / "metrics.jsonl").read_text()
    model = vlm_jax.load(tmp_path / "run")
    embedded = model.embed_images([np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 255, np.uint8)])
    assert embedded.shape == (2, 16) and model.can == ("embed_images",) and model.tokenizer is None
    text = dict(width=16, depth=1, heads=2, vocab_size=9, length=4)
    with pytest.raises(UserError, match="the batch lacks `token_ids`, it has: image, second"):
        train(settings | dict(model=dict(image=tower, text=text)), tmp_path / "other")
