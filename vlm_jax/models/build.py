"""Builds modules from config sections."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax

from vlm_jax import catalogue, config
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models import convnext, efficientnet, insertion, resnet, variants
from vlm_jax.models.captioner import Captioner
from vlm_jax.models.coca import CoCa, MultimodalDecoder, QueryPool, UnimodalDecoder
from vlm_jax.models.decoder import Decoder, TokenTable
from vlm_jax.models.encoder_decoder import T5, T5_DECODER, EncoderDecoder, TokenEncoder
from vlm_jax.models.many_tower import ManyTower
from vlm_jax.models.next_patch_captioner import NextPatchCaptioner
from vlm_jax.models.one_tower_captioner import OneTowerCaptioner
from vlm_jax.models.prefix_captioner import PrefixCaptioner
from vlm_jax.models.prefix_lm import PrefixLM
from vlm_jax.models.rotary import Rotary
from vlm_jax.models.text import TextTransformer
from vlm_jax.models.transformer import Encoder, Trunk
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.models.two_tower_captioner import TwoTowerCaptioner
from vlm_jax.models.vit import ViT


def build(section) -> nn.Module:
    """Builds the model that a config section describes.

    Args:
      section: a mapping: name (of a method of the family "models") and the arguments of its builder, such as
        dict(name="two_tower", image=dict(variant="B/32", pool="tok", out_dim=512),
             text=dict(variant="M", vocab_size=49408, length=77, out_dim=512), dtype="bfloat16");
        and insertions, the input of `insertion.of_sections`.

    Raises:
      UserError: the name or a key is unknown, or a key is missing.
    """
    section = dict(section)
    builder = catalogue.get("models", section.pop("name", "two_tower"), "config.model.name")
    insertions = section.pop("insertions", None)
    if "dtype" in section:
        section["dtype"] = config.choose(DTYPES, section["dtype"], "config.model.dtype")
    model = config.call(builder, section, "config.model")
    if not insertions:
        return model
    return insertion.inserted(model, *insertion.of_sections(insertions, "config.model.insertions"))


@method(
    family="models",
    system="TencentPretrain",
    paper="arXiv:2103.00020",
    where="section 2.4",
    differs="an image tower and a text tower in one space",
)
def two_tower(image, text, scale_init=10.0, bias_init=None, space=None, shared=False, dtype="float32"):
    """Returns a `TwoTower`; `image` and `text` are sections for `tower` (or None), `dtype` is their compute dtype.

    `space` is the name of a part of the family "spaces", or dict(name=..., ...), or None. `shared` says whether the
    towers share their blocks, final norm and head (SharedCLIP, arXiv:2406.17639).
    """
    towers = {
        "image": tower("vit", image, "config.model.image", dtype),
        "text": tower("text", text, "config.model.text", dtype),
    }
    if shared:
        towers = with_trunk(**towers)
    return TwoTower(
        **towers,
        scale_init=scale_init,
        bias_init=bias_init,
        space=space and catalogue.build("spaces", space, "config.model.space"),
    )


@method(
    family="models",
    paper="arXiv:2502.14786",
    where="section 2.2",
    differs="two towers, and a decoder that attends to the image tower's tokens",
)
def two_tower_captioner(image, text, decoder, scale_init=10.0, bias_init=None, dtype="float32"):
    """Returns a `TwoTowerCaptioner`; `image`, `text` and `decoder` are sections for `tower`, with one compute dtype."""
    return TwoTowerCaptioner(
        image=tower("vit", image, "config.model.image", dtype),
        text=tower("text", text, "config.model.text", dtype),
        decoder=tower("decoder", decoder, "config.model.decoder", dtype),
        scale_init=scale_init,
        bias_init=bias_init,
    )


@method(
    family="models", paper="arXiv:2306.07915", where="section 3.1", differs="a decoder that attends to the image tower"
)
def captioner(image, decoder, keep=1.0, dtype="float32"):
    """Returns a `Captioner`; `image` and `decoder` are sections for `tower`, `dtype` is their compute dtype."""
    return Captioner(
        image=tower("vit", {"pool": "none", **image}, "config.model.image", dtype),
        decoder=tower("decoder", decoder, "config.model.decoder", dtype),
        keep=_share(keep),
    )


@method(
    family="models",
    paper="arXiv:2509.01644",
    where="section 2.2",
    differs="a decoder that reads the image tower's tokens and the text as one sequence",
)
def prefix_captioner(image, decoder, keep=1.0, two_way=False, dtype="float32"):
    """Returns a `PrefixCaptioner`; `image` and `decoder` are sections for `tower`, `dtype` is their compute dtype."""
    return PrefixCaptioner(
        image=tower("vit", {"pool": "none", **image}, "config.model.image", dtype),
        decoder=_reader(decoder, dtype),
        keep=_share(keep),
        two_way=two_way,
    )


@method(
    family="models",
    paper="arXiv:2411.14402",
    where="section 2.2",
    differs="prefix attention in the image tower; a decoder of patches and text",
)
def next_patch_captioner(image, decoder, dtype="float32"):
    """Returns a `NextPatchCaptioner`; `image` and `decoder` are sections for `tower`, with one compute dtype."""
    return NextPatchCaptioner(
        image=tower("vit", {"pool": "none", **image}, "config.model.image", dtype), decoder=_reader(decoder, dtype)
    )


@method(
    family="models",
    paper="arXiv:2605.00809",
    where="section 3.1",
    differs="one transformer, in which the picture is the prefix of the text",
)
def one_tower_captioner(image, decoder, dtype="float32"):
    """Returns a `OneTowerCaptioner`; `image` is a section for `tower`, `decoder` has fields of `TokenTable`."""
    image = tower("vit", {"pool": "none", **image}, "config.model.image", dtype)
    section = {"width": image.width, **decoder}
    return OneTowerCaptioner(image=image, decoder=tower("tokens", section, "config.model.decoder", dtype))


@method(
    family="models",
    paper="arXiv:1910.10683",
    where="section 2.1",
    differs="a text encoder and a decoder that attends to it",
)
def encoder_decoder(encoder, decoder, pad_id=0, dtype="float32"):
    """Returns an `EncoderDecoder`; `encoder` and `decoder` are sections for `tower`; all but sizes default to T5's."""
    model = EncoderDecoder(
        encoder=tower("token_encoder", {**T5, **encoder}, "config.model.encoder", dtype),
        decoder=tower("token_decoder", {**T5_DECODER, **decoder}, "config.model.decoder", dtype),
        pad_id=pad_id,
    )
    if model.encoder.width != model.decoder.width:
        widths = f"{model.encoder.width} and {model.decoder.width}"
        raise UserError(f"config.model: encoder and decoder share the token table; their widths are {widths}")
    return model


