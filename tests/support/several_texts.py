"""Five pictures with up to three texts each, for `lookup.Lookup`, and the loss of two sets in loops."""

import numpy as np

N, K, SIZE, WIDTH = 5, 3, 24, 6
TEXTS = 1 + np.arange(N * K).reshape(N, K, 1)  # text i + 1 is a row of the table; 0 is padding
GIVEN = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0], [1, 0, 0]], bool)
IDS = np.arange(N)
BATCH = {"image": IDS, "token_ids": TEXTS[:, 0], "texts": TEXTS, "texts_mask": GIVEN}
FIRST = {"image": IDS, "token_ids": TEXTS[:, 0], "texts": TEXTS[:, :1]}


def of_sets(logits, own, penalty):
    """The loss of rows and columns, in loops; own, bool: which pairs match."""
    n, m = logits.shape
    if penalty == "sigmoid":
        pairs = [np.logaddexp(0, -logits[i, j] if own[i, j] else logits[i, j]) for i in range(n) for j in range(m)]
        return np.sum(pairs) / m
    total = 0.0
    for scores, matches in ((logits, own), (logits.T, own.T)):
        values = []
        for row, match in zip(scores, matches, strict=True):
            if match.any():
                log_sum = np.log(sum(np.exp(x) for x in row))
                values.append(np.mean([log_sum - row[j] for j in np.flatnonzero(match)]))
        total += np.mean(values) / 2
    return total
