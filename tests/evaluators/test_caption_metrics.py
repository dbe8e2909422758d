"""Metrics of captions: counted by hand, published examples, and what pycocoevalcap gives for random words."""

import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.evaluators.metrics.captions import bleu, cider_d, exact_match, rouge_l, tokenize

# pycocoevalcap 1.2 on `random_case(seed)`: BLEU-1 to BLEU-4 of the corpus, the means of ROUGE-L and CIDEr-D
THEIRS = {
    9: ([0.664596273288, 0.427360671802, 0.230790504135, 0.110652183624], 0.486163017577, 1.113625606792),
    11: ([0.666650441737, 0.382702550024, 0.202173551374, 0.124187883365], 0.446816193135, 0.9674819512),
    12: ([0.71929824561, 0.499968892895, 0.249989630857, 0.0], 0.519939480875, 1.278900793098),
}  # its last 0.0 is 2e-5


def random_case(seed):
    """30 captions of up to nine of six words, each with up to five references."""
    rng = np.random.default_rng(seed)
    text = lambda: [chr(97 + i) for i in rng.integers(0, 6, rng.integers(1, 10))]
    return [text() for _ in range(30)], [[text() for _ in range(rng.integers(1, 6))] for _ in range(30)]


@pytest.mark.parametrize("seed", THEIRS)
def test_ours_equal_cocos(seed):
    captions, references = random_case(seed)
    expected_bleu, expected_rouge, expected_cider = THEIRS[seed]
    np.testing.assert_allclose(bleu(captions, references), expected_bleu, atol=1e-10)
    assert rouge_l(captions, references).mean() == pytest.approx(expected_rouge, abs=1e-10)
    assert cider_d(captions, references).mean() == pytest.approx(expected_cider, abs=1e-10)


def test_bleu_clips_counts():
    """Papineni et al. 2002, section 2.1, examples 1 and 2."""
    references = [tokenize("the cat is on the mat"), tokenize("there is a cat on the mat")]
    assert bleu([["the"] * 7], [references], n=1) == [pytest.approx(2 / 7)]
    party = [
        tokenize("It is a guide to action that ensures that the military will forever heed Party commands."),
        tokenize("It is the guiding principle which guarantees the military forces always being under the command of"
                 " the Party."),
        tokenize("It is the practical guide for the army always to heed the directions of the party."),
    ]  # fmt: skip
    good = tokenize("It is a guide to action which ensures that the military always obeys the commands of the party.")
    bad = tokenize("It is to insure the troops forever hearing the activity guidebook that party direct.")
    assert bleu([good], [party], n=2) == pytest.approx([17 / 18, (17 / 18 * 10 / 17) ** 0.5])
    penalty = np.exp(1 - 16 / 14)  # 14 words; the references have 16, 18 and 16
    assert bleu([bad], [party], n=2) == pytest.approx([penalty * 8 / 14, penalty * (8 / 14 * 1 / 13) ** 0.5])


def test_the_closest_reference_sets_the_length():
    captions = [["a", "b", "c"], ["a"]]
    references = [[["a", "b", "c", "d"], ["a", "b"]], [["a", "b", "c"]]]
    # 3 words against 2 (not 4: the shorter of two as close), 1 against 3: all right, 4 words for 5
    assert bleu(captions, references, n=1) == [pytest.approx(np.exp(1 - 5 / 4))]
    assert bleu([[]], [[["a"]]]) == [0.0] * 4


def test_rouge_is_of_the_longest_common_subsequence():
    """Lin 2004, section 3.1: "police killed the gunman" and two candidates."""
    reference = [[tokenize("police killed the gunman")]]
    for caption, share in (("police kill the gunman", 3 / 4), ("the gunman kill police", 2 / 4)):
        np.testing.assert_allclose(rouge_l([caption.split()], reference), [share])
    several = [[["a"], ["a", "x", "b", "y", "c", "z", "d", "u"]]]  # recall of the first, precision of the second
    precision, recall = 4 / 5, 1.0
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    np.testing.assert_allclose(rouge_l([["a", "b", "v", "c", "d"]], several), [expected])
    assert rouge_l([["q"], []], [[["a"]], [["a"]]]).tolist() == [0, 0]


