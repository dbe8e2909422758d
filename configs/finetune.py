"""A released CLIP or SigLIP, trained on with its own loss, on your pairs (FLYP, Goyal et al. 2023, arXiv:2212.00638).

    vlm-jax train --config=finetune:pkg:vlm_jax/zoo/clip_tiny --workdir=runs/mine \\
        --config.data.uri=jsonl:data/pairs.jsonl

The variant is anything that `vlm_jax.load` reads, such as hf:openai/clip-vit-base-patch32. Model, tokenizer and
preprocessing are the checkpoint's; the loss is its own: the sigmoid's if it has a `logit_bias`, else the softmax's.
Pictures are cropped at random, to nine tenths or more; each text is the field `text` of the data. docs/finetune.md goes
from pairs to results.
"""

from ml_collections import ConfigDict

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError


@method(
    family="recipes",
    paper="arXiv:2212.00638",
    differs="a released model, trained on with the loss of its pretraining",
)
def get_config(variant: str = "pkg:vlm_jax/zoo/clip_tiny") -> ConfigDict:
    from vlm_jax.zoo import hub, op_strings, recognize  # these import JAX

    path = hub.local(variant)
    released = recognize.run_of(path) if (path / "checkpoints").is_dir() else recognize.of_spec(variant)
    if not released.model.get("image") or not released.model.get("text") or released.model.get("decoder"):
        raise UserError(f"{variant} is no model of two towers; `finetune` trains a CLIP or a SigLIP")
    for setting in ("preprocess", "tokenizer", "tokenize"):
        if getattr(released, setting) is None:
            raise UserError(f"{variant} does not tell its `{setting}`; write it with `vlm-jax convert --{setting}=...`")
    penalty = "softmax" if released.model.get("bias_init") is None else "sigmoid"
    return ConfigDict(
        dict(
            model_init=variant,
            model=released.model,
            preprocess=released.preprocess,
            tokenizer=released.tokenizer,
            tokenize=released.tokenize,
            batch_size=256,
            duration="10 epochs",
            data=dict(
                uri="jsonl:pairs.jsonl",
                ops=f"{op_strings.augmented(released.preprocess)} | caption('text') | {released.tokenize}"
                " | keep('image', 'token_ids')",
                threads=2,
            ),
            objective=dict(name="contrastive", penalty=penalty),
            optimizer=dict(
                name="adamw",
                lr=1e-5,
                weight_decay=0.1,
                clip_norm=1.0,
                schedule=dict(name="cosine", warmup="5%"),
            ),
            evals={},
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1 epochs", keep=2),
            log=dict(every="1%"),
            profile=dict(steps=""),
        )
    )
