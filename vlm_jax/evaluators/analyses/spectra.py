"""What tuning did to matrices: how far they moved, and whether directions came that the base model lacks."""

import re
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.evaluators.metrics import effective_rank
from vlm_jax.params.table import check_alike, named_leaves


class Change(NamedTuple):
    """The change of one matrix W_0 [in, out] to W.

    Attributes:
      intruders: number of the k highest singular vectors of W, in the space of outputs, whose cosine with every
        singular vector of W_0 of a value above 0 is below the threshold, up to sign.
      cosines: float64 [k], the highest such cosine of each, the highest singular value first.
      distance: |W - W_0| / |W_0|, Frobenius norms.
      rank: the effective rank of W - W_0, see `metrics.effective_rank`.
    """

    intruders: int
    cosines: np.ndarray
    distance: float
    rank: float


def changes(base: Any, tuned: Any, *, k: int = 10, threshold: float = 0.6) -> dict[str, Change]:
    """Returns the change of every kernel that differs (intruder dimensions: arXiv:2410.21228).

    A layer of a scanned stack has an entry of its own, `blocks/mlp/fc1/kernel[3]`; kernels of more axes are matrices
    [product of the others, last].

    Args:
      base: parameters of a model.
      tuned: of the same model, tuned; low-rank updates merged.
      k: number of singular vectors looked at; the paper's.
      threshold: of the cosine.

    Raises:
      UserError: the trees differ in names or shapes, or k is no positive number.
    """
    if k < 1:
        raise UserError(f"changes: k is {k}; expected 1 or more singular vectors")
    check_alike(base, tuned)
    before = dict(_matrices(base))
    return {
        name: _change(before[name], after, k, threshold)
        for name, after in _matrices(tuned)
        if not np.array_equal(before[name], after)
    }


def _matrices(params):
    for name, leaf in named_leaves(params).items():
        if name.rpartition("/")[2] != "kernel":
            continue
        leaf = np.asarray(leaf, np.float64)
        if not re.search(r"(^|/)blocks/", name):
            yield name, leaf.reshape(-1, leaf.shape[-1])
        else:
            for i, layer in enumerate(leaf):
                yield f"{name}[{i}]", layer.reshape(-1, layer.shape[-1])


def _change(before, after, k, threshold):
    _, size, known = np.linalg.svd(before, full_matrices=False)
    known = known[size > 1e-9 * size[0]]
    found = np.linalg.svd(after, full_matrices=False)[2][:k]
    cosines = np.abs(found @ known.T).max(axis=1, initial=0)
    distance = np.linalg.norm(after - before) / max(np.linalg.norm(before), np.finfo(np.float64).tiny)
    return Change(int(np.sum(cosines < threshold)), cosines, float(distance), effective_rank(after - before))