def test_cider_by_hand():
    """Two pictures; a word of both weighs nothing, a word of one log 2. Names of one word reach 10 / 4."""
    captions = [["a", "cat"], ["dog"]]
    references = [[["a", "cat"]], [["a", "dog"]]]
    first = (1 + 1) / 4  # 1-grams and 2-grams agree, there are no longer ones
    second = np.exp(-1 / 72) / 4  # the 1-gram agrees, one word is missing
    np.testing.assert_allclose(cider_d(captions, references), [10 * first, 10 * second])
    # said three times: clipped to once, and two words too many
    three = cider_d([["a", "cat"], ["dog"] * 3], references)[1]
    np.testing.assert_allclose(three, 10 / 4 * (1 / 3) * np.exp(-1 / 72))
    assert cider_d(captions[:1], references[:1]).tolist() == [0], "of one picture all words are everywhere"


def test_exact_match_is_of_tokens():
    captions = [tokenize("Black cat."), tokenize("cat black"), []]
    references = [[["dog"], ["black", "cat"]], [["black", "cat"]], [["x"]]]
    assert exact_match(captions, references).tolist() == [True, False, False]


def test_tokens():
    joined = lambda text: " ".join(tokenize(text))
    assert joined("A man's hat; don't stop -- it's 5:30, costs $3.50!") == (
        "a man 's hat do n't stop it 's 5:30 costs $ 3.50"
    )
    assert joined("twelve o’clock (“two-thirty”) T-Rex & woman’s can't") == (
        "twelve o'clock two-thirty t-rex & woman 's ca n't"
    )
    assert tokenize(" ...") == [] and tokenize("猫の顔") == ["猫の顔"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("You cannot do that, gimme!! I'm gonna", "you can not do that gim me !! i 'm gon na"),
        ("rock 'n' roll y'all, '90s 90's 'tis", "rock 'n' roll y' all '90s 90 's 't is"),
        ("aujourd'hui d'art o'neill qu'il i'ma", "aujourd hui d'art o'neill qu'il i ma"),
        ("C++ and C#, AT&T a&b a &amp; b", "c++ and c# at&t a & b a & b"),
        ("me@x.com http://a.b/c. www.x.com #1 @home #cat2", "me@x.com http://a.b/c www.x.com # 1 @home #cat 2"),
        ("½ of 2½, €20 £5 5¢", "1/2 of 2 1/2 $ 20 # 5 5 cents"),
        ("5:30pm 5'10\" .5 -5 1,000 3-4 1/2 24/7", "5:30 pm 5 10 .5 -5 1,000 3-4 1/2 24/7"),
        ("a.m. U.S.A. Mr. Smith and/or a.b No. 5 no. etc.", "a.m. u.s.a. mr. smith and/or a.b no. 5 no etc."),
        ("what?! really?? a cat!!! no!", "what ?! really ?? a cat !!! no"),
        ("a \U0001f431 cat\U0001f431 ❤\ufe0f ☕", "a cat ❤ ☕"),
        ("zero\u200bwidth soft\u00adhyphen non\u2011breaking", "zero width softhyphen non\u2011breaking"),
        ("बिल्ली सो रही है। แมวน้ำ e\u0301clair עִבְרִית", "बिल्ली सो रही है । แมวน้ำ e\u0301clair עִבְרִית"),
        ("猫。「鳥」 **bold** __x__ _y_", "猫 。 鳥 ** bold ** __ x __ _ y _"),
    ],
)
def test_tokens_are_those_of_the_stanford_tokenizer(text, tokens):
    """Run for these values: stanford-corenlp-3.4.1 in pycocoevalcap 1.2, without COCO's punctuation."""
    assert " ".join(tokenize(text)) == tokens


@pytest.mark.parametrize("text", ["www." + "!" * 9999 + "x", "a+" * 9999, "_a" * 9999, "<a" * 9999, "'" * 9999])
def test_no_text_takes_long(text):
    assert len(tokenize(text)) < 20_001


@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ([["a"]], [], "got 1 captions and references for 0; expected equal numbers"),
        ([], [], "at least one"),
        (
            ["a cat"],
            [[["a"]]],
            "caption 0 or its references are not lists of tokens, or it has no reference; use `tokenize`",
        ),
        ([["a"]], [["a cat"]], "not lists of tokens"),
        ([["a"]], [[]], "or it has no reference"),
    ],
)
def test_mistakes_are_named(captions, references, message):
    for metric in (bleu, rouge_l, cider_d, exact_match):
        with pytest.raises(UserError, match=message):
            metric(captions, references)
