"""A prefix language model: one stack that reads a text both ways and writes on (Raffel et al. 2020, arXiv:1910.10683).

    python -m vlm_jax.train --config=configs/prefix_lm.py:base --workdir=runs/lm_base

base    all texts of the embedded data: names and keywords of the emoji in nine languages; captions, sentences and
        questions of scenes, without their pictures. For methods that put pictures into a frozen language model.
smoke   seconds: does it run?

Half of the texts are continued from a place drawn in them, half are written from the start; questions are answered.

`pkg:vlm_jax/zoo/lm_base` is `base`, seed 0, in bfloat16 (params_sha256 of the run 7c9b226471fe1d11..., jax 0.10.2):
100,000 examples. experiments/base_models has its numbers.
"""

from ml_collections import ConfigDict

from configs.base import LANGUAGES
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

INPUTS, TARGETS, VOCABULARY = 32, 64, 2985  # tokens
DENOISE = (
    f"lower | denoise({INPUTS}, {TARGETS}, {VOCABULARY}, (((None, 0.5), 1), ((None, 1.0), 1)), modes=None, sentinels=0)"
)


@method(
    family="recipes",
    paper="arXiv:1910.10683",
    where="section 3.2.1",
    differs="one stack: attention is two-way over a text's beginning, causal over the rest, which is predicted",
)
def get_config(variant: str = "base") -> ConfigDict:
    if variant not in ("base", "smoke"):
        raise UserError(f"there is no variant `{variant}` of this config; expected base or smoke")
    base = variant == "base"
    width, depth = (192, 4) if base else (32, 1)
    words = ", ".join(f"'{field}/{language}'" for field in ("name", "keywords") for language in LANGUAGES)
    kept = "keep('input_ids', 'token_ids')"
    captions = "random_caption('long_caption', 'caption', 'sub_captions', weights=(2, 1, 1))"
    tokens = lambda field, length, to: f"caption('{field}') | lower | tokenize({length}, bos=False, to='{to}')"
    question = tokens("questions/question", INPUTS, "input_ids")
    answer = tokens("questions/answer", TARGETS, "token_ids")
    return ConfigDict(
        dict(
            seed=0,
            batch_size=128,
            duration="100k examples" if base else "40 steps",
            tokenizer="emoji",
            preprocess=None,
            tokenize=f"lower | tokenize({INPUTS}, bos=False)",
            data=dict(
                sources=dict(
                    emoji=dict(
                        uri="tfds:emoji", split="train", ops=f"random_caption({words}, join=', ') | {DENOISE} | {kept}"
                    ),
                    scenes=dict(uri="scenes:", split="train", ops=f"{captions} | {DENOISE} | {kept}"),
                    questions=dict(
                        uri="scenes:", split="train", ops=f"draw('questions') | {question} | {answer} | {kept}"
                    ),
                ),
                workers=0,
            ),
            model=dict(
                name="prefix_lm",
                decoder=dict(
                    vocab_size=VOCABULARY,
                    length=TARGETS,
                    width=width,
                    depth=depth,
                    heads=width // 32,
                    mlp_dim=4 * width,
                ),
            ),
            objective=dict(name="denoising", mean="token", z_loss=1e-4),
            optimizer=dict(
                name="muon", lr=3e-3, ns_steps=3, weight_decay=0.1, schedule=dict(name="cosine", warmup="2%")
            ),
            evals=dict(),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="5%", keep=2),
            log=dict(every="20 steps", tensorboard=True),
            profile=dict(steps=""),
        )
    )
