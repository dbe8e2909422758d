"""Metrics of captions against references, as in the COCO caption server (arXiv:1504.00325, section 3).

All metrics compare tokens (see `caption_tokens.tokenize`): `captions` are N lists of tokens; `references` are N lists
of at least one list of tokens. METEOR and SPICE are left out: they need WordNet and a Java program.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.evaluators.metrics.caption_tokens import tokenize

__all__ = ["bleu", "cider_d", "exact_match", "rouge_l", "tokenize"]

Tokens = Sequence[str]


def bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], n: int = 4) -> list[float]:
    """BLEU-1 to BLEU-n of all captions together, in [0, 1] (Papineni et al. 2002, section 2.3).

    BLEU-k = min(1, exp(1 - r / c)) * (p_1 ... p_k)^(1/k). p_j is the precision of j-grams, each counted at most as
    often as in the reference that contains it most often. c is the number of tokens of the captions; r sums, over
    captions, the length of the reference closest in length (the shorter of two). BLEU-k is 0 if no k-gram is right
    (COCO's program adds 1e-15 to the count, which gives up to 1e-4). A caption of less than k tokens has no k-grams.
    """
    _check(captions, references)
    right, there, length, closest = np.zeros(n), np.zeros(n), 0, 0
    for caption, own in zip(captions, references, strict=True):
        length += len(caption)
        closest += min((abs(len(reference) - len(caption)), len(reference)) for reference in own)[1]
        for k in range(1, n + 1):
            counts, most = _ngrams(caption, k), collections.Counter()
            for reference in own:
                most |= _ngrams(reference, k)
            right[k - 1] += (counts & most).total()
            there[k - 1] += counts.total()
    precision = right / np.maximum(there, 1)
    penalty = math.exp(min(0.0, 1 - closest / length)) if length else 0.0
    return [penalty * float(precision[:k].prod() ** (1 / k)) for k in range(1, n + 1)]


def rouge_l(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], beta: float = 1.2) -> np.ndarray:
    """ROUGE-L of each caption, float64 [N] in [0, 1] (Lin 2004, section 3.1): (1 + b^2) P R / (R + b^2 P).

    P and R are the shares of the longest common subsequence in the caption's and in a reference's tokens. As in COCO's
    program, P and R are each the best over the references.
    """
    _check(captions, references)
    scores = np.zeros(len(captions))
    for i, (caption, own) in enumerate(zip(captions, references, strict=True)):
        common = [_longest_common(caption, reference) for reference in own]
        precision = max(common) / max(len(caption), 1)
        recall = max(c / max(len(reference), 1) for c, reference in zip(common, own, strict=True))
        if precision and recall:
            scores[i] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return scores


def cider_d(
    captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], n: int = 4, sigma: float = 6.0
) -> np.ndarray:
    """CIDEr-D of each caption, float64 [N] in [0, 10] (Vedantam et al. 2015, arXiv:1411.5726).

    10 * mean of exp(-(difference in length)^2 / 2 sigma^2) * cosine(clipped counts), over references and over
    1..n-grams. Counts are weighted by log(N / number of pictures with the n-gram in their references); the caption's
    counts are clipped to the reference's. As in COCO's program, absolute counts are clipped, not shares. A caption of
    m < n tokens reaches at most 10 m / n. An n-gram in every picture's references (N = 1: all) has weight 0.
    """
    _check(captions, references)
    scores = np.zeros(len(captions))
    for k in range(1, n + 1):
        of_references = [[_ngrams(reference, k) for reference in own] for own in references]
        pictures = collections.Counter(ngram for own in of_references for ngram in set().union(*own))
        weight = lambda ngram, pictures=pictures: math.log(len(captions) / max(pictures[ngram], 1))
        vector = lambda counts, weight=weight: {ngram: count * weight(ngram) for ngram, count in counts.items()}
        norm = lambda v: math.sqrt(sum(x * x for x in v.values()))
        for i, caption in enumerate(captions):
            own = vector(_ngrams(caption, k))
            for reference, counts in zip(references[i], of_references[i], strict=True):
                other = vector(counts)
                if product := norm(own) * norm(other):
                    cosine = sum(min(x, other.get(ngram, 0.0)) * other.get(ngram, 0.0) for ngram, x in own.items())
                    apart = len(caption) - len(reference)
                    scores[i] += cosine / product * math.exp(-(apart**2) / (2 * sigma**2)) / len(references[i])
    return 10 * scores / n


def exact_match(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """Whether each caption's tokens equal a reference's tokens, bool [N]."""
    _check(captions, references)
    pairs = zip(captions, references, strict=True)
    return np.array([any(list(caption) == list(reference) for reference in own) for caption, own in pairs], bool)


def _ngrams(tokens: Tokens, k: int) -> collections.Counter:
    return collections.Counter(tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1))


def _longest_common(a: Tokens, b: Tokens) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        row, above = [0], row
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def _check(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> None:
    if not captions or len(captions) != len(references):
        raise UserError(
            f"got {len(captions)} captions and references for {len(references)}; expected equal numbers, at least one"
        )
    for i, (caption, own) in enumerate(zip(captions, references, strict=True)):
        if isinstance(caption, str) or not own or any(isinstance(reference, str) for reference in own):
            raise UserError(
                f"caption {i} or its references are not lists of tokens, or it has no reference; use `tokenize`"
            )
