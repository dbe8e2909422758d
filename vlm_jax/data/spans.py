"""Mixture of denoisers: span corruption (T5, arXiv:1910.10683) and its UL2 mixture (arXiv:2205.05131), in numpy.

A denoiser turns a text's tokens into inputs and targets that together hold every token once:

    text      A B C D E F G H                   two spans of noise, C D and G H, become sentinels <0>, <1>
    inputs    A B <0> E F <1> EOS               of a sequential denoiser (prefix LM):  A B C D E EOS
    targets   <0> C D <1> G H EOS                                                      F G H EOS

This is t5.data.preprocessors `denoise` with `random_spans_noise_mask`, `noise_span_to_unique_sentinel` for the inputs
and `nonnoise_span_to_unique_sentinel` for the targets. A mask ends with noise, so no sentinel closes the targets (in
the paper's figure 2 one does). Sentinels are the top ids of the model's vocabulary: sentinel k is
`vocab_size - 1 - k`, as in T5, where <extra_id_0> is the last id. The mode tokens are below the sentinels (`mode_ids`).
EOS marks the end of a sequence. Padding, 0, cannot: in CLIP's vocabulary 0 is a token.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax import config
from vlm_jax.errors import UserError

MODES = ("[NLU]", "[S2S]", "[NLG]")  # R, S and X of the paper, section 3.1.2 and appendix
SENTINELS = 100  # of T5


class Denoiser(NamedTuple):
    """A rule that hides part of a text.

    Attributes:
      mean_span: mean length of a span of noise, in tokens; None for a sequential denoiser, whose target is
        the end of the text, of uniform length.
      rate: share of noise tokens, in (0, 1). For a sequential denoiser: the mean share, in (0, 0.5], or 1 for all of
        every text.
      mode: the token before the inputs, of MODES, or None.
    """

    mean_span: float | None
    rate: float
    mode: str | None = None


Mixture = tuple[tuple[Denoiser, float], ...]  # denoisers with their weights

# The seven of UL2 (table 1): R, R, S, X, X, X, X, drawn with equal probability.
UL2: Mixture = (
    (Denoiser(3, 0.15, "[NLU]"), 1),
    (Denoiser(8, 0.15, "[NLU]"), 1),
    (Denoiser(None, 0.25, "[S2S]"), 1),
    (Denoiser(3, 0.5, "[NLG]"), 1),
    (Denoiser(8, 0.5, "[NLG]"), 1),
    (Denoiser(64, 0.15, "[NLG]"), 1),
    (Denoiser(64, 0.5, "[NLG]"), 1),
)
T5 = Denoiser(3, 0.15)
PREFIX = Denoiser(None, 0.5)  # T5's prefix LM: the split is uniform over the text
CAUSAL = Denoiser(None, 1.0)  # a language model: the inputs are EOS alone
MIXTURES: dict[str, Mixture] = {"ul2": UL2, "t5": ((T5, 1),), "prefix": ((PREFIX, 1),), "causal": ((CAUSAL, 1),)}


def mixture(spec: str | Sequence) -> Mixture:
    """Reads a mixture: a name of MIXTURES, or literals `(((3, 0.15, "[NLU]"), weight), ((None, 0.25), weight), ...)`.

    Raises:
      UserError: the name is unknown, or an entry is not a denoiser with a positive weight.
    """
    if isinstance(spec, str):
        return config.choose(MIXTURES, spec, "the mixture of denoisers")
    try:
        read = tuple((Denoiser(*fields), float(weight)) for fields, weight in spec)
        _table(tuple(denoiser for denoiser, _ in read))
        if min(weight for _, weight in read) > 0:
            return read
    except UserError:
        raise
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"a mixture of denoisers is {spec!r}; expected one of {', '.join(MIXTURES)}, or pairs of a denoiser and a "
        'positive weight: (((3, 0.15, "[NLU]"), 1), ((None, 0.25, "[S2S]"), 1))'
    )


def mode_ids(vocab_size: int, sentinels: int = SENTINELS) -> dict[str, int]:
    """Returns the ids of MODES: the three below the sentinels, in descending order."""
    return {mode: vocab_size - sentinels - 1 - i for i, mode in enumerate(MODES)}


class Plan(NamedTuple):
    """The prepared op `denoise`: D denoisers, cumulative weights [D], ids before the inputs, longest texts."""

    denoisers: tuple[Denoiser, ...]
    weights: np.ndarray
    modes: tuple[tuple[int, ...], ...]
    longest: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def plan(
    tokenizer: Any,
    spec: str | tuple,
    inputs_length: int,
    targets_length: int,
    vocab_size: int,
    modes: str | None,
    sentinels: int,
) -> Plan:
    """Prepares the op `denoise` once; see `ops.text.denoise` for the arguments.

    Raises:
      UserError: the tokenizer has no EOS, or its ids overlap those of sentinels and mode tokens.
    """
    if tokenizer.eos_id is None:
        raise UserError(f"tokenizer `{tokenizer.spec}` has no EOS; name one, as in `{tokenizer.spec}?eos_id=1`")
    denoisers, weights = zip(*mixture(spec), strict=True)
    named = [] if modes is None else sorted({d.mode for d in denoisers} - {None})
    extra = len(MODES) if named and modes == "ids" else 0
    needed = tokenizer.vocab_size + sentinels + extra
    if vocab_size < needed:
        raise UserError(
            f"op `denoise`: {sentinels} sentinels and {extra} mode tokens at the top of vocab_size={vocab_size} would "
            f"take ids of tokenizer `{tokenizer.spec}`, which has {tokenizer.vocab_size}; set vocab_size, here and in "
            f"the model, to at least {needed}" + (f", or {needed - extra} with modes='text'" if extra else "")
        )
    ids = mode_ids(vocab_size, sentinels)
    ids = {m: (ids[m],) if modes == "ids" else tuple(tokenizer.encode(m)) for m in named}
    heads = tuple(ids.get(d.mode, ()) for d in denoisers)
    room = dict(inputs_length=inputs_length, targets_length=targets_length, sentinels=sentinels)
    lengths = tuple(longest(denoiser=d, mode_length=len(h), **room) for d, h in zip(denoisers, heads, strict=True))
    return Plan(denoisers, np.cumsum(weights), heads, lengths)


@functools.lru_cache(maxsize=64)
def _table(denoisers: tuple[Denoiser, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean span, rate: float32 [D]; sequential: bool [D]), checked."""
    for mean_span, rate, mode in denoisers:
        if mean_span is None and not (0 < rate <= 0.5 or rate == 1):
            raise UserError(f"a sequential denoiser has rate {rate}; expected (0, 0.5], or 1 for all of the text")
        if mean_span is not None and not (0 < rate < 1 and mean_span >= 1):
            raise UserError(f"a denoiser has mean span {mean_span}, rate {rate}; expected >= 1 and a rate in (0, 1)")
        if mode is not None and mode not in MODES:
            raise UserError(f"a denoiser has mode {mode!r}; expected None or one of: {', '.join(MODES)}")
    mean_spans = np.array([1 if d.mean_span is None else d.mean_span for d in denoisers], np.float32)
    rates = np.array([d.rate for d in denoisers], np.float32)
    return mean_spans, rates, np.array([d.mean_span is None for d in denoisers])


