"""Image preprocessing of released weights as op strings: known families, Transformers' and open_clip's files.

Unknown settings raise, because a wrong preprocessing costs accuracy silently.
"""

import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vlm_jax.data import ops
from vlm_jax.data.ops.image import STATISTICS
from vlm_jax.errors import UserError
from vlm_jax.zoo.op_strings import Size, call, sides

log = logging.getLogger(__name__)
DROP = "alpha='drop'"  # OpenAI's and open_clip's `convert("RGB")`; Transformers composites on white
FIX = "pass preprocess='decode | ...', an op string"
METHODS = ("nearest", "lanczos", "bilinear", "bicubic", "area", "hamming")  # by PIL's number: `resample` in the files
# The op strings that another project's file can express.
EXPRESSIBLE = re.compile(r"decode( resize\w*)?( central_crop| pad)?( normalize| to_float)( pack_patches)?")

# --- known families -------------------------------------------------------------------------------------------------


def _squash(size: Size, normalize: str, decode: str = "decode", **options) -> str:
    return f"{decode} | {call('resize', *sides(size), **options)} | {normalize}"


def _crop(size: Size, normalize: str, share: float = 1.0, decode: str = "decode", **options) -> str:
    """The central `size` of a picture whose shortest side is `size / share`."""
    own = sides(size)
    larger = tuple(math.floor(side / share) for side in own)
    resize = call("resize_shortest", larger if len(own) == 2 else larger[0], **options)
    return f"{decode} | {resize} | {call('central_crop', *own)} | {normalize}"


# Family of weights -> their publisher's preprocessing, for a tower of a given size.
FAMILIES: dict[str, Callable[[Size], str]] = {
    "openai": lambda size: _crop(size, "normalize('clip')", decode=f"decode({DROP})"),
    "laion_half": lambda size: _crop(size, "normalize", decode=f"decode({DROP})"),  # LAION-2B L/14
    "siglip": lambda size: _squash(size, "normalize"),  # as Transformers and open_clip ship it
    "big_vision": lambda size: _squash(size, "normalize", method="bilinear", antialias=False),  # SigLIP (2), LiT
    "clipa": lambda size: _squash(size, "normalize('imagenet')", f"decode({DROP})", method="bilinear"),
    "mobileclip": lambda size: _crop(size, "to_float", decode=f"decode({DROP})", method="bilinear"),
    "pe": lambda size: _squash(size, "normalize", f"decode({DROP})", method="bilinear"),  # Perception Encoder
    "dinov2": lambda size: _crop(size, "normalize('imagenet')", 0.875),
    "imagenet": lambda size: _crop(size, "normalize('imagenet')", 0.875, method="bilinear"),  # torchvision classifiers
    "efficientnet_lite": lambda size: _crop(size, "normalize('efficientnet_lite')", 0.875),
}


def _normalize(mean: Any, std: Any) -> str:
    """The op that subtracts `mean` and divides by `std`, in units of [0, 1]: by name if they have one."""
    try:
        mean, std = (np.broadcast_to(np.asarray(v, float), 3) for v in (mean, std))
    except (ValueError, TypeError):
        raise UserError(f"mean {mean!r} and std {std!r} are not numbers for three channels; {FIX}") from None
    close = lambda a, b: np.allclose(mean, a, rtol=0, atol=1e-7) and np.allclose(std, b, rtol=0, atol=1e-7)
    if close(0, 1):
        return "to_float"
    if close(0.5, 0.5):
        return "normalize"
    name = next((name for name, values in STATISTICS.items() if close(*values)), None)
    return call("normalize", *((name,) if name else (tuple(mean.tolist()), tuple(std.tolist()))))


# --- Transformers ---------------------------------------------------------------------------------------------------


def _defaults(size: Any, resample: int, statistics: Any = (0.5, 0.5), crop: bool = False, **more) -> dict[str, Any]:
    switches = dict(do_resize=True, do_center_crop=crop, do_rescale=True, do_normalize=True, default_to_square=True)
    numbers = dict(size=size, resample=resample, crop_size=224, rescale_factor=1 / 255)
    return switches | numbers | dict(image_mean=statistics[0], image_std=statistics[1]) | more


