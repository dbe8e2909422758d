"""Checkpoints in the layout of Hugging Face Transformers: config.json and safetensors (or a .bin) in a folder.

Pairs of towers (CLIP, SigLIP, MetaCLIP 2, ...: `PAIRS`), lone towers (`transformers_vision`, `transformers_texts`), and
T5 (see `t5`).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_jax.config import choose
from vlm_jax.data.files import inside, read_json, write_json
from vlm_jax.errors import UserError
from vlm_jax.zoo import families
from vlm_jax.zoo.formats import t5
from vlm_jax.zoo.formats.settings import check
from vlm_jax.zoo.formats.transformers_texts import TEXTS
from vlm_jax.zoo.formats.transformers_towers import COMMON, read_config, rows_of, write_config
from vlm_jax.zoo.formats.transformers_vision import VISION
from vlm_jax.zoo.key_map import Entry, expand

IGNORED = ("*position_ids", "*embeddings.mask_token", "cls.*", "lm_head.*")  # buffers, and heads of pretraining
DUAL = "vision-text-dual-encoder"
CLIPS = ("clip", "metaclip_2", "chinese_clip", "altclip")  # their classes read configs, and heads, alike
PAIRS = {
    "clip": ("clip_vision_model", "clip_text_model"),
    "siglip": ("siglip_vision_model", "siglip_text_model"),
    "siglip2": ("siglip2_vision_model", "siglip2_text_model"),
    "metaclip_2": ("metaclip_2_vision_model", "metaclip_2_text_model"),
    "chinese_clip": ("chinese_clip_vision_model", "chinese_clip_text_model"),
    "altclip": ("altclip_vision_model", "altclip_text_model"),
    DUAL: (None, None),  # named by the towers' own configs
}
SCALE = (("logit_scale", "logit_scale", "same"),)
SIGLIP_SCALES = (("logit_scale", "logit_scale", "one"), ("logit_bias", "logit_bias", "one"))
# Further settings of a pair that are read here, or that its class ignores.
OWN = {kind: {"vision_config", "text_config"} for kind in PAIRS}
OWN |= {kind: OWN[kind] | {"vision_config_dict", "text_config_dict"} for kind in (*CLIPS, "siglip", "siglip2")}
UNUSED = dict.fromkeys(("siglip_vision_model", "siglip2_vision_model"), ("head",))  # by `...ForImageClassification`
UNUSED |= {f"{kind}_vision_model": ("post_layernorm",) for kind in CLIPS}
HEADS = {"image": ("visual_projection", "classifier"), "text": ("text_projection",)}  # outside of the towers' prefixes
PREFIXES = {
    "image": ("vision_model.vision_model.", "vision_model.", "vit.", "dinov2.", "dinov2_with_registers.", ""),
    "text": ("text_model.text_model.", "text_model.", "bert.", "roberta.", ""),
}
BEGIN = ("embeddings.", "roberta.embeddings.")  # names below a prefix, the second in AltCLIP


def describe(config: Mapping[str, Any], shapes: Mapping[str, tuple], pooling: str | None = None):
    """Returns the model of a config.json and its tensors.

    Args:
      config: the config.json.
      shapes: tensor name -> shape.
      pooling: the pool that sentence-transformers' files ask for (its `1_Pooling/config.json`), or None.

    Returns:
      (config section of our model, entries of its key table, patterns of tensors that are left out)

    Raises:
      UserError: the model type or a setting is unknown.
    """
    kind = config.get("model_type")
    if kind in t5.MODEL_TYPES:
        return t5.describe(config, shapes)
    pair = kind in PAIRS
    if not pair and kind not in VISION and kind not in TEXTS:
        known = [*PAIRS, *VISION, *TEXTS, *t5.MODEL_TYPES]
        nearest = families.nearest_type(str(kind), known)
        raise UserError(
            f"config.json has the model_type `{kind!s:.60}`; known are: {', '.join(known)}; the nearest is `{nearest}`"
        )
    if pair:
        check(config, OWN[kind], COMMON, "config.json")
    section, entries, ignored = {"name": "two_tower", "image": None, "text": None}, [], list(IGNORED)
    for side, types, own in (("image", VISION, "vision_config"), ("text", TEXTS, "text_config")):
        part = dict(config.get(own) or {}) if pair else dict(config)
        type_name = (PAIRS[kind][side == "text"] or part.get("model_type")) if pair else kind
        prefix = _prefix(shapes, side, type_name)
        if not pair and kind not in types:
            continue
        if pair and not prefix:
            continue  # the file holds only the other tower
        tower = choose(types, type_name, f"the model_type of config.json's {own}" if pair else "model_type")
        if kind in CLIPS and config.get(f"{own}_dict"):  # overrides `own`, its class's defaults included
            part |= tower.defaults | config[f"{own}_dict"]
        names = {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
        if type_name == "chinese_clip_text_model" and pair:  # the pair's text tower has no pooler
            names -= {"pooler.dense.weight"}
            ignored.append(f"{prefix}pooler.*")
        fields = read_config(tower, part, names)
        if fields["depth"] > len(shapes):
            raise UserError(f"config.json has num_hidden_layers {fields['depth']}, the file {len(shapes)} tensors")
        head = next((name for name in HEADS[side] if f"{name}.weight" in shapes), None)
        if pair and not head and config.get("projection_dim"):
            head = HEADS[side][0]  # missing; `key_map.match` raises
        if head:
            width = shapes.get(f"{head}.weight", (config.get("projection_dim"),))[0]
            fields |= {"out_dim": width, "head_bias": head == "classifier"}
            if head == "classifier":
                fields |= _classifier_pool(type_name)
                ignored += [f"{prefix}{name}.*" for name in UNUSED.get(type_name, ())]
        if side == "text" and pooling:
            fields["pool"] = pooling
            fields.pop("rep_dim", None)
            ignored.append(f"{prefix}pooler.*")
        section[side] = fields
        entries += _as_stored(_tower_entries(side, tower, fields, prefix, head), prefix, shapes)
    if not section["image"] and not section["text"]:
        raise UserError(f"no tensor has the names of a {kind} tower; expected e.g. vision_model.embeddings...")
    if pair and section["image"] and section["text"]:
        entries += expand(SIGLIP_SCALES if "siglip" in kind else SCALE)
        section["bias_init"] = -10.0 if "siglip" in kind else None
    return section, entries, ignored


def _prefix(names: Iterable[str], side: str, type_name: str | None) -> str:
    """Returns the prefix of a tower's tensors; "" also if there are none."""
    found = (p for p in PREFIXES[side] if any(n.startswith(tuple(p + name for name in BEGIN)) for n in names))
    prefix = next(found, "")
    return "" if prefix == "roberta." and type_name == "altclip_text_model" else prefix


