"""Span corruption, the mixture of denoisers, packing, and the op `denoise`."""

import itertools
import math

import numpy as np
import pytest

from vlm_jax.data import ops, packing, spans, tokenizers
from vlm_jax.data.rows import collate
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError

VOCAB, EOS, MODE = 1203, 1, 1000
IDS = dict(vocab_size=VOCAB, eos_id=EOS)
DENOISERS = (*(denoiser for denoiser, _ in spans.UL2), spans.PREFIX, spans.CAUSAL)
OF_SPANS = tuple(d for d, _ in spans.UL2 if d.mean_span is not None)
SAMPLES = 100_000


def texts(count, length, seed=0):
    """Random ids [count, length] without EOS; 0, which also pads, among them."""
    ids = np.random.default_rng(seed).integers(0, 1000, (count, length), dtype=np.int32)
    return np.where(ids == EOS, 2, ids)


def corrupt_many(denoiser, lengths, seed=0, ids=None, room=1300, **options):
    lengths = np.asarray(lengths)
    ids = texts(len(lengths), lengths.max()) if ids is None else ids
    options = dict(IDS, inputs_length=room, targets_length=room) | options
    rng, which = np.random.default_rng(seed), np.zeros(len(lengths), int)
    return spans.corrupt_batch(ids, lengths, which, (denoiser,), rng, **options)


def sizes(n, denoiser):
    """(tokens, spans) of noise of a text of n > 1 tokens; T5's share of n is a product in fp32."""
    noise = min(max(round(float(np.float32(n) * np.float32(denoiser.rate))), 1), n - 1)
    return noise, max(1, round(noise / denoiser.mean_span))


@pytest.mark.parametrize("denoiser", DENOISERS, ids=str)
def test_inputs_and_targets_hold_the_text_at_every_length(denoiser):
    lengths = np.arange(1, 601)
    ids = texts(600, 600)
    inputs, targets = corrupt_many(denoiser, lengths, ids=ids, modes=[(MODE,)])
    for n, text, seen, hidden in zip(lengths, ids, inputs, targets, strict=True):
        np.testing.assert_array_equal(spans.restore(seen, hidden, mode=(MODE,), **IDS), text[:n])
        seen, hidden = (row[: row.tolist().index(EOS)].tolist() for row in (seen, hidden))
        assert seen[0] == MODE
        if denoiser.mean_span is None:
            cut = n - len(hidden)
            assert seen[1:] == text[:cut].tolist() and hidden == text[cut:n].tolist()
            assert cut == 0 if denoiser.rate == 1 else 1 <= len(hidden) <= max(1, round(2 * denoiser.rate * n) - 1)
        elif n == 1:
            assert (seen[1:], hidden) == (text[:1].tolist(), [VOCAB - 1])
        else:
            # With what `restore` says this is the definition: sentinels count down, text and noise take turns.
            noise, count = sizes(n, denoiser)
            marks = [VOCAB - 1 - k for k in range(count)]
            assert [t for t in seen if t > MODE] == marks == [t for t in hidden if t > MODE]
            assert len(seen) == 1 + n - noise + count and len(hidden) == noise + count
            assert seen[1] < MODE and seen[-1] == marks[-1] and hidden[0] == marks[0] and hidden[-1] < MODE
            for tokens in (seen, hidden):
                assert not any(a > MODE and b > MODE for a, b in itertools.pairwise(tokens))


def chi_square(counts, expected):
    return float(np.sum((counts - expected) ** 2 / expected))


def test_all_spans_are_equally_likely():
    """9 tokens, 4 of noise in 2 spans: 3 * 4 masks. Longer texts between them have another number of columns."""
    lengths = np.tile([9, 14], SAMPLES)
    inputs, _ = corrupt_many(spans.Denoiser(2, 0.5), lengths, ids=np.tile(np.arange(2, 16), (2 * SAMPLES, 1)), room=16)
    hidden = np.ones((SAMPLES, 9), int)
    for token in range(2, 11):
        hidden[:, token - 2] = ~np.any(inputs[::2] == token, axis=1)
    masks, counts = np.unique(hidden @ 2 ** np.arange(9), return_counts=True)
    assert len(masks) == 12 and (hidden.sum(1) == 4).all() and not hidden[:, 0].any() and hidden[:, -1].all()
    assert chi_square(counts, SAMPLES / 12) < 52  # 11 degrees of freedom: exceeded once in four million


