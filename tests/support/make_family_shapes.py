"""Writes `tests/golden/families.json`: configs and shapes of released families, small, as saved there.

python -m tests.support.make_family_shapes

The fuzz damages these configs and files (`fuzz_families`), where neither torch nor the originals are installed.
"""

import json
import tempfile
from pathlib import Path

from tests.support.paths import GOLDEN
from tests.support.torchvision_import import prepare

prepare()

import timm  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tests.support import open_clip_families, open_clip_models, transformers_models  # noqa: E402

TRANSFORMERS = {
    "metaclip_2": transformers_models.PAIRS["metaclip_2"],
    "chinese_clip": transformers_models.PAIRS["chinese_clip"],
    "altclip": transformers_models.PAIRS["altclip"],
    "dinov3": transformers_models.IMAGES["dinov3_gated"],
    "dinov2_registers": transformers_models.IMAGES["dinov2_registers"],
    "roberta": transformers_models.TEXTS["roberta"],
    "xlm_roberta": transformers_models.TEXTS["xlm_roberta"],
    "mt5": lambda: transformers_models.T.MT5ForConditionalGeneration(
        transformers_models.T.MT5Config(**open_clip_families.MT5)
    ),
}
OPEN_CLIP = ("pe", "eva01", "eva02", "mobileclip_b", "convnext", "convnext_mlp", "resnet", "roberta", "mt5")


def shapes_of(path):
    with safe_open(path, "np") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def main():
    families = {}
    for name, make in TRANSFORMERS.items():
        with tempfile.TemporaryDirectory() as folder:
            make().save_pretrained(folder)
            config = json.loads(Path(folder, "config.json").read_text())
            families[name] = ["config.json", config, "model.safetensors", shapes_of(Path(folder, "model.safetensors"))]
    for name in OPEN_CLIP:
        with tempfile.TemporaryDirectory() as folder:
            config = open_clip_families.config_of(name)
            open_clip_models.save(open_clip_families.new(config), config, Path(folder))
            shapes = shapes_of(Path(folder, "open_clip_model.safetensors"))
            config = dict(model_cfg=config, preprocess_cfg={})
            families[f"open_clip_{name}"] = ["open_clip_config.json", config, "open_clip_model.safetensors", shapes]
    with tempfile.TemporaryDirectory() as folder:
        model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=42, embed_dim=48, depth=2)
        save_file(model.state_dict(), Path(folder, "model.safetensors"))
        shapes = shapes_of(Path(folder, "model.safetensors"))
        config = dict(architecture="vit_small_patch14_reg4_dinov2", num_classes=0, num_features=48, global_pool="token")
        families["timm"] = [
            "config.json",
            config | dict(pretrained_cfg=model.pretrained_cfg),
            "model.safetensors",
            shapes,
        ]
    lines = (f"{json.dumps(name)}: {json.dumps(family)}" for name, family in families.items())
    (GOLDEN / "families.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