def _as_stored(entries: list[Entry], prefix: str, names: Iterable[str]) -> list[Entry]:
    """Renames blocks as the file has them: Transformers 5 writes some models with another name of its list."""
    stored = {found[1] for name in names if (found := re.match(rf"{re.escape(prefix)}(.*?layers?\.)0\.", name))}
    if len(stored) != 1:
        return entries
    own = re.compile(rf"{re.escape(prefix)}(.*?layers?\.)(\d+\.)")
    rename = lambda name: own.sub(lambda found: prefix + next(iter(stored)) + found[2], name, count=1)
    return [entry._replace(theirs=rename(entry.theirs)) for entry in entries]


def _classifier_pool(type_name: str) -> dict[str, Any]:
    """Returns the fields of `...ForImageClassification` that differ from the tower's own."""
    if type_name.startswith("siglip"):
        return {"pool": "gap"}
    if type_name in UNUSED:  # a CLIP: the patches before the last norm, which is unused
        return {"pool": "patches", "cls": True, "final_norm": "none"}
    if type_name == "vit":
        return {}
    raise UserError(
        "this classifier reads the cls token beside the mean of the patches, which no pool here does: "
        "load the tower without its `classifier`"
    )


# --- writing --------------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "clip": "CLIPModel",
    "metaclip_2": "MetaClip2Model",
    "chinese_clip": "ChineseCLIPModel",
    "altclip": "AltCLIPModel",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "vision-text-dual-encoder": "VisionTextDualEncoderModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "clip_text_model": "CLIPTextModelWithProjection",
    "metaclip_2_vision_model": "MetaClip2VisionModelWithProjection",
    "metaclip_2_text_model": "MetaClip2TextModelWithProjection",
    "chinese_clip_vision_model": "ChineseCLIPVisionModel",
    "chinese_clip_text_model": "ChineseCLIPTextModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "siglip2_text_model": "Siglip2TextModel",
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
}


ALONE_NOWHERE = ("altclip_text_model", "altclip_vision_model")  # names of their files differ from the pair's


