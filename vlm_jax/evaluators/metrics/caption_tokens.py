"""Tokens of captions, as the COCO caption server makes them with the Stanford tokenizer (CoreNLP 3.4.1)."""

import functools
import re
import unicodedata

REMOVED = frozenset("\"'`.?!,:-;()[]{}…–—―‥“”‘‹›«»「」『』《》〈〉【】〔〕")
WRITTEN = str.maketrans({
    "’": "'", "\u00ad": None, "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ", "€": " $ ",
    "£": " # ", "¢": " cents ",
})  # fmt: skip
ENTITIES = {"&amp;": " & ", "&lt;": " < ", "&gt;": " > ", "&quot;": " ", "&nbsp;": " "}
DROPPED = re.compile("[\u20e3\ufe0e\ufe0f\U00010000-\U0010ffff]")  # emoji and what follows them: spaces there
ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thurs?|fri|corp|inc|ltd|co|bros|gen|col|lt|sgt|capt|"
    "cpl|maj|rev|gov|sen|rep|pres|hon|mt|ft|ave|blvd|rd|st|sq|dept|univ|assn|est|al|cf|drs?|mr|mrs|ms|messrs|prof|jr|"
    "sr|esq|md|vs|etc"
)
END = r"'(?:s|m|d|re|ve|ll)\b"


def tokenize(text: str) -> list[str]:
    """Splits a text into lower-case words, numbers and signs, as the Penn Treebank does.

    "man's" -> "man", "'s"; "don't" -> "do", "n't"; "cannot" -> "can", "not"; hyphens stay, "!!!" is one
    token. Punctuation on COCO's list and quotation marks are removed; emoji beyond U+FFFF are spaces, as in the
    Stanford tokenizer. The result differs from that program's in this: brackets and the faces made of them are removed
    ("-lrb-" there); letters, marks and signs of all scripts stay (that program drops those newer than its Unicode); a
    rare abbreviation ("Okla.") loses its point; a curly apostrophe is as a straight one.
    """
    for entity, sign in ENTITIES.items():
        text = text.replace(entity, sign)
    if not text.isascii():
        text = DROPPED.sub(" ", text.translate(WRITTEN))
        text = "".join(" " if unicodedata.category(sign) == "Cf" else sign for sign in text)
    found = (token.lower() for match in _pattern().findall(text) for token in match.split())
    return [token for token in found if token not in REMOVED]


@functools.cache
def _pattern() -> re.Pattern:
    """The kinds of tokens, the first that fits wins."""
    marks = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M")
    letter = rf"(?:[^\W_]|[{marks}])"  # `\w` lacks the marks that Indian and Thai texts are written with
    word = rf"{letter}+(?:_+{letter}+)*"
    kinds = (
        rf"(?:https?://|www\.|{letter}+\.[a-z]{{2,4}}/)\S{{1,500}}?(?=[.,;:!?'\")]*(?:\s|$))",
        rf"{word}(?:[.+-]{word}){{0,9}}@{word}(?:[.-]{word})*",  # an address
        r"@[a-z_]\w*",
        r"\#[^\W\d_]+",
        r"</?[a-z][^<>\n]*>",
        r"\bc(?:\+\+|\#)",
        r"(?-i:\b[A-Z]+(?:&[A-Z]+)+\b)",
        r"n't\b",
        END,
        r"'n'|'(?:em|n)\b|(?<!\w)'\d\ds?\b|'t(?=(?:is|was)\b)|\by'(?=[a-z])",
        r"\b(?:can(?=not\b)|(?:gim|lem)(?=me\b)|(?:gon|wan)(?=na\b)|got(?=ta\b))(?!\w\w+[-'])",
        r"\b(?:(?:[a-z]\.){2,}|ph\.d\.)(?!\w)",
        rf"\b(?:{ABBREVIATIONS})\.(?!\w)|\bnos?\.(?=\s*\d)",
        r"(?<!\w)[+-]?(?:\d++(?:[.,:]\d++)++|\.\d++|(?<=[+-])\d++(?!\w))|\d++(?:[.,:]\d++)++",
        rf"{letter}+?(?=n't\b)",
        rf"{letter}+(?:[./]{letter}+)+",
        # an apostrophe stays after one letter and between vowels: d'art, o'neill, qu'il
        rf"(?:(?:\b[a-hj-xz]|\b{letter}*[aeiouy](?=.[aeiou]))(?!{END})'{letter}{{2,}}|{word})(?:[-‐‑]{word})*",
        r"[!?]{2,}|\*{2,}|_{2,}|>{2,}",
        r"\S",
    )
    return re.compile("|".join(kinds), re.IGNORECASE)
