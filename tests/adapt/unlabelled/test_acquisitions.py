"""Strategies against loops: the most uncertain, the farthest, gradients by hand, balance."""

import numpy as np
import pytest
import scipy.special

from tests.support.few_shot import unit_rows
from vlm_jax.adapt import heads
from vlm_jax.adapt.active import Seen
from vlm_jax.adapt.unlabelled import acquisitions
from vlm_jax.errors import UserError

U, C, D = 24, 4, 5
LABELS = np.array([0, 0, 1, 2])


@pytest.fixture
def seen():
    features, text = unit_rows(0, U, D), unit_rows(1, C, D)
    return Seen(features, 6 * features @ text.T, unit_rows(2, 4, D), LABELS, text, 6.0)


def rng():
    return np.random.default_rng(3)


def test_random_and_entropy(seen):
    chosen = acquisitions.random()(seen, 5, rng())
    np.testing.assert_array_equal(chosen, rng().permutation(U)[:5])
    p = scipy.special.softmax(seen.logits, axis=1)
    entropies = [-sum(x * np.log(x) for x in row) for row in p]
    wanted = sorted(range(U), key=lambda i: -entropies[i])[:6]
    assert acquisitions.entropy()(seen, 6, rng()).tolist() == wanted
    certain = seen._replace(logits=np.where(np.arange(C) == 1, 0.0, -np.inf) + np.zeros((U, 1)))  # a class unknown
    assert acquisitions.entropy()(certain, 2, rng()).tolist() == [0, 1]


def test_coreset_by_hand(seen):
    """Each picture is the farthest from the labelled ones and those before it."""
    held, chosen = list(seen.labelled), acquisitions.coreset()(seen, 6, rng())
    for i in chosen:
        far = [min(np.linalg.norm(x - y) for y in held) for x in seen.features]
        assert i == int(np.argmax(far))
        held.append(seen.features[i])


def test_badge_by_hand(seen):
    """The gradients of the loss at the predicted class, outer products; draws by squared distance."""
    gradients = []
    for x, logits in zip(seen.features, seen.logits, strict=True):
        error = scipy.special.softmax(logits)
        error[logits.argmax()] -= 1
        gradients.append(np.outer(error, x).ravel())
    draw, wanted = rng(), [int(np.argmax([np.linalg.norm(g) for g in gradients]))]
    while len(wanted) < 6:
        far = np.array([min(np.sum((g - gradients[j]) ** 2) for j in wanted) for g in gradients])
        left = [i for i in range(U) if i not in wanted]
        wanted.append(int(draw.choice(left, p=far[left] / far.sum())))
    assert acquisitions.badge()(seen, 6, rng()).tolist() == wanted
    alike = seen._replace(features=np.ones((U, D)), logits=np.zeros((U, C)))
    assert len(set(acquisitions.badge()(alike, U, rng()).tolist())) == U


def test_pcb_balances_by_predicted_class(seen):
    """Without candidates of another strategy the classes come out even, as far as pictures predict them."""
    predicted = seen.logits.argmax(1)
    assert np.bincount(predicted, minlength=C).min() >= 2
    chosen = acquisitions.pcb(among=None)(seen, 4, rng())
    assert sorted([*LABELS, *predicted[chosen]]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert predicted[chosen].tolist() == [3, 1, 2, 3]  # the fewest first; of equal ones the first
    never = seen._replace(logits=np.where(np.arange(C) == 3, -9.0, seen.logits))
    others = acquisitions.pcb(among=None)(never, 5, rng())
    assert len(set(others.tolist())) == 5  # any, because no picture has the class that lacks


def test_pcb_chooses_among_candidates(seen):
    entropies = set(acquisitions.entropy()(seen, 12, rng()).tolist())
    assert set(acquisitions.pcb(among="entropy", share=0.5)(seen, 4, rng()).tolist()) < entropies
    few = acquisitions.pcb(among="entropy", share=0.01)(seen, 4, rng())  # as many candidates as labels: their order
    assert set(few.tolist()) == set(acquisitions.entropy()(seen, 4, rng()).tolist())
    with pytest.raises(UserError, match="share of pcb is 0; expected above 0, to 1"):
        acquisitions.pcb(share=0)
    with pytest.raises(UserError, match=r"among of pcb is `entropie`; expected one of: .*did you mean `entropy`"):
        acquisitions.pcb(among="entropie")


def test_epinet_is_the_head_s_uncertainty(seen):
    chosen = acquisitions.epinet(steps=20)(seen, 3, rng())
    seed = int(rng().integers(2**31))
    given = seen.labelled, seen.labels, seen.text, seen.scale
    head = heads.epinet(*given, steps=20, learning_rate=1e-2, seed=seed)
    assert chosen.tolist() == np.argsort(-head.uncertainty(seen.features), kind="stable")[:3].tolist()
