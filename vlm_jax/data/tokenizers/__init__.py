"""Text to token ids: CLIP's byte pairs, SentencePiece, WordPiece, any `tokenizer.json`, one trained on the emoji names.

A tokenizer is named by a spec, a string that can stand in a config:

    clip                            49,408 ids, lower-cased, pad 0 (Radford et al. 2021, arXiv:2103.00020)
    emoji                           trained on the English names and keywords of the embedded training split
    sentencepiece:/path/spm.model   SigLIP, Gemma, Llama; T5 with `?extra_ids=100`
    wordpiece:/path/vocab.txt       BERT, lower-cased unless `?cased=true`
    bpe:/path/vocab.json            CLIP's byte pairs as Transformers reads them, with merges.txt beside
    json:/path/tokenizer.json       any file of the `tokenizers` library, `train_tokenizer`'s own among them

Options follow a `?`, as in `sentencepiece:/path/spm.model?pad_id=1&lower=true` (SigLIP's use of T5's vocabulary).
BOS and EOS of a tokenizer.json are the tokens that its post-processor puts around a text. Without a post-processor, the
usual names decide.
"""

from vlm_jax.data.tokenizers.spec import Tokenizer, build
from vlm_jax.data.tokenizers.training import train

__all__ = ["Tokenizer", "build", "train"]
