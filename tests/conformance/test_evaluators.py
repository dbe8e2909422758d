"""What every evaluator has to do: it enters by being declared. It runs on the first model that can be asked."""

import functools
import inspect

import numpy as np
import pytest

from configs import cappa, clip, openvision2, ul2
from tests.support.models import untrained
from vlm_jax import catalogue, evaluators
from vlm_jax.errors import UserError

EVALUATORS = catalogue.of("evaluators")
CONCEPTS = {0: "grinning face", 570: "monkey", 571: "gorilla", 575: "dog"}
TEXTS = dict(ul2.get_config("smoke").evals.unseen_concepts)
GIVEN = dict(  # the slices hold all pictures of the four classes
    uri="tfds:emoji", split="unseen_style[:600]", train_split="train[:2000]",
    label="concept", classes=CONCEPTS, captions="name/en", caption="name/en",
    where={"concept": list(CONCEPTS)}, train_where={"concept": list(CONCEPTS)}, shots=2, seeds=1, gallery=2,
    gallery_split="train[:2000]", gallery_where={"concept": list(CONCEPTS)},
    methods=["zero_shot", "tip_adapter"], target="monkey",
    other="pkg:vlm_jax/zoo/clip_tiny", close=-1.0, far=-1.0, other_where={"concept": [600, 601, 602]},
    ops=TEXTS["ops"], denoisers=TEXTS["denoisers"],
)  # fmt: skip
SCENES = dict(uri="scenes:?examples=8", split="train")  # their fields are the defaults
OF_SCENES = {
    "minimal_pairs": {}, "composed_retrieval": {}, "rank_overlap": {}, "questions": {}, "counting": {}, "answers": {},
    "representation": {}, "integration_rate": {},
    "two_alternatives": {"reference": "caption", "text": True, "images": ["image", "minimal_pair/image"]},
    "regions": {"ops": "resize(32) | normalize"}, "grounding": {"ops": "resize(32) | normalize"},
}  # fmt: skip


@functools.cache
def model(recipe):
    return untrained(recipe.get_config("smoke"), opinionated=recipe is cappa)


def section(declaration):
    """The arguments that the evaluator takes; op strings only where it has none of its own."""
    taken = inspect.signature(declaration.load()).parameters
    if declaration.name in OF_SCENES:
        return {"type": declaration.name} | SCENES | OF_SCENES[declaration.name]
    own = {name: value for name, value in GIVEN.items() if name in taken}
    if "ops" in own and taken["ops"].default is not inspect.Parameter.empty:
        del own["ops"]
    return {"type": declaration.name} | own


def evaluate(declaration, batch_size):
    evaluator = evaluators.build(section(declaration) | {"batch_size": batch_size})
    for recipe in (clip, cappa, ul2, openvision2):
        try:
            return evaluator(model(recipe))
        except UserError as error:
            assert "\n" not in str(error)
    pytest.fail(f"{declaration.name} refuses every model")


@pytest.mark.parametrize("declaration", EVALUATORS.values(), ids=EVALUATORS)
def test_numbers_do_not_depend_on_the_batch_size(declaration):
    few, many = (evaluate(declaration, batch_size).metrics for batch_size in (3, 8))
    assert few.keys() == many.keys() and all(isinstance(value, float) for value in few.values())
    for name, value in few.items():
        assert np.isfinite(value), name
        np.testing.assert_allclose(many[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("declaration", EVALUATORS.values(), ids=EVALUATORS)
def test_a_mistyped_key_is_named(declaration):
    with pytest.raises(UserError, match="nonsense") as error:
        evaluators.build(section(declaration) | {"nonsense": 1})
    assert "\n" not in str(error.value)