class TiesFirst:
    """A generator whose first keys are all equal."""

    def __init__(self, rng):
        self.rng, self.calls = rng, 0

    def integers(self, low, high, size, dtype):
        self.calls += 1
        return np.zeros(size, dtype) if self.calls == 1 else self.rng.integers(low, high, size, dtype)


def test_keys_with_ties_are_drawn_again():
    ids, options = texts(1, 40)[0], dict(IDS, inputs_length=50, targets_length=50)
    ties = TiesFirst(np.random.default_rng(0))
    got = spans.corrupt(ids, DENOISERS[3], ties, **options)
    expected = spans.corrupt(ids, DENOISERS[3], np.random.default_rng(0), **options)
    assert ties.calls == 2
    np.testing.assert_array_equal(np.stack(got), np.stack(expected))


@pytest.mark.parametrize("denoiser", OF_SPANS, ids=str)
def test_rate_and_mean_span(denoiser):
    """The share of noise and the mean span are T5's rounding of the nominal ones in every text, without deviation.

    A span's length, of noise tokens in `count` spans, is k with probability
    C(noise-k-1, count-2) / C(noise-1, count-1); its mean is noise / count, and that of 10^5 texts is within 5 standard
    errors for the first span and the last.
    """
    n = 200 if denoiser.mean_span == 64 else 96
    noise, count = sizes(n, denoiser)
    assert abs(noise - denoiser.rate * n) <= 0.5 and (count == 1 or abs(count - noise / denoiser.mean_span) <= 0.5)
    _, targets = corrupt_many(denoiser, np.full(SAMPLES, n), ids=np.full((SAMPLES, n), 5), room=220)
    marks = targets > MODE
    assert (marks.sum(1) == count).all() and ((targets == 5).sum(1) == noise).all()
    places = np.flatnonzero(marks).reshape(SAMPLES, count) % 220
    lengths = np.diff(places, append=noise + count) - 1
    if count == 1:
        return
    k = np.arange(1, noise - count + 2)
    p = np.array([math.comb(noise - i - 1, count - 2) / math.comb(noise - 1, count - 1) for i in k.tolist()])
    deviation = math.sqrt(p @ k**2 - (p @ k) ** 2)
    np.testing.assert_allclose(p @ k, noise / count)
    for span in (0, -1):
        assert abs(lengths[:, span].mean() - noise / count) < 5 * deviation / math.sqrt(SAMPLES)


@pytest.mark.parametrize(("denoiser", "most"), [(DENOISERS[2], 15), (spans.PREFIX, 31)], ids=str)
def test_a_sequential_target_has_uniform_length(denoiser, most):
    """From 1 to `most` of 32 tokens; a quarter of them, a half, on average."""
    _, targets = corrupt_many(denoiser, np.full(SAMPLES, 32), ids=np.full((SAMPLES, 32), 5), room=40)
    lengths, counts = np.unique((targets == 5).sum(1), return_counts=True)
    np.testing.assert_array_equal(lengths, np.arange(1, most + 1))
    assert (1 + most) / 2 == denoiser.rate * 32
    assert chi_square(counts, SAMPLES / most) < most - 1 + 6 * math.sqrt(2 * (most - 1))  # mean + 6 deviations


def test_a_mixed_batch_and_its_randomness():
    lengths, which = np.random.default_rng(0).integers(1, 65, 500), np.random.default_rng(1).integers(0, 9, 500)
    ids, modes = texts(500, 64), [(MODE + i,) * (i % 3) for i in range(9)]
    room = dict(IDS, inputs_length=70, targets_length=70)
    run = lambda seed: spans.corrupt_batch(
        ids, lengths, which, DENOISERS, np.random.default_rng(seed), modes=modes, **room
    )
    (inputs, targets), again, other = run(0), run(0), run(1)
    np.testing.assert_array_equal(np.stack([inputs, targets]), np.stack(again))
    assert inputs.dtype == targets.dtype == np.int32
    assert (inputs != other[0]).any(1)[(which == 3) & (lengths > 24)].all()  # 4 spans and more, 165 masks
    for n, i, text, seen, hidden in zip(lengths, which, ids, inputs, targets, strict=True):
        np.testing.assert_array_equal(seen[: i % 3], modes[i])
        np.testing.assert_array_equal(spans.restore(seen, hidden, mode=modes[i], **IDS), text[:n])
    for denoiser in DENOISERS:
        one = spans.corrupt(ids[0], denoiser, np.random.default_rng(3), mode=(MODE,), **room)
        many = corrupt_many(denoiser, [64], 3, ids[:1], 70, modes=[(MODE,)])
        np.testing.assert_array_equal(np.stack(one), np.concatenate(many))


