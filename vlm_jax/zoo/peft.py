"""Low-rank updates in the files of PEFT: a folder of adapter_config.json and adapter_model.safetensors.

    vlm_jax.save_pretrained(adapted, "mine", format="peft")     # PeftModel.from_pretrained(model, "mine") there
    vlm_jax.load_adapter("theirs", base)

LoRA, with PEFT's `use_rslora`, `use_dora`, `rank_pattern` and `alpha_pattern`, on models that Transformers has. Weights
of the terms are multiplied into `lora_A`, terms that are 0 are left out.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from vlm_jax.data.files import read_json, write_json
from vlm_jax.data.tokenizers.guard import MAX_REGEX, backtracks
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo import key_map
from vlm_jax.zoo.read_back import Content, transformers_layout
from vlm_jax.zoo.readers.safetensors_files import write_safetensors
from vlm_jax.zoo.readers.tensors import open_tensors

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
# Settings that change what an adapter computes, and that are not read here, at the values that change nothing.
NEUTRAL = dict(bias="none", modules_to_save=None, layer_replication=None, lora_bias=False, target_parameters=None)
NEUTRAL |= dict(trainable_token_indices=None, alora_invocation_tokens=None, use_qalora=False, fan_in_fan_out=False)


def is_folder(path: str | os.PathLike) -> bool:
    """Returns whether a path is a folder of PEFT."""
    return (Path(path) / CONFIG).is_file()


def writer(base: Content, adapted: Pretrained) -> Callable[[Path], None]:
    """Returns the function that writes the low-rank updates of a model into an empty folder.

    Args:
      base: the model without insertions.
      adapted: the model with them.

    Raises:
      UserError: Transformers has no such model, or an insertion has no place in PEFT's LoRA.
    """
    insertions = getattr(adapted.model, "insertions", ())
    others = [type(one).__name__ for one in insertions if not isinstance(one, LowRank)]
    if others or not insertions or adapted.head is not None:
        has = ", ".join([*others, *(["a head"] if adapted.head is not None else [])]) or "no insertion"
        raise UserError(f"PEFT's format is of LowRank alone; this model has {has}")
    flags = {(one.stabilised, one.magnitude) for one in insertions}
    if len(flags) > 1:
        raise UserError("PEFT's LoRA has one `use_rslora` and one `use_dora` for all layers; the insertions differ")
    ((stabilised, magnitude),) = flags
    leaves, places = named_leaves(adapted.params), insertion.by_place(adapted.params)
    modules = _modules(base)
    if lost := places.keys() - {place for _, place, _ in modules}:
        raise UserError(f"PEFT's LoRA is of linear layers; it has no place for {key_map.listed(sorted(lost))}")
    tensors, ranks, alphas = {}, {}, {}
    for module, place, block in modules:
        if place not in places:
            continue
        of_block = lambda leaf, block=block: np.asarray(leaf if block is None else leaf[block], np.float32)
        (one,) = (one for one in insertions if re.fullmatch(one.where, place))
        new = {name: of_block(leaf) for name, leaf in places[place].items()}
        a, b = map(np.asarray, one.terms(new))
        live = np.any(a, axis=0) & np.any(b, axis=1)
        live[0] |= not live.any()  # PEFT has no rank 0
        ranks[module] = int(live.sum())
        alphas[module] = one.factor * (ranks[module] ** 0.5 if stabilised else ranks[module])
        found = [a[:, live].T, b[live].T]
        if magnitude:
            found.append(np.linalg.norm(of_block(leaves[f"{place}/kernel"]), axis=0) + new["magnitude"])
        tensors |= {f"{PREFIX}{module}.{part}": np.ascontiguousarray(x) for part, x in zip(PARTS, found, strict=False)}
    rank, alpha = (max(values.values()) for values in (ranks, alphas))
    pattern = lambda values, most: {re.escape(name): value for name, value in values.items() if value != most}
    config = dict(peft_type="LORA", task_type=None, inference_mode=True, base_model_name_or_path=None, bias="none")
    config |= dict(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=sorted(ranks), init_lora_weights=True)
    config |= dict(rank_pattern=pattern(ranks, rank), alpha_pattern=pattern(alphas, alpha))
    config |= dict(fan_in_fan_out=False, modules_to_save=None, use_rslora=stabilised, use_dora=magnitude)

    def write(folder: Path) -> None:
        write_json(folder / CONFIG, config)
        write_safetensors(folder / FILE, tensors, {"format": "pt"})

    return write


def read(folder: str | os.PathLike, base: Pretrained) -> Pretrained:
    """Returns the model with the low-rank updates of a folder of PEFT, as one `LowRank`.

    Ranks of different size are padded with zeros, which stay zeros in training.

    Raises:
      UserError: the files are damaged or of another model, or need what `LowRank` does not do.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder / CONFIG} has the peft_type {kind!r:.40}; only LORA is read")
    for key, neutral in NEUTRAL.items():
        if (config.get(key) or None) not in (neutral, None):
            raise UserError(f"{folder / CONFIG} has {key}={config[key]!r:.60}, which is not supported")
    try:
        return _with_updates(folder, config, base)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, re.error) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{folder} is no adapter of this model, or damaged ({reason})") from error


