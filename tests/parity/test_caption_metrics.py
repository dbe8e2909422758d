"""Caption metrics against pycocoevalcap, the COCO caption server's program, live."""

import numpy as np
import pytest

from vlm_jax.evaluators.metrics.captions import bleu, cider_d, rouge_l, tokenize

pytest.importorskip("pycocoevalcap", reason="needs pip install pycocoevalcap")

from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS


@pytest.mark.parametrize("seed", range(12))
def test_ours_equal_cocos(seed):
    rng = np.random.default_rng(seed)
    text = lambda: [chr(97 + i) for i in rng.integers(0, 6, rng.integers(1, 10))]
    captions = [text() for _ in range(30)]
    references = [[text() for _ in range(rng.integers(1, 6))] for _ in captions]
    scorer = BleuScorer(n=4)
    for caption, own in zip(captions, references, strict=True):
        scorer += (" ".join(caption), [" ".join(reference) for reference in own])
    expected, _ = scorer.compute_score(option="closest")
    expected = [0.0 if value < 1e-4 else value for value in expected]  # no n-gram is right: ours is 0
    np.testing.assert_allclose(bleu(captions, references), expected, atol=1e-10)
    written = {i: [" ".join(caption)] for i, caption in enumerate(captions)}
    truth = {i: [" ".join(reference) for reference in own] for i, own in enumerate(references)}
    np.testing.assert_allclose(rouge_l(captions, references), Rouge().compute_score(truth, written)[1], atol=1e-12)
    np.testing.assert_allclose(cider_d(captions, references), Cider().compute_score(truth, written)[1], atol=1e-12)


def test_their_punctuation_is_no_token():
    signs = [sign for sign in PUNCTUATIONS if not sign[1:2].isalpha()]  # not -LRB-, which stands for a bracket
    assert tokenize(" ".join(["a", *signs, "(", ")", "{", "}", "b"])) == ["a", "b"]