# Defaults of each class, for settings that the file leaves out.
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": _defaults({"shortest_edge": 224}, 3, STATISTICS["clip"], crop=True, default_to_square=False),
    "Bit": _defaults({"shortest_edge": 224}, 3, STATISTICS["clip"], crop=True, default_to_square=False),  # DINOv2
    "Siglip": _defaults({"height": 224, "width": 224}, 3, default_to_square=False),
    "ViT": _defaults({"height": 224, "width": 224}, 2),
    "Siglip2": _defaults(None, 2, patch_size=16, max_num_patches=256),
}
MODEL_TYPES = {"clip": "CLIP", "dinov2": "Bit", "siglip": "Siglip", "siglip2": "Siglip2", "vit": "ViT"}
# Without effect here: pictures are always RGB, arrays [H, W, C].
IGNORED = {
    "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format", "device",
    "input_data_format", "return_tensors", "disable_grouping", "_valid_processor_keys", "auto_map", "image_seq_length",
}  # fmt: skip


def from_transformers(folder: str | Path) -> str:
    """Returns the op string of the `preprocessor_config.json` (or `processor_config.json`) in `folder`.

    Pixels equal those of Transformers' PIL classes; the torchvision classes differ by a level or two, from rounding.

    Raises:
      UserError: there is no such file, or a setting is unknown.
    """
    path, stated = _read(Path(folder))
    kind = _kind(path, stated)
    stated = {key: value for key, value in stated.items() if value is not None}
    for key, value in stated.items():
        if key not in PROCESSORS[kind] and key not in IGNORED and value is not False:
            raise UserError(f"{path} has {key} {value!r}, which is not known here; {FIX}")
    settings = PROCESSORS[kind] | stated
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{path} multiplies pixels by {factor} (rescale_factor); expected 1/255: {FIX}")
    normalize = _normalize(settings["image_mean"], settings["image_std"]) if settings["do_normalize"] else "to_float"
    if settings["resample"] not in range(len(METHODS)):
        raise UserError(f"{path} has resample {settings['resample']!r}; expected PIL's number, 0 to 5: {FIX}")
    method = METHODS[settings["resample"]]
    steps = ["decode"]
    if kind == "Siglip2":
        budget = settings["patch_size"], settings["max_num_patches"]
        steps += [call("resize_to_patches", *budget, method=method), normalize, call("pack_patches", *budget)]
        if not settings["do_resize"]:
            raise UserError(f"{path} has do_resize False; packed patches need it: {FIX}")
        return _parsed(steps, path)
    size = settings["size"]
    if isinstance(size, int) and not settings["default_to_square"]:
        size = {"shortest_edge": size}
    shortest = isinstance(size, dict) and {k for k, v in size.items() if v is not None} == {"shortest_edge"}
    if settings["do_resize"] and shortest:
        steps.append(call("resize_shortest", size["shortest_edge"], method=method))
    elif settings["do_resize"]:
        steps.append(call("resize", *_height_and_width(size, "size", path), method=method))
    if settings["do_center_crop"]:
        window = _height_and_width(settings["crop_size"], "crop_size", path)
        steps.append(call("central_crop", *window, rounding="down"))
    elif shortest or not settings["do_resize"]:
        raise UserError(f"{path} leaves pictures of different sizes (no crop); {FIX}")
    return _parsed([*steps, normalize], path)


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    own, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    found = {path: _json(path) for path in (own, nested) if path.is_file()}
    if "image_processor" in found.get(nested, {}):  # Transformers reads it over the other file
        found = {nested: found[nested]}
    for path, settings in found.items():
        settings = settings.get("image_processor", settings)
        if not isinstance(settings, dict):
            raise UserError(f"{path} does not hold the settings of an image processor; {FIX}")
        return path, settings
    raise UserError(f"{folder} has no preprocessor_config.json, which says how pictures are prepared; {FIX}")


def _json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} does not hold the settings of an image processor; {FIX}")
    return settings


def _kind(path: Path, settings: dict[str, Any]) -> str:
    """Returns the class without suffixes of variants; defaults to the class of the model."""
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    kind = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", str(name))
    config = path.parent / "config.json"
    if name is None and config.is_file():
        kind = MODEL_TYPES.get(json.loads(config.read_text()).get("model_type"))
    if kind not in PROCESSORS:
        known = ", ".join(f"{known}ImageProcessor" for known in PROCESSORS)
        raise UserError(f"{path} is of class {name}; known are {known}: {FIX}")
    return kind


def _height_and_width(size: Any, key: str, path: Path) -> tuple[int, ...]:
    if isinstance(size, int):
        return (size,)
    if not isinstance(size, dict) or {k for k, v in size.items() if v is not None} != {"height", "width"}:
        raise UserError(f"{path} has {key} {size!r}; expected a number, shortest_edge, or height and width: {FIX}")
    return sides((size["height"], size["width"]))


def _parsed(steps: list[str], path: Path) -> str:
    try:
        return ops.parse(" | ".join(steps)).string
    except UserError as error:
        raise UserError(f"{path} holds a wrong value: {error}") from None


