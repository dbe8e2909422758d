"""UL2: a mixture of denoisers over texts (Tay et al. 2022, arXiv:2205.05131).

    python -m vlm_jax.train --config=configs/ul2.py:tiny --workdir=runs/ul2_tiny   # embedded data, 2 CPU cores

    python -m vlm_jax.train --config=configs/ul2.py:20b --workdir=runs/ul2_20b \\
        --config.mesh.fsdp=64 --config.mesh.tensor=4

The model is an encoder-decoder; `prefix-SIZE`, such as `prefix-base`, is a decoder alone (section 3.3). Sizes are T5
v1.1's (small to xxl) and the paper's 20b (section 5.1: batch 1,024, 512 tokens in and out, Adafactor).
"""

from ml_collections import ConfigDict

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.variants import T5

DENOISERS = ("R3", "R8", "S", "X3", "X8", "X64", "X64-half")  # names of data.spans.UL2, in the same order
LANGUAGES = ("en", "de", "es", "fr", "it", "pt")


@method(
    family="recipes",
    system="UL2",
    paper="arXiv:2205.05131",
    where="section 3",
    differs="a mixture of denoisers over texts, told by a mode token",
    claim="mixture_of_denoisers: the mixture fills in as spans do and continues as prefixes do",
)
def get_config(variant: str = "base", denoisers: str = "ul2") -> ConfigDict:
    alone, size = variant.startswith("prefix-"), variant.removeprefix("prefix-")
    if size in ("tiny", "smoke"):
        return _embedded(size, alone, denoisers)
    if size not in T5:
        raise UserError(f"there is no variant `{variant}` of this config; sizes: tiny, smoke, {', '.join(T5)}")
    vocab_size, length = 32_128, 512
    tower = dict(variant=size, scan=True, remat="full")
    return ConfigDict(
        dict(
            batch_size=1024,
            duration="2M steps",
            tokenizer="sentencepiece:c4_en.model",
            preprocess=None,
            tokenize=f"tokenize({length}, bos=False)",
            data=dict(
                uri="tfds:c4/en",
                ops=_ops("caption('text')", vocab_size, length, denoisers),
                workers=32,
            ),
            model=_model(alone, tower, vocab_size, length, dtype="bfloat16"),
            objective=_objective(denoisers) | dict(chunk=64 if size == "20b" else 8),  # FSDP gathers the head per chunk
            optimizer=dict(name="adafactor", lr=1e-2, schedule=dict(name="rsqrt", warmup="10000 steps")),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=3),
            log=dict(every="50 steps"),
            profile=dict(steps=""),
        )
    )


def _embedded(variant: str, alone: bool, denoisers: str) -> ConfigDict:
    """The emoji's keywords in six languages; `tiny` takes 5 minutes on one CPU core."""
    smoke, length, vocab_size = variant == "smoke", 48, 3088
    width = 32 if smoke else 128
    tower = dict(width=width, depth=1 if smoke else 2, heads=4, mlp_dim=2 * width, activation="gelu_tanh")
    fields = ", ".join(f"'keywords/{language}'" for language in LANGUAGES)
    ops = _ops(f"random_caption({fields}, join=', ') | lower", vocab_size, length, denoisers)
    held_out = dict(type="denoising", uri="tfds:emoji", split="unseen_concepts", ops=ops, denoisers=_names(denoisers))
    return ConfigDict(
        dict(
            seed=0,
            batch_size=32,
            duration="40 steps" if smoke else "25k examples",
            tokenizer="emoji",
            preprocess=None,
            tokenize=f"lower | tokenize({length}, bos=False)",
            data=dict(uri="tfds:emoji", split="train", ops=ops, workers=0),
            model=_model(alone, tower, vocab_size, length),
            objective=_objective(denoisers),
            optimizer=dict(
                name="muon", lr=3e-3, ns_steps=3, weight_decay=0.1, schedule=dict(name="cosine", warmup="5%")
            ),
            evals=dict(unseen_concepts=held_out),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="25%", keep=2),
            log=dict(every="2 steps" if smoke else "20 steps", tensorboard=True),
            profile=dict(steps=""),
        )
    )


def _names(denoisers: str) -> tuple[str, ...]:
    return DENOISERS if denoisers == "ul2" else (denoisers,)


def _objective(denoisers: str) -> dict:
    return dict(name="denoising", denoisers=_names(denoisers), mean="token", z_loss=1e-4)


def _ops(text: str, vocab_size: int, length: int, denoisers: str) -> str:
    denoise = f"denoise({length}, {length}, {vocab_size}, denoisers='{denoisers}')"
    return f"{text} | {denoise} | keep('input_ids', 'token_ids', 'denoiser')"


def _model(alone: bool, tower: dict, vocab_size: int, length: int, dtype: str = "float32") -> dict:
    decoder = dict(vocab_size=vocab_size, length=length, **tower)
    if alone:
        return dict(name="prefix_lm", decoder=decoder, dtype=dtype)
    return dict(name="encoder_decoder", encoder=tower, decoder=decoder, dtype=dtype)
