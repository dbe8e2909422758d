"""Two hundred texts that tokenizers disagree about: controls, spaces, special tokens, scripts, broken Unicode."""

import random

SPACES = (" ", "\t", "\n", "\r\n", "\v", "\f", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u2003", "\u2009", "\u200a",
          "\u2028", "\u2029", "\u202f", "\u205f", "\u3000")  # fmt: skip
UNSEEN = ("\x00", "\x01", "\x08", "\x1b", "\x7f", "\x80", "\x9f", "\xad", "\u034f", "\u061c", "\u115f", "\u180e",
          "\u200b", "\u200c", "\u200d", "\u200e", "\u202e", "\u2060", "\u2066", "\ufeff", "\ufff9", "\ufffc", "\ufffd",
          "\uffff", "\ue000", "\U000e0001", "\U000e0041", "\U0010ffff")  # fmt: skip
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>", "<| endoftext |>", "[CLS]", "[SEP]", "[PAD]", "[UNK]",
           "[MASK]", "[mask]", "[ SEP ]", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<bos>", "<eos>", "<S>",
           "<extra_id_0>", "<extra_id_99>", "<0x0A>", "##ing", "▁", "▁▁a", "Ġ", "Ġa", "</w>", "a</w>")  # fmt: skip
WORDS = ("İstanbul", "ıI", "ǅ", "ß ẞ", "ﬁne ﬂy ﬀ", "ＦＵＬＬ　ｗｉｄｔｈ", "½ ² ⑴ Ⅷ ㎏", "e\u0301 é", "\u0301a",
         "a\u0308\u0323",
         "Å Å Å", "ŝ̷̢͇́", "कि न्द्र", "ไทยไม่มีช่องว่าง", "ភាសាខ្មែរ", "မြန်မာ", "한국어 한국어", "日本語ﾃｽﾄ ガ ガ",
         "中文字，。！", "𠮷野家", "עִבְרִית", "العَرَبِيَّة ۱۲۳", "русский ЁЖ", "Ελληνικά ΣΑΣ ς", "አማርኛ", "ქართული",
         "👍🏽", "👩‍👩‍👧‍👦", "🇨🇭🇨🇭🇨", "1️⃣", "☃️☃", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "𝒻𝑜𝓃𝓉 𝔣𝔬𝔫𝔱", "🅰️ Ⓐ", "☺︎")  # fmt: skip
MARKS = ("don't", "DON'T I'LL we'Ve", "''s'T", "it’s", "a'b'c", "rock'n'roll", "e-mail", "snake_case", "__init__",
         "C++", "$5.00",
         "3.14e-10", "1,000,000", "100%", "#tag @name", "http://x.y/z?q=1&r=%20", "a/b\\c", "<b>bold</b>",
         "&amp; &lt;b&gt; &#39; &eacute; &amp;amp;", "&nbsp;", "Ã© â€œquotedâ€\x9d", "“quoted” ‘single’ „low“ «fr»",
         "—–−‐‑-", "...…", "!?!?", "()[]{}", "~`^_|", "\\n\\t", "\"'`", "a.b.c.", ".", "'", "_", "-", "?", "0", "007",
         "v1.2.3-rc4", "x²+y²=z²", "①②③", "№ ™ © ® €£¥", "A" * 3, "Aa aA AA", "xXx", "ab" * 40,
         "a b " * 40, "1 2 3 " * 30,
         "supercalifragilisticexpialidocious", "Donaudampfschifffahrtsgesellschaft")  # fmt: skip


def nasty(count: int = 200) -> list[str]:
    """Returns the texts: each of the parts alone or within words, then mixtures of them, drawn from a fixed seed."""
    texts = ["", *(f"a{s}b" for s in SPACES), *(f" {s} " for s in SPACES[:6]), *(f"red{c}fox {c} a" for c in UNSEEN)]
    texts += [*SPECIAL, *(f"a {s} b{s}c" for s in SPECIAL[:12]), *WORDS, *MARKS]
    rng = random.Random(0)
    parts = (*SPACES, *UNSEEN, *SPECIAL, *WORDS, *MARKS)
    while len(texts) < count:
        texts.append("".join(rng.choices(parts, k=rng.randrange(2, 6))))
    return texts