def _noise(n: np.ndarray, mean_span: np.ndarray, rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of noise tokens and noise spans in texts of n tokens, int [B] each.

    Rounded as in T5, in fp32 and half to even: 190 tokens at a rate of 0.15 have 29 of noise, since 28.5 is 28.500002.
    A text of 1 token has an empty span. There are never more spans than tokens between them (T5 fails there).
    """
    noise = _clip(np.rint(np.float32(n) * rate), n - 1)
    spans = _clip(np.rint(np.float32(noise) / mean_span), n - noise)
    return noise * (n > 1), spans


def _clip(x: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Clips to whole numbers from 1 to max(1, `high`)."""
    return np.maximum(np.minimum(x, high), 1).astype(int)


def _longest_target(n: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """Longest targets of sequential denoisers, int [B]; lengths are uniform from 1, so `rate * n` on average."""
    return np.where(rate == 1, n, _clip(np.rint(2 * rate * np.float32(n)) - 1, n - 1))


@functools.lru_cache(maxsize=256)
def longest(
    inputs_length: int, targets_length: int, denoiser: Denoiser, *, mode_length: int = 0, sentinels: int = SENTINELS
) -> int:
    """Returns the largest length of a text whose inputs and targets always fit, with EOS.

    `longest(512, 114, T5)` is 568, as in t5.data's `random_spans_helper`.

    Args:
      inputs_length, targets_length: the available lengths.
      denoiser: the denoiser.
      mode_length: tokens before the inputs.
      sentinels: their number.

    Raises:
      UserError: there is no room for a text of one token.
    """
    mean_span, rate, sequential = _table((denoiser,))
    n = np.arange(1, inputs_length + targets_length + 1)
    if sequential[0]:
        marks, seen, hidden = 0, n - (n if denoiser.rate == 1 else 1), _longest_target(n, rate)
    else:
        noise, marks = _noise(n, mean_span, rate)
        seen, hidden = n - noise + marks * (n > 1), noise + marks
    fits = (seen + mode_length + 1 <= inputs_length) & (hidden + 1 <= targets_length) & (marks <= sentinels)
    if not fits[0]:
        raise UserError(
            f"inputs of length {inputs_length}, targets of length {targets_length} and {sentinels} sentinels have no "
            f"room for one token under {denoiser} and {mode_length} mode tokens; expected at least "
            f"{seen[0] + mode_length + 1}, {hidden[0] + 1} and {int(not sequential[0])}"
        )
    return int(np.sum(fits))  # lengths never shrink as a text grows, so the shortest texts fit


def before(counts: np.ndarray) -> np.ndarray:
    """Returns for each count the sum of the counts before."""
    return counts.cumsum() - counts


def _partition(
    noise: np.ndarray, seen: np.ndarray, spans: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws lengths of the runs of noise and of seen text, int [sum(spans)] each.

    For every b, noise[b] tokens are partitioned into spans[b] non-empty runs, and seen[b] tokens likewise. All
    partitions are equally likely. The first token starts a run, and so do the spans[b] - 1 other tokens with the
    smallest random keys. A tie gives too many runs; all keys are then drawn again, which keeps the draw uniform.
    """
    noise_runs, seen_runs = noise.repeat(spans), seen.repeat(spans)
    several = spans > 1
    if not several.any():
        return noise_runs, seen_runs
    a, n, parts = noise[several], (noise + seen)[several], spans[several]
    rows, at = np.arange(len(n)), np.arange(n.max())
    is_seen = at >= a[:, None]  # [., width]; in each row noise tokens come before seen tokens
    region = is_seen.astype(np.uint32) << np.uint32(31)
    while True:
        keys = rng.integers(0, 2**64, (len(n), -(-len(at) // 2)), np.uint64).view(np.uint32)[:, : len(at)]
        keys = keys >> np.uint32(1) | region
        keys[:, 0], keys[rows, a] = 0, 1 << 31
        if (n < len(at)).any():
            keys[at >= n[:, None]] = 2**32 - 1
        in_order = np.sort(keys, axis=1)
        last = in_order[rows, parts - 1][:, None], in_order[rows, a + parts - 1][:, None]
        starts = np.flatnonzero((keys <= last[0]) | ((keys <= last[1]) & is_seen))
        if len(starts) == 2 * parts.sum():
            break
    of_seen = is_seen.reshape(-1)[starts]
    starts -= (rows * len(at) - before(n)).repeat(2 * parts)  # without the padding of the rows
    runs, several = np.diff(starts, append=n.sum()), several.repeat(spans)
    noise_runs[several], seen_runs[several] = runs[~of_seen], runs[of_seen]
    return noise_runs, seen_runs


def corrupt_batch(
    token_ids: np.ndarray,
    lengths: np.ndarray,
    which: np.ndarray,
    denoisers: Sequence[Denoiser],
    rng: np.random.Generator,
    *,
    vocab_size: int,
    eos_id: int,
    inputs_length: int,
    targets_length: int,
    modes: Sequence[Sequence[int]] | None = None,
    sentinels: int = SENTINELS,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts a batch of texts, each by its own denoiser.

    All masks that a denoiser allows are equally likely. T5's masks begin with text and end with noise. So a text
    with a single span of noise (a caption under long spans) always loses the same tokens, at the end.

    Args:
      token_ids: integers [B, L], without BOS and EOS; entries after a text's length are ignored.
      lengths: integers [B], at least 1.
      which: integers [B], the denoiser of each text.
      denoisers: D of them.
      rng: draws the masks; equal lengths, denoisers and generator states give equal masks.
      vocab_size: the model's; sentinel k is vocab_size - 1 - k.
      eos_id: ends inputs and targets.
      inputs_length, targets_length: lengths after padding with 0.
      modes: D sequences of ids that stand before the inputs; None for nothing.
      sentinels: their number in the vocabulary.

    Returns:
      (inputs, targets): int32 [B, inputs_length] and [B, targets_length]. A denoiser of spans hides nothing of a
      text of 1 token (T5): the targets are a sentinel and EOS.

    Raises:
      UserError: a text is empty, does not fit (see `longest`; nothing is cut here), or has reserved ids.
    """
    n, which, (batch, width) = np.asarray(lengths), np.asarray(which), np.shape(token_ids)
    if n.shape != (batch,) or n.min() < 1 or n.max() > width:
        raise UserError(
            f"texts to corrupt are [{batch}, {width}] and have {n.size} lengths from {n.min()} to "
            f"{n.max()}; expected one for each text, from 1 to {width}: drop empty texts"
        )
    mean_spans, rates, sequential = (column[which] for column in _table(tuple(denoisers)))
    noise, spans = _noise(n, mean_spans, rates)
    if sequential.any():
        target = rng.integers(1, _longest_target(n, rates) + 1)
        noise = np.where(sequential, np.where(rates == 1, n, target), noise)
        spans = np.where(sequential, 1, spans)
    marks = np.where(sequential, 0, spans)  # sentinels of the targets; inputs with noise have as many

    modes = [()] * len(denoisers) if modes is None else modes
    start = np.array([len(mode) for mode in modes])[which]
    seen, hidden = n - noise + np.where(n > 1, marks, 0), noise + marks
    over = (start + seen + 1 > inputs_length) | (hidden + 1 > targets_length) | (marks > sentinels)
    if over.any():
        b = int(over.argmax())
        denoiser, room = denoisers[which[b]], dict(mode_length=int(start[b]), sentinels=sentinels)
        raise UserError(
            f"a text of {n[b]} tokens under {denoiser} needs inputs of {start[b] + seen[b] + 1}, targets of "
            f"{hidden[b] + 1} and {marks[b]} sentinels; there are {inputs_length}, {targets_length} and {sentinels}: "
            f"first cut the text to `longest(...)` = {longest(inputs_length, targets_length, denoiser, **room)} tokens"
        )
    text = np.asarray(token_ids, np.int32)
    text = text.reshape(-1) if (n == width).all() else text[np.arange(width) < n[:, None]]  # one text after the other
    if text.min() < 0 or text.max() >= vocab_size - sentinels or (text == eos_id).any():
        raise UserError(
            f"the texts to corrupt have ids from {text.min()} to {text.max()}; expected 0 to "
            f"{vocab_size - sentinels - 1}, below the {sentinels} sentinels, without EOS ({eos_id}): tokenize without "
            "EOS, or raise vocab_size"
        )

    # Inputs and targets are parts of one array. Each run of tokens, seen or noise, moves as a whole.
    out = np.zeros(len(n) * (inputs_length + targets_length), np.int32)
    row_of_inputs = np.arange(len(n)) * inputs_length
    row_of_targets = len(n) * inputs_length + np.arange(len(n)) * targets_length
    noise_runs, seen_runs = _partition(noise, n - noise, spans, rng)
    number = np.arange(len(noise_runs)) - before(spans).repeat(spans)  # of the span in its text
    is_marked = (marks > 0).repeat(spans)
    to_inputs = (row_of_inputs + start - before(n - noise)).repeat(spans) + before(seen_runs) + is_marked * number
    to_targets = (row_of_targets - before(noise)).repeat(spans) + before(noise_runs) + is_marked * (number + 1)
    runs, to = np.stack([seen_runs, noise_runs], 1).reshape(-1), np.stack([to_inputs, to_targets], 1).reshape(-1)
    out[np.arange(len(text)) + (to - before(runs)).repeat(runs)] = text
    sentinel = vocab_size - 1 - number[is_marked]
    out[(to_inputs + seen_runs)[is_marked]] = sentinel
    out[to_targets[is_marked] - 1] = sentinel
    out[row_of_inputs + start + seen] = eos_id  # over the sentinel of an empty span, in a text of 1 token
    out[row_of_targets + hidden] = eos_id
    for i, mode in enumerate(modes):
        for position, token in enumerate(mode):
            out[row_of_inputs[which == i] + position] = token
    ends = len(n) * inputs_length
    return out[:ends].reshape(-1, inputs_length), out[ends:].reshape(-1, targets_length)


def corrupt(
    token_ids: Sequence[int],
    denoiser: Denoiser,
    rng: np.random.Generator,
    *,
    mode: Sequence[int] = (),
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts one text; see `corrupt_batch`.

    Args:
      token_ids: integers [n], n >= 1.
      denoiser: the denoiser.
      rng: draws the spans.
      mode: ids before the inputs.
      **options: vocab_size, eos_id, inputs_length, targets_length, sentinels.

    Returns:
      (inputs, targets): int32 [inputs_length] and [targets_length].
    """
    ids = np.asarray(token_ids, np.int32)
    which = np.zeros(1, int)
    inputs, targets = corrupt_batch(ids[None], np.array([len(ids)]), which, (denoiser,), rng, modes=(mode,), **options)
    return inputs[0], targets[0]


def ends(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Returns the lengths [...] of sequences [..., L], up to and including the first EOS."""
    is_eos = ids == eos_id
    if not is_eos.any(-1).all():
        raise UserError(f"a sequence has no EOS, id {eos_id}, at its end; pass the eos_id of its tokenizer")
    return is_eos.argmax(-1) + 1


def restore(
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    vocab_size: int,
    eos_id: int,
    mode: Sequence[int] = (),
    sentinels: int = SENTINELS,
) -> np.ndarray:
    """Returns the text, int32 [n], of inputs [inputs_length] and targets [targets_length]: inverts `corrupt`."""
    seen = inputs[len(mode) : ends(inputs, eos_id) - 1].tolist()
    hidden = targets[: ends(targets, eos_id) - 1].tolist()
    spans = {None: []}
    span = spans[None]  # tokens before any sentinel: the target of a sequential denoiser
    for token in hidden:
        if token >= vocab_size - sentinels:
            span = spans[token] = []
        else:
            span.append(token)
    text = [token for place in seen for token in spans.get(place, (place,))]
    return np.array(text + spans[None], np.int32)
