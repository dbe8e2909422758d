"""FPT: a language model's frozen blocks look at pictures (Lu et al. 2021, arXiv:2103.05247).

    vlm-jax train --config=ul2:tiny --workdir=runs/ul2_tiny         # minutes on 2 CPU cores
    vlm-jax train --config=fpt:pretrained --workdir=runs/fpt

Blocks of the image tower begin as those of UL2's encoder. Their attention and MLPs are frozen; norms, the layer before
the blocks, positions and what follows the blocks train, on the concepts of embedded pictures. UL2's relative positions
are left out. Variants: pretrained, random (frozen blocks that have seen nothing), each also with `-select` (one style
held out) and `-smoke` (of `ul2:smoke`, in runs/ul2_smoke). Not yet measured: no numbers.
"""

from ml_collections import ConfigDict

from configs.embedded import SIZE, embedded
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

FROZEN = ((r"image/blocks.*/(attn|mlp)/.*", dict(freeze=True)), (".*", {}))
BLOCKS = dict(norm="rmsnorm", attn_bias=False, mlp_bias=False, attn_scale=1.0, gated=True, activation="gelu_tanh")
CONCEPTS = 2048  # more than there are


@method(
    family="recipes",
    system="FPT",
    paper="arXiv:2103.05247",
    where="authors' code",
    differs="blocks of an image tower are a language model's, frozen but for their norms",
)
def get_config(variant: str = "pretrained") -> ConfigDict:
    start, _, size = variant.partition("-")
    if start not in ("pretrained", "random"):
        raise UserError(f"there is no variant `{variant}` of this config; expected one of: pretrained, random")
    config = embedded(size or "tiny", penalty="softmax")
    sizes = dict(width=32, mlp_dim=64) if size == "smoke" else dict(depth=2, mlp_dim=256)
    config.model.image.update(dict(image_size=SIZE, pool="gap", **BLOCKS, **sizes))
    config.model.text = None
    config.objective = dict(name="arc_margin", classes=CONCEPTS, margin=0.0)
    config.optimizer.params = FROZEN
    config.data.ops = config.data.ops.replace("'token_ids', ", "")
    if start == "pretrained":
        config.model_init = {"image/blocks": f"runs/ul2_{'smoke' if size == 'smoke' else 'tiny'}:encoder"}
    section = config.evals["emojione" if size == "select" else "unseen_style"].to_dict()
    probe = dict(type="probe", train_where=config.data.to_dict().get("where"), every=None)
    config.evals = dict(probe=section | probe)
    return config