@pytest.mark.parametrize("denoiser", DENOISERS, ids=str)
def test_longest_is_what_fits_without_padding(denoiser):
    for room in ((3, 3), (4, 9), (32, 32), (64, 20), (600, 600), (700, 250), (150, 400)):
        n = spans.longest(*room, denoiser, mode_length=1)
        room = dict(zip(("inputs_length", "targets_length"), room, strict=True))
        corrupt_many(denoiser, np.full(200, n), **room, modes=[(MODE,)])
        with pytest.raises(UserError, match=rf"a text of {n + 1} tokens under .* = {n} tokens"):
            corrupt_many(denoiser, np.full(2000, n + 1), ids=np.full((2000, n + 1), 5), **room, modes=[(MODE,)])
    if denoiser.mean_span is not None:
        noise, count = sizes(n, denoiser)
        exact = dict(inputs_length=n - noise + count + 1, targets_length=noise + count + 1)
        inputs, targets = corrupt_many(denoiser, [n], **exact)
        assert inputs[0, -1] == targets[0, -1] == EOS and (inputs[0, :-1] != EOS).all()


def test_longest_is_t5s():
    """568 and 114: Transformers' and t5's lengths for inputs of 512, noise 0.15 and spans of 3."""
    assert spans.longest(512, 114, spans.T5) == 568
    inputs, targets = corrupt_many(spans.T5, [568], inputs_length=512, targets_length=114)
    assert inputs[0, -1] == targets[0, -1] == EOS


def test_pack_and_unpack():
    lengths, which = np.random.default_rng(0).integers(1, 30, 200), np.random.default_rng(1).integers(0, 9, 200)
    rng, ids = np.random.default_rng(2), texts(200, 30)
    inputs, targets = spans.corrupt_batch(
        ids, lengths, which, DENOISERS, rng, **IDS, inputs_length=40, targets_length=40
    )
    room = dict(eos_id=EOS, inputs_length=64, targets_length=48)
    packed = packing.pack(inputs, targets, **room)
    pairs = packing.unpack(packed)
    for i in range(200):
        trimmed = [row[: row.tolist().index(EOS) + 1] for row in (inputs[i], targets[i])]
        np.testing.assert_array_equal(pairs[i][0], trimmed[0])
        np.testing.assert_array_equal(pairs[i][1], trimmed[1])
        np.testing.assert_array_equal(spans.restore(*pairs[i], **IDS), ids[i, : lengths[i]])
    assert len(packed.inputs) < 80
    for tokens, segments, positions in (packed[:3], packed[3:6]):
        for row, segment, position in zip(tokens, segments, positions, strict=True):
            used = segment > 0
            assert (np.diff(segment[used]) >= 0).all() and used[: used.sum()].all() and not row[~used].any()
            begins = np.flatnonzero(np.diff(segment[used], prepend=0))
            np.testing.assert_array_equal(position[used], np.arange(used.sum()) - begins[segment[used] - 1])
    fixed = packing.pack(inputs, targets, **room, rows=90)
    assert fixed.inputs.shape == (90, 64) and fixed.targets.shape == (90, 48) and not fixed.inputs[-1].any()
    for one, other in zip(pairs, packing.unpack(fixed), strict=True):
        np.testing.assert_array_equal(np.concatenate(one), np.concatenate(other))
    with pytest.raises(UserError, match=r"200 pairs fill .* rows, and there are 9; raise rows"):
        packing.pack(inputs, targets, **room, rows=9)
    with pytest.raises(UserError, match="tokens is to be packed into rows of 12 and 12; make the rows longer"):
        packing.pack(inputs, targets, eos_id=EOS, inputs_length=12, targets_length=12)
    with pytest.raises(UserError, match="a sequence has no EOS, id 1500"):
        packing.pack(inputs, targets, **room | dict(eos_id=1500))


TOKENIZER = tokenizers.build("emoji")
ROOM = TOKENIZER.vocab_size + 103
TEXTS = (
    "a",
    "grinning face",
    "Größe: 漢字 und 👩🏽‍🚀 ✨",
    "नमस्ते दुनिया",
    "the quick brown fox jumps over the lazy dog " * 9,
)