@method(
    family="models", paper="arXiv:1910.10683", where="section 3.2.1", differs="one decoder, whose prefix all tokens see"
)
def prefix_lm(decoder, pad_id=0, dtype="float32"):
    """Returns a `PrefixLM`; `decoder` is a section for `tower`; all but sizes default to T5's."""
    section = {**T5_DECODER, "cross": None, "relative_two_way": True, **decoder}
    return PrefixLM(decoder=tower("token_decoder", section, "config.model.decoder", dtype), pad_id=pad_id)


@method(
    family="models",
    paper="arXiv:2205.01917",
    where="section 3.2",
    differs="a text decoder in two halves, of which the first is a text tower",
)
def coca(image, pool, text, decoder, out_dim, scale_init=1 / 0.07, dtype="float32"):
    """Returns a `CoCa`; `image`, `text` and `decoder` are sections for `tower`, `pool` has fields of `QueryPool`."""
    return CoCa(
        image=tower("vit", {"pool": "none", **image}, "config.model.image", dtype),
        pool=config.call(QueryPool, pool, "config.model.pool", dtype=dtype),
        text=tower("unimodal", text, "config.model.text", dtype),
        decoder=tower("multimodal", decoder, "config.model.decoder", dtype),
        out_dim=out_dim,
        scale_init=scale_init,
    )


