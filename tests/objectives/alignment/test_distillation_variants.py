"""configs/distillation.py and configs/rs_m_clip.py: each variant builds, its ops give what its objective reads."""

import jax
import pytest

import vlm_jax
from configs import distillation, rs_m_clip
from tests.support.models import initial
from vlm_jax import catalogue, config, evaluators, models, objectives
from vlm_jax.data import emoji, loader, tokenizers
from vlm_jax.errors import UserError

LANGUAGES = sorted(emoji.concept_table()[0]["names"])
VARIANTS = [(distillation, f"{name}-smoke") for name in distillation.METHODS]
VARIANTS += [(rs_m_clip, f"{name}-smoke") for name in ("both", "languages", "english")]


@pytest.mark.parametrize(("recipe", "variant"), VARIANTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_variants_build(recipe, variant):
    settings = config.plain(recipe.get_config(variant))
    model, tokenizer = models.build(settings["model"]), tokenizers.build(settings["tokenizer"])
    objective = objectives.build(settings["objective"], model, tokenizer=tokenizer, load=vlm_jax.load)
    batch = next(loader.train_loader(**settings["data"], batch_size=16, tokenizer=tokenizer))
    params, frozen = initial(model, *objectives.model_inputs(batch, model)), objectives.frozen(objective)

    def make(params, frozen):  # runs all terms
        return objectives.make(objective, model, params, batch, jax.random.key(0), frozen)

    assert jax.eval_shape(make, params, frozen)[0].keys() >= params.keys() and settings["duration"] == "40 steps"
    if recipe is rs_m_clip:
        assert all(f"'name/{language}'" in settings["data"]["ops"] for language in LANGUAGES) == (
            "english" not in variant
        )
        assert len(objective.terms) == 1 + ("languages" not in variant)
    else:
        assert variant.removesuffix("-smoke") in catalogue.of("terms")
    if "probe" in settings["evals"]:
        evaluators.build({key: value for key, value in settings["evals"]["probe"].items() if key != "every"})


def test_what_does_not_exist_is_named():
    with pytest.raises(UserError, match="there is no variant `clap` of this config; expected one of: similarity_dis"):
        distillation.get_config("clap")
    with pytest.raises(UserError, match="there is no variant `huge` of this config"):
        rs_m_clip.get_config("english-huge")
    with pytest.raises(UserError, match="there is no variant `tiny` of this config; expected one of: both, languages"):
        rs_m_clip.get_config("tiny")
