"""How near captions are to their references, as the COCO caption server counts it (arXiv:1504.00325, section 3).

All is counted over tokens (see `tokenize`): `captions` are N of them, `references` N lists of at least one. METEOR and
SPICE are left out: they need WordNet and a Java program.
"""

import collections
import math
import re
from collections.abc import Sequence

import numpy as np

from vlm_jax.errors import UserError

Tokens = Sequence[str]

_END = r"'(?:s|m|d|re|ve|ll)\b"
_TOKEN = re.compile(rf"n't\b|{_END}|\d+(?:[.,:]\d+)+|\w+?(?=n't\b)|\w+(?:-\w+|(?!{_END})'\w+)*|[^\w\s]")
_REMOVED = set("\"'`.?!,:-;()[]{}…–—“”‘")


def tokenize(text: str) -> list[str]:
    """Lower-case words, numbers and signs, as the Penn Treebank splits them ("man's" -> "man", "'s"; "don't" -> "do",
    "n't"; hyphens stay), without the punctuation that COCO's evaluation removes, and without brackets.

    Equal to the Stanford tokenizer with COCO's list but for brackets ("-lrb-" there), the points of abbreviations,
    slashes between words, and "gonna" and its like.
    """
    return [token for token in _TOKEN.findall(text.lower().replace("’", "'")) if token not in _REMOVED]


def bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]], n: int = 4) -> list[float]:
    """BLEU-1 to BLEU-n of all captions together, in [0, 1] (Papineni et al. 2002, section 2.3).

    The geometric mean of the precisions of 1..k-grams, each n-gram counted at most as often as in the reference that
    has the most of it, times exp(1 - r / c) where the captions' tokens c are fewer than r, the sum of the lengths of
    the references that are closest to their captions in length (the shorter of two). 0 where no k-gram is right
    (COCO's program adds 1e-15 to the count, which gives up to 1e-4); captions of less than k tokens have no k-grams.
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

    P and R are the longest common subsequence's share of the caption's and of a reference's tokens, each the best over
    the references, as COCO has it.
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

    The mean over references and over 1..n-grams of the cosine of the n-grams' counts, weighted by log(N / how many
    pictures have it in their references), the caption's clipped to the reference's, times exp(-(difference in
    length)^2 / 2 sigma^2), times 10. As in COCO's program, counts are clipped as they are, not as shares. A caption of
    m < n tokens reaches at most 10 m / n, and an n-gram of every picture's references (N = 1: all) counts nothing.
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
    """Whether each caption has a reference's tokens, all of them in its order, bool [N]."""
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
            f"there are {len(captions)} captions and references for {len(references)}; expected as many, at least one"
        )
    for i, (caption, own) in enumerate(zip(captions, references, strict=True)):
        if isinstance(caption, str) or not own or any(isinstance(reference, str) for reference in own):
            raise UserError(f"caption {i} or its references are no lists of tokens, or there are none; use `tokenize`")
