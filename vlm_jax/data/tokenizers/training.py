"""Learns byte pairs from texts."""

from collections.abc import Sequence

import tokenizers as hf

from vlm_jax.errors import UserError


def train(texts: Sequence[str], vocab_size: int) -> str:
    """Returns the `tokenizer.json` text of byte-level byte pairs learnt from `texts` (Sennrich et al. 2016).

    Lower-cased, NFKC; every text can be encoded (by bytes, if the corpus lacks a character). <pad> 0, <bos> 1, <eos> 2.
    The vocabulary may turn out smaller than `vocab_size`: a pair must occur twice to become one token.
    """
    if vocab_size < 259:
        raise UserError(f"vocab_size is {vocab_size}; expected >= 259: 256 bytes and 3 specials")
    model = hf.Tokenizer(hf.models.BPE())
    model.normalizer = hf.normalizers.Sequence([hf.normalizers.NFKC(), hf.normalizers.Lowercase()])
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return model.to_str(pretty=True)