def outlines(image: Mapping[str, Any] | None, text: Mapping[str, Any] | None) -> Iterator[tuple[dict, list]]:
    """Yields configs and key tables that might write a model; the caller keeps one that reads back equal.

    Args:
      image: all fields of the image tower, or None.
      text: all fields of the text tower, or None.

    Yields:
      (config.json, entries of the key table)
    """
    if image and text:
        for kind, (vision_type, text_type) in PAIRS.items():
            for vision in [vision_type] if vision_type else VISION:
                for texts in [text_type] if text_type else TEXTS:
                    if kind == DUAL and not _has_poolers(vision, image, text):
                        continue
                    yield _outline_pair(kind, vision, texts, image, text)
        return
    side, fields, types = ("image", image, VISION) if image else ("text", text, TEXTS)
    for kind, tower in types.items():
        if kind in ALONE_NOWHERE:
            continue
        config = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], **write_config(tower, fields)}
        prefix, head = "", None
        if kind.startswith(("clip", "siglip", "metaclip_2")):
            prefix = "vision_model." if side == "image" else "text_model."
            head = None if kind.startswith("siglip") else HEADS[side][0]
            if head and not fields.get("out_dim"):
                head, config["architectures"] = None, [ARCHITECTURES[kind].removesuffix("WithProjection")]
            config |= {"projection_dim": fields["out_dim"]} if fields.get("out_dim") else {}
        elif kind == "vit" and fields.get("out_dim"):
            prefix, head, config["architectures"] = "vit.", "classifier", ["ViTForImageClassification"]
            config["num_labels"] = fields["out_dim"]
        yield config, _tower_entries(side, tower, fields, prefix, head)


def _has_poolers(vision, image, text):
    """Whether towers have the dense poolers that `VisionTextDualEncoderModel` always has."""
    return all(
        fields.get("rep_dim") for fields, pooled in ((image, vision == "vit"), (text, text["post_norm"])) if pooled
    )


def _outline_pair(kind, vision, texts, image, text):
    config = {"model_type": kind, "architectures": [ARCHITECTURES[kind]]}
    config["vision_config"] = {"model_type": vision, **write_config(VISION[vision], image)}
    config["text_config"] = {"model_type": texts, **write_config(TEXTS[texts], text)}
    heads = (None, None) if "siglip" in kind else (HEADS["image"][0], HEADS["text"][0])
    if heads[0]:
        config["projection_dim"] = text.get("out_dim")
    entries = _tower_entries("image", VISION[vision], image, "vision_model.", heads[0])
    entries += _tower_entries("text", TEXTS[texts], text, "text_model.", heads[1])
    return config, entries + expand(SIGLIP_SCALES if "siglip" in kind else SCALE)


def _tower_entries(side, tower, fields, prefix, head):
    """Returns the entries of a tower below `prefix`, and of its projection, the tensor `head` (or None)."""
    sizes = dict(depth=fields["depth"], heads=fields["heads"], patch=fields.get("patch", 1))
    entries = expand(rows_of(tower, fields), f"{side}/", prefix, **sizes)
    return entries + (expand([("head", head, "dense")], f"{side}/") if head else [])


def sentence_pooling(folder: Path) -> str | None:
    """Returns the pool of sentence-transformers' modules; None without a modules.json."""
    if not (folder / "modules.json").is_file():
        return None
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        where = next(module["path"] for module in modules if module["type"].endswith("Pooling"))
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise UserError(f"{folder / 'modules.json'} is not a list of sentence-transformers' modules") from error
    if set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(f"{folder} has the modules {', '.join(kinds)}; supported are Transformer, Pooling, Normalize")
    pooling = read_json(inside(folder, where) / "config.json")
    modes = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
    pools = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_max_tokens": "max"}
    by_name = {"mean": "mean", "cls": "first", "max": "max"}
    if pooling.get("pooling_mode") in by_name:
        return by_name[pooling["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in pools:
        raise UserError(f"{folder / where} pools by {', '.join(modes) or 'nothing'}; supported are {', '.join(pools)}")
    return pools[modes[0]]


def is_sentence_model(section: Mapping[str, Any]) -> bool:
    """Whether a BERT pools as in sentence-transformers; Transformers' own pool is dense, on the first token."""
    text = section["text"]
    return bool(text and not section["image"] and text["post_norm"] and not text["rep_dim"])


def write_sentence_modules(folder: Path, pool: str, width: int) -> None:
    """Writes the files of sentence-transformers beside a BERT: how it pools, and that embeddings have norm 1."""
    kinds = {"0": ("", "Transformer"), "1": ("1_Pooling", "Pooling"), "2": ("2_Normalize", "Normalize")}
    modules = [
        dict(idx=int(i), name=i, path=path, type=f"sentence_transformers.models.{kind}")
        for i, (path, kind) in kinds.items()
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2))
    (folder / "1_Pooling").mkdir()
    mode = {"mean": "mean_tokens", "first": "cls_token", "max": "max_tokens"}[pool]
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, f"pooling_mode_{mode}": True})
