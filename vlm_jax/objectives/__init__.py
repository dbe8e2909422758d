"""Objectives: the losses of a batch, as a weighted sum of terms over row sets.

objective=dict(name="contrastive", penalty="sigmoid")                            # one term
objective=dict(terms=dict(contrastive={}, captioning=dict(weight=2.0)))          # several
objective=dict(terms=..., teachers=dict(average=dict(decay=0.999)), combine="project")
"""

from vlm_jax.objectives.accumulation import value_and_grad
from vlm_jax.objectives.build import build, teachers_of
from vlm_jax.objectives.outputs import OWN, Outputs, of_model
from vlm_jax.objectives.state import active, check_stored, frozen, make, reached, refreshed, update
from vlm_jax.objectives.sum import value
from vlm_jax.objectives.term import Context, Feature, Objective, Row, Selection, Teacher, Term, model_inputs

__all__ = [
    "OWN",
    "Context",
    "Feature",
    "Objective",
    "Outputs",
    "Row",
    "Selection",
    "Teacher",
    "Term",
    "active",
    "build",
    "check_stored",
    "frozen",
    "make",
    "model_inputs",
    "of_model",
    "reached",
    "refreshed",
    "teachers_of",
    "update",
    "value",
    "value_and_grad",
]