@pytest.mark.parametrize("modes", ["ids", "text", None])
def test_the_op_with_a_tokenizer(modes):
    arguments = f"inputs=80, targets=64, vocab_size={ROOM}, modes={modes!r}"
    run = ops.parse(f"denoise({arguments}) | keep('input_ids', 'token_ids', 'denoiser')", TOKENIZER)
    ids = spans.mode_ids(ROOM)
    assert list(ids.values()) == [ROOM - 101, ROOM - 102, TOKENIZER.vocab_size]
    heads = {"ids": lambda m: (ids[m],), "text": TOKENIZER.encode, None: lambda m: ()}[modes]
    rows = []
    for text in TEXTS:
        expected = TOKENIZER.encode(text)
        for seed in range(60):
            row = run({"text": text}, np.random.default_rng(seed))
            denoiser = spans.UL2[row["denoiser"]][0]
            head = heads(denoiser.mode)
            cut = expected[: spans.longest(80, 64, denoiser, mode_length=len(head))]
            ends = dict(vocab_size=ROOM, eos_id=TOKENIZER.eos_id, mode=head)
            restored = spans.restore(row["input_ids"], row["token_ids"], **ends)
            assert restored.tolist() == cut
            np.testing.assert_array_equal(row["input_ids"][: len(head)], head)
            if len(cut) == len(expected):
                assert TOKENIZER.decode(restored) == TOKENIZER.decode(expected)
            rows.append(row)
    batch = collate(rows)
    assert batch["input_ids"].shape == (300, 80) and batch["token_ids"].shape == (300, 64)
    assert {batch[key].dtype for key in batch} == {np.dtype(np.int32)}
    assert np.bincount(batch["denoiser"], minlength=7).min() > 0


def test_mixtures():
    literal = (((3, 0.15, "[NLU]"), 1), ((None, 0.25), 3))
    assert spans.mixture(literal) == ((spans.Denoiser(3, 0.15, "[NLU]"), 1), (spans.Denoiser(None, 0.25), 3))
    assert spans.mixture("ul2") == spans.UL2 and len(spans.UL2) == 7
    run = ops.parse(f"denoise(64, 64, {ROOM}, {literal!r})", TOKENIZER)
    drawn = [run({"text": "red heart"}, np.random.default_rng(seed))["denoiser"] for seed in range(1000)]
    assert abs(np.mean(drawn) - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "32, 32, 3000",
            f"would take ids of tokenizer `emoji`, which has {TOKENIZER.vocab_size}; set vocab_size, here",
        ),
        (f"32, 32, {ROOM - 1}", f"to at least {ROOM}, or {ROOM - 3} with modes='text'"),
        (f"32, 1, {ROOM}", "have no room for one token under"),
        (f"32, 32, {ROOM}, 'ul3'", "is `ul3`; expected one of: ul2, t5, prefix, causal"),
        (f"32, 32, {ROOM}, (((3, 0.15), 0),)", "pairs of a denoiser and a positive weight"),
        (f"32, 32, {ROOM}, ((3, 0.15), (8, 0.15))", "pairs of a denoiser and a positive weight"),
        (f"32, 32, {ROOM}, (((3, 1.5), 1),)", "a denoiser has mean span 3, rate 1.5"),
        (f"32, 32, {ROOM}, (((None, 0.7), 1),)", "a sequential denoiser has rate 0.7; expected (0, 0.5], or 1"),
        (f"32, 32, {ROOM}, (((3, 0.15, 'R'), 1),)", "has mode 'R'; expected None or one of: [NLU], [S2S], [NLG]"),
        ("32, 32", "missing a required argument: 'vocab_size'"),
        (f"32, 32, {ROOM}, key='texts'", "given `texts` of type list; expected a text: use `caption` first"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError) as error:
        ops.parse(f"denoise({arguments})", TOKENIZER)({"text": "a", "texts": ["a"]}, np.random.default_rng(0))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_wrong_texts():
    for lengths in ([0], [9], [1, 1]):
        with pytest.raises(UserError, match="expected one for each text, from 1 to 8"):
            corrupt_many(spans.T5, lengths, ids=texts(1, 8))
    for token in (EOS, VOCAB - 100, -1):
        with pytest.raises(UserError, match=r"expected 0 to 1102, below the 100 sentinels, without EOS \(1\)"):
            corrupt_many(spans.T5, [8], ids=np.full((1, 8), token))
    for text, reason in ((" ", "empty"), (TOKENIZER.decode_ids([TOKENIZER.eos_id]) or "<eos>", "holds the end token")):
        with pytest.raises(BadExample, match=reason):
            ops.parse(f"denoise(32, 32, {ROOM})", TOKENIZER)({"text": text}, np.random.default_rng(0))