def _with_updates(folder: Path, config: Mapping[str, Any], base: Pretrained) -> Pretrained:
    leaves = named_leaves(base.params)
    tensors = {name: np.asarray(x.read(), np.float32) for name, x in open_tensors(folder / FILE).tensors.items()}
    stabilised, magnitude = bool(config.get("use_rslora")), bool(config.get("use_dora"))
    parts, alphas = PARTS if magnitude else PARTS[:2], config.get("alpha_pattern") or {}
    if any(len(key) > MAX_REGEX or backtracks(key) for key in alphas):
        raise UserError(f"{folder / CONFIG} has a regex in alpha_pattern that may run for hours")
    rank = max((x.shape[0] for name, x in tensors.items() if name.endswith(PARTS[0])), default=1)
    content = Content(base.config["model"], leaves, lambda name, index: np.asarray(leaves[name][index], np.float32))
    factor, new, taken = None, {}, set()
    for module, place, block in _modules(content):
        names = [f"{PREFIX}{module}.{part}" for part in parts]
        if names[0] not in tensors:
            continue
        taken.update(names)
        a, b = tensors[names[0]].T, tensors[names[1]].T
        kernel = np.asarray(leaves[f"{place}/kernel"])
        shape, kernel = kernel.shape[:-2], kernel if block is None else kernel[block]
        own_rank = a.shape[1]
        if (a.shape, b.shape) != ((len(kernel), own_rank), (own_rank, kernel.shape[1])):
            raise UserError(f"{folder}: {module} has factors {a.shape} and {b.shape} of a kernel {kernel.shape}")
        # the first key that matches the end of the name, as PEFT looks it up
        alpha = next((v for k, v in alphas.items() if re.match(rf"(.*\.)?({k})$", module)), config["lora_alpha"])
        own_factor = float(alpha) / (own_rank**0.5 if stabilised else own_rank)
        factor = own_factor if factor is None else factor
        found = dict(a=np.pad(a, ((0, 0), (0, rank - own_rank))), b=np.pad(b, ((0, rank - own_rank), (0, 0))))
        if own_factor != factor:
            found["b"] *= own_factor / factor
        if magnitude:
            found["magnitude"] = tensors[names[2]] - np.linalg.norm(kernel, axis=0)
        for name, x in found.items():
            whole = new.setdefault(f"{place}/inserted_{name}", np.zeros((*shape, *x.shape), np.float32))
            whole[... if block is None else block] = x
    if spare := tensors.keys() - taken:
        raise UserError(f"{folder} has tensors that no layer of this model takes: {key_map.listed(sorted(spare))}")
    if not new:
        raise UserError(f"{folder} has no low-rank update of a layer of this model")
    places = dict.fromkeys(name.rpartition("/")[0] for name in new)
    alpha = factor * (rank**0.5 if stabilised else rank)
    one = LowRank("|".join(map(re.escape, places)), rank, alpha, stabilised=stabilised, magnitude=magnitude)
    params = unflatten_dict({**leaves, **{name: jnp.asarray(x) for name, x in new.items()}}, sep="/")
    return dataclasses.replace(base, model=insertion.inserted(base.model, one), params=params)


def _modules(content: Content) -> list[tuple[str, str, int | None]]:
    """Returns (the module there, our place, the block in a scan) of each linear layer."""
    found = []
    for entry in transformers_layout(content)[2]:
        last = entry.ours.rpartition("/")[2]
        name, block = key_map.blocks_of(entry.ours, content.shapes)
        if last == "kernel" and name in content.shapes and entry.layout.order == (1, 0) and entry.part == (0, 1):
            found.append((entry.theirs.removesuffix(".weight"), name.rpartition("/")[0], block))
    return found