@method(
    family="models",
    paper="arXiv:2411.01053",
    differs="any number of towers in one space",
)
def many_tower(towers, inputs=None, scale_init=10.0, dtype="float32"):
    """Returns a `ManyTower`; `towers` maps modalities to sections for `tower`, of which `type` defaults to "vit".

    `inputs` maps modalities to keys of the batch; a modality's key defaults to its name, that of "text" to "token_ids".
    """
    keys = {name: "token_ids" if name == "text" else name for name in towers} | dict(inputs or {})
    build = lambda name, section: tower(
        "text" if name == "text" else "vit", section, f"config.model.towers.{name}", dtype
    )
    made = tuple(build(name, section) for name, section in towers.items())
    return ManyTower(tuple(towers), made, tuple(keys[name] for name in towers), scale_init)


def _share(keep):
    if not 0 < keep <= 1:
        raise UserError(
            f"config.model.keep is {keep}; expected the share of tokens that the decoder sees, 0 < keep <= 1"
        )
    return keep


def _reader(section, dtype):
    """Returns a decoder of one sequence of picture and text."""
    if dict(section).get("cross"):
        raise UserError(
            "config.model.decoder.cross: this decoder reads the picture as a prefix; leave it out, or take captioner"
        )
    return tower("decoder", {**section, "cross": None}, "config.model.decoder", dtype)


def with_trunk(image, text):
    """Returns both towers and the trunk that they share, by name.

    Raises:
      UserError: there is one tower, or a field of the blocks or of the head differs.
    """
    fields = [field.name for field in dataclasses.fields(Encoder) if field.name not in ("parent", "name", "pool")]
    for name in fields:
        own = [getattr(one, name, None) for one in (image, text)]
        if own[0] != own[1]:
            raise UserError(
                f"config.model.shared: the towers share their blocks and head, but {name} is {own[0]} in image and "
                f"{own[1]} in text; give both one value"
            )
    trunk = Trunk(**{name: getattr(image, name) for name in fields})
    return {"trunk": trunk} | {name: one.clone(trunk=trunk) for name, one in (("image", image), ("text", text))}


def tower(kind, section, where, dtype):
    """Returns a tower from its fields; `variant` gives default sizes (see `variants.lookup`).

    `mlp` in the section is the name of a part of the family "mlps", or dict(name=..., ...).
    `rotary` in the section is a dict(...) of `rotary.Rotary`.
    `type` in the section is a key of `TOWERS`; defaults to `kind`.
    """
    if section is None:
        return None
    section = {key: tuple(value) if isinstance(value, list) else value for key, value in dict(section).items()}
    cls, lookup = config.choose(TOWERS, section.pop("type", kind), f"{where}.type")
    if section.get("mlp") is not None:
        section["mlp"] = catalogue.build("mlps", section["mlp"], f"{where}.mlp")
    if isinstance(section.get("rotary"), Mapping):
        own = {key: tuple(value) if isinstance(value, list) else value for key, value in section["rotary"].items()}
        section["rotary"] = config.call(Rotary, own, f"{where}.rotary")
    sizes = lookup(section.pop("variant")) if "variant" in section else {}
    if "patch" in sizes and cls is not ViT:
        raise UserError(f"{where}.variant has a patch size, but the tower has none; leave out `/{sizes['patch']}`")
    section = {**sizes, **section}
    config.check_least(1, where, **{key: section.get(key) for key in ("width", "depth", "heads", "mlp_dim", "patch")})
    return config.call(cls, section, where, dtype=dtype)


def count(params) -> int:
    """Returns the number of scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


DTYPES = {name: name for name in ("float32", "bfloat16", "float16", "float64")} | {
    "fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16",
}  # fmt: skip
TOWERS = {  # the module, and the function that looks up its variants
    "vit": (ViT, variants.lookup),
    "text": (TextTransformer, variants.lookup),
    "decoder": (Decoder, variants.lookup),
    "tokens": (TokenTable, variants.lookup),
    "unimodal": (UnimodalDecoder, variants.lookup),
    "multimodal": (MultimodalDecoder, variants.lookup),
    "token_encoder": (TokenEncoder, variants.t5),
    "token_decoder": (Decoder, variants.t5),
    "convnext": (convnext.ConvNeXt, convnext.lookup),
    "resnet": (resnet.ResNet, resnet.lookup),
    "efficientnet": (efficientnet.EfficientNetLite, efficientnet.lookup),
}