def to_transformers(string: str) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of an op string.

    Transformers rounds odd margins of a central crop down, so the crop may lie a pixel aside of torchvision's.

    Raises:
      UserError: Transformers has no equivalent of an op.
    """
    steps, mean, std = _steps(string, "Transformers")
    refuse = lambda name: _refuse(string, name, "Transformers")
    settings = dict(do_convert_rgb=True, do_rescale=True, rescale_factor=1 / 255)
    settings |= dict(do_normalize="to_float" not in steps, image_mean=mean, image_std=std)
    resize = next((name for name in steps if name.startswith("resize")), None)
    options = steps.get(resize, {})
    if resize == "resize_longest" or "pad" in steps or isinstance(options.get("size"), tuple):
        refuse("pad" if "pad" in steps else resize)
    if not options.get("antialias", True):
        refuse("resize(antialias=False)")
    settings |= dict(do_resize=bool(resize)) | ({"resample": METHODS.index(options["method"])} if resize else {})
    if resize == "resize_to_patches" or "pack_patches" in steps:
        budget = {key: options.get(key) for key in ("patch", "max_patches")}
        if budget != steps.get("pack_patches") or "central_crop" in steps:
            refuse("pack_patches")
        budget = dict(patch_size=budget["patch"], max_num_patches=budget["max_patches"])
        return dict(image_processor_type="Siglip2ImageProcessor") | settings | budget
    crop = steps.get("central_crop")
    name = "SiglipImageProcessor" if resize == "resize" and not crop else "CLIPImageProcessor"
    settings = dict(image_processor_type=name) | settings | dict(do_center_crop=bool(crop))
    if resize:
        settings["size"] = {"shortest_edge": options["size"]} if "size" in options else _height_width(options)
    if crop:
        settings["crop_size"] = _height_width(crop)
        _warn_of_rounding(crop, "down", "Transformers")
    return settings


def _height_width(options: dict[str, Any]) -> dict[str, int]:
    height, width = options["height"], options["width"]
    return {"height": height, "width": height if width is None else width}


def _steps(string: str, project: str) -> tuple[dict[str, dict[str, Any]], list[float], list[float]]:
    """Returns (arguments of each op, mean, std) of an op string that matches EXPRESSIBLE."""
    pipeline = ops.parse(string)
    steps = {}
    for step in (*pipeline.before, *pipeline.after):
        if not re.fullmatch(r"decode|resize\w*|central_crop|pad|normalize|to_float|pack_patches", step.name):
            _refuse(string, step.name, project)
        own = [p for p in inspect.signature(step.function).parameters.values() if p.name != "image"]
        steps[step.name] = {p.name: step.kwargs.get(p.name, p.default) for p in own}
    if not EXPRESSIBLE.fullmatch(" ".join(steps)) or len(steps) != len(pipeline.before) + len(pipeline.after):
        _refuse(string, "the order of the ops", project)
    if steps["decode"]["background"] != 255:
        _refuse(string, "decode(background=...)", project)
    theirs = "drop" if project == "open_clip" else "composite"
    if steps["decode"]["alpha"] != theirs:
        what = {"drop": "drops alpha", "composite": "composites on white"}[theirs]
        log.warning("decode: %s %s, so transparent pictures come out different", project, what)
    given = steps.get("normalize", dict(mean=0.0, std=1.0))
    mean, std = STATISTICS.get(given["mean"], (given["mean"], 0.5))
    mean, std = (np.broadcast_to(v, 3).tolist() for v in (mean, std if given["std"] is None else given["std"]))
    return steps, mean, std


def _refuse(string: str, name: str, project: str) -> NoReturn:
    raise UserError(
        f"preprocess `{string}`: {name} has no equivalent in {project}; pass preprocess= with the nearest that has: "
        "decode | resize or resize_shortest | central_crop or pad | normalize or to_float"
    )


def _warn_of_rounding(crop: dict[str, Any], theirs: str, project: str) -> None:
    if crop["rounding"] != theirs:
        log.warning("central_crop: %s rounds odd margins %s; its crop may lie one pixel aside", project, theirs)


# --- open_clip ------------------------------------------------------------------------------------------------------

OPEN_CLIP = dict(
    size=224, mode="RGB", mean=STATISTICS["clip"][0], std=STATISTICS["clip"][1],
    interpolation="bicubic", resize_mode="shortest", fill_color=0,
)  # fmt: skip
OPEN_CLIP_VALUES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}


def from_open_clip(preprocess_cfg: Mapping[str, Any], size: Size | None = None) -> str:
    """Returns the op string of an open_clip `preprocess_cfg` (in `open_clip_config.json`).

    Args:
      preprocess_cfg: the settings; absent keys default to open_clip's values.
      size: the image tower's, which overrides the file's, as in open_clip; None keeps the file's.

    Raises:
      UserError: a key or a value is unknown.
    """
    given = {key: value for key, value in preprocess_cfg.items() if value is not None}
    settings = OPEN_CLIP | given | ({} if size is None else {"size": size})
    for key, value in settings.items():
        if key not in OPEN_CLIP:
            raise UserError(f"preprocess_cfg has the key `{key}`; known are {', '.join(OPEN_CLIP)}: {FIX}")
        if value not in OPEN_CLIP_VALUES.get(key, (value,)):
            raise UserError(f"preprocess_cfg has {key} {value!r}; expected {' or '.join(OPEN_CLIP_VALUES[key])}: {FIX}")
    normalize = _normalize(settings["mean"], settings["std"])
    method = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
    own, dropped = sides(settings["size"]), f"decode({DROP})"
    if settings["resize_mode"] == "squash":
        return _squash(own, normalize, dropped, method=method)
    if settings["resize_mode"] == "shortest":  # open_clip forgets the method where the size is not square
        return _crop(own, normalize, decode=dropped, method=method if len(own) == 1 else "bicubic")
    resize = call("resize_longest", own if len(own) == 2 else own[0], method=method)
    return f"{dropped} | {resize} | {call('pad', *own, value=settings['fill_color'])} | {normalize}"


def from_timm(cfg: Mapping[str, Any]) -> str:
    """Returns the op string of timm's evaluation transform, by a `pretrained_cfg` (in `config.json`).

    Raises:
      UserError: a setting is missing or unknown.
    """
    size, method = cfg.get("input_size"), cfg.get("interpolation", "bicubic")
    share, mode = cfg.get("crop_pct", 0.875), cfg.get("crop_mode", "center")
    if not isinstance(size, list) or len(size) != 3 or size[0] != 3 or not all(isinstance(n, int) for n in size):
        raise UserError(f"pretrained_cfg has input_size {size!r:.60}; expected [3, height, width]: {FIX}")
    if method not in ("bicubic", "bilinear"):
        raise UserError(f"pretrained_cfg has interpolation {method!r:.40}; expected bicubic or bilinear: {FIX}")
    if (
        not isinstance(share, int | float)
        or not 0 < share <= 1
        or (mode, share) not in (("squash", 1), ("center", share))
    ):
        raise UserError(f"pretrained_cfg has crop_mode {mode!r:.40}, crop_pct {share!r:.20}, which is not known: {FIX}")
    normalize = _normalize(cfg.get("mean", (0.5,) * 3), cfg.get("std", (0.5,) * 3))
    if mode == "squash":
        return _squash(tuple(size[1:]), normalize, f"decode({DROP})", method=method)
    return _crop(tuple(size[1:]), normalize, share, f"decode({DROP})", method=method)


def to_open_clip(string: str) -> dict[str, Any]:
    """Returns the `preprocess_cfg` of an op string.

    Raises:
      UserError: open_clip has no equivalent of an op.
    """
    steps, mean, std = _steps(string, "open_clip")
    refuse = lambda name: _refuse(string, name, "open_clip")
    names = tuple(name for name in steps if name not in ("decode", "normalize", "to_float"))
    modes = {
        ("resize",): "squash",
        ("resize_shortest", "central_crop"): "shortest",
        ("resize_longest", "pad"): "longest",
    }
    if names not in modes:
        refuse(" | ".join(names) or "no resizing")
    options, window = steps[names[0]], _height_width(steps[names[-1]])
    size = (window["height"], window["width"])
    shortest = names[0] == "resize_shortest" and len(sides(size)) == 2
    if options["method"] not in ("bicubic", "bilinear") or (shortest and options["method"] != "bicubic"):
        refuse(f"{names[0]}(method={options['method']!r})")
    if not options.get("antialias", True):
        refuse("resize(antialias=False)")
    if "size" in options and tuple(np.broadcast_to(options["size"], 2)) != size:
        refuse(f"{names[0]} to another size than that of {names[1]}")
    if "central_crop" in steps:
        _warn_of_rounding(steps["central_crop"], "even", "open_clip")
    fill = steps["pad"]["value"] if "pad" in steps else 0
    size = size if len(sides(size)) == 2 else size[0]
    values = dict(interpolation=options["method"], resize_mode=modes[names], fill_color=fill)
    return dict(size=size, mode="RGB", mean=mean, std=std) | values
