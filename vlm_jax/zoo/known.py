"""The released models that `vlm_jax.load` reads, by project and family, with the test that each agrees in.

This module imports nothing heavy. tests/zoo/test_known.py and the parity suite hold it against the readers.
"""

from typing import NamedTuple

from vlm_jax.errors import UserError, near


class Known(NamedTuple):
    """A family of released models.

    Attributes:
      project: whose files they are: "transformers", "open_clip", "openai", "big_vision", ...
      family: name of the family.
      variants: the project's names: classes, configs, sizes.
      parity: what agrees with the project's own model.
      test: path of the test.
      write: the `--format` that writes the family, or "".
    """

    project: str
    family: str
    variants: tuple[str, ...]
    parity: str
    test: str
    write: str = ""


ALL = "embeddings, tokens, logits, gradients: 1e-5"
TOWER = "tokens, pooled outputs: 1e-5"
SHAPES = "embeddings, logits, gradients: 1e-5, small; every tensor of every config has its place"
GOLDEN = "stored outputs of the project's code: 1e-5"
PARITY, STORED = "tests/parity/test_", "tests/zoo/formats/test_"
CLIP_HF = (
    "CLIPModel",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
)


def _hf(family: str, variants: str, parity: str = ALL, write: str = "hf", test: str = "transformers") -> Known:
    return Known("transformers", family, tuple(variants.split()), parity, f"{PARITY}{test}.py", write)


def _clip(family: str, variants: str, write: str = "open_clip", test: str = "open_clip_families") -> Known:
    return Known("open_clip", family, tuple(variants.split()), SHAPES, f"{PARITY}{test}.py", write)


MODELS = (
    _hf("CLIP", " ".join(CLIP_HF)),
    _hf("CLIP, classifier", "CLIPForImageClassification", TOWER, ""),
    _hf("MetaCLIP 2", "MetaClip2Model MetaClip2VisionModel MetaClip2VisionModelWithProjection MetaClip2TextModel "
        "MetaClip2TextModelWithProjection"),
    _hf("ChineseCLIP", "ChineseCLIPModel ChineseCLIPVisionModel ChineseCLIPTextModel"),
    _hf("AltCLIP", "AltCLIPModel AltCLIPVisionModel AltCLIPTextModel"),
    _hf("SigLIP", "SiglipModel SiglipVisionModel SiglipTextModel"),
    _hf("SigLIP, classifier", "SiglipForImageClassification", TOWER, ""),
    _hf("SigLIP 2", "Siglip2Model Siglip2VisionModel Siglip2TextModel"),
    _hf("two towers", "VisionTextDualEncoderModel"),
    _hf("ViT", "ViTModel ViTForImageClassification", TOWER),
    _hf("DINOv2", "Dinov2Model Dinov2WithRegistersModel", TOWER),
    _hf("DINOv3", "DINOv3ViTModel", TOWER),
    _hf("BERT", "BertModel", TOWER),
    _hf("RoBERTa", "RobertaModel CamembertModel XLMRobertaModel", TOWER),
    _hf("sentence-transformers", "BERT RoBERTa XLM-R", "embeddings of MiniLM: 1e-5", test="released"),
    _hf("T5, mT5, UL2", "T5ForConditionalGeneration MT5ForConditionalGeneration",
        "logits, gradients: 1e-5; texts by greedy and beam search", test="t5"),
    _clip("ViT", """
        ViT-S-16 ViT-S-16-alt ViT-S-32 ViT-S-32-alt ViT-M-16 ViT-M-16-alt ViT-M-32 ViT-M-32-alt ViT-B-16
        ViT-B-16-plus ViT-B-16-plus-240 ViT-B-16-quickgelu ViT-B-32 ViT-B-32-256 ViT-B-32-plus-256 ViT-B-32-quickgelu
        ViT-L-14 ViT-L-14-280 ViT-L-14-336 ViT-L-14-336-quickgelu ViT-L-14-quickgelu ViT-L-14-worldwide
        ViT-L-14-worldwide-quickgelu ViT-L-16 ViT-L-16-320 ViT-H-14 ViT-H-14-378 ViT-H-14-378-quickgelu
        ViT-H-14-quickgelu ViT-H-14-worldwide ViT-H-14-worldwide-378 ViT-H-14-worldwide-quickgelu ViT-H-16 ViT-e-14
        ViT-g-14 ViT-bigG-14 ViT-bigG-14-quickgelu ViT-bigG-14-worldwide ViT-bigG-14-worldwide-378
        vit_medium_patch16_gap_256 MobileCLIP2-L-14""", test="open_clip"),
    _clip("CLIPA", """
        ViT-L-14-CLIPA ViT-L-14-CLIPA-336 ViT-H-14-CLIPA ViT-H-14-CLIPA-336 ViT-bigG-14-CLIPA ViT-bigG-14-CLIPA-336""",
        test="open_clip"),
    _clip("SigLIP", """
        ViT-B-16-SigLIP ViT-B-16-SigLIP-256 ViT-B-16-SigLIP-384 ViT-B-16-SigLIP-512 ViT-B-16-SigLIP-i18n-256
        ViT-L-16-SigLIP-256 ViT-L-16-SigLIP-384 ViT-SO400M-14-SigLIP ViT-SO400M-14-SigLIP-378 ViT-SO400M-14-SigLIP-384
        ViT-SO400M-16-SigLIP-i18n-256""", test="open_clip"),
    _clip("SigLIP 2", """
        ViT-B-16-SigLIP2 ViT-B-16-SigLIP2-256 ViT-B-16-SigLIP2-384 ViT-B-16-SigLIP2-512 ViT-B-32-SigLIP2-256
        ViT-L-16-SigLIP2-256 ViT-L-16-SigLIP2-384 ViT-L-16-SigLIP2-512 ViT-SO400M-14-SigLIP2 ViT-SO400M-14-SigLIP2-378
        ViT-SO400M-16-SigLIP2-256 ViT-SO400M-16-SigLIP2-384 ViT-SO400M-16-SigLIP2-512 ViT-gopt-16-SigLIP2-256
        ViT-gopt-16-SigLIP2-384""", test="open_clip"),
    _clip("PE-Core", "PE-Core-T-16-384 PE-Core-S-16-384 PE-Core-B-16 PE-Core-L-14-336 PE-Core-bigG-14-448"),
    _clip("EVA-CLIP", """
        EVA01-g-14 EVA01-g-14-plus EVA02-B-16 EVA02-L-14 EVA02-L-14-336 EVA02-E-14 EVA02-E-14-plus"""),
    _clip("ConvNeXt", """
        convnext_tiny convnext_small convnext_base convnext_base_w convnext_base_w_320 convnext_large convnext_large_d
        convnext_large_d_320 convnext_xlarge convnext_xxlarge convnext_xxlarge_320"""),
    _clip("ResNet", """
        RN50 RN50-quickgelu RN101 RN101-quickgelu RN50x4 RN50x4-quickgelu RN50x16 RN50x16-quickgelu RN50x64
        RN50x64-quickgelu"""),
    _clip("MobileCLIP-B", "MobileCLIP-B MobileCLIP2-B"),
    _clip("texts by RoBERTa, XLM-R, mT5", """
        roberta-ViT-B-32 xlm-roberta-base-ViT-B-32 xlm-roberta-large-ViT-H-14 mt5-base-ViT-B-32 mt5-xl-ViT-H-14"""),
    _clip("CoCa", "coca_ViT-B-32 coca_ViT-L-14", "", "open_clip"),
    Known("openai", "CLIP", ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "RN50", "RN101", "RN50x4", "RN50x16",
          "RN50x64"), GOLDEN, f"{STORED}references.py", "open_clip"),
    Known("big_vision", "SigLIP, SigLIP 2, LiT", ("webli_en_*", "webli_i18n_*", "siglip2_*", "LiT-*"), GOLDEN,
          f"{STORED}big_vision.py", "big_vision"),
    Known("big_vision", "Cap, CapPa", ("cap_*", "cappa_*"), GOLDEN, f"{STORED}big_vision.py", "big_vision"),
    Known("big_vision", "ViT", ("ViT of any size",), GOLDEN, f"{STORED}big_vision.py", "big_vision"),
    Known("t5x", "T5 v1.1, UL2, Flan-UL2", ("small", "base", "large", "xl", "xxl", "20b"), GOLDEN,
          "tests/pretrained/test_pretrained_texts.py", "t5x"),
    Known("timm", "ViT", ("vit_*_patch*_224", "vit_*_patch*_384", "vit_*_clip_*", "vit_*_siglip_*", "vit_*_gap_*",
          "vit_*_dinov2", "deit_*", "deit3_*"), TOWER, f"{PARITY}timm.py"),
    Known("efficientnet-lite", "EfficientNet-Lite", ("lite0",), "outputs of the released weights: 1e-4",
          f"{PARITY}efficientnet_torch.py"),
    Known("vlm_jax", "CLIP", ("pkg:vlm_jax/zoo/clip_tiny", "pkg:vlm_jax/zoo/clip_base"), "the parameters of its run",
          "tests/zoo/test_load.py", "native"),
)  # fmt: skip


def list_models(part: str = "") -> list[Known]:
    """Returns the families that `load` reads, in whose project, family or variants `part` occurs.

    Each has only the variants in which `part` occurs, or all where its project or family has it.

    Raises:
      UserError: there are none.
    """
    found = []
    for one in MODELS:
        inside = lambda text: part.lower() in text.lower()
        whole = inside(one.project) or inside(one.family)
        if variants := one.variants if whole else tuple(filter(inside, one.variants)):
            found.append(one._replace(variants=variants))
    if not found:
        names = [name for one in MODELS for name in (one.project, one.family, *one.variants)]
        raise UserError(
            f"no model that loads has `{part:.60}` in its name; {near(part, names, 'docs/models.md has why')}"
        )
    return found


def configs_of_open_clip() -> set[str]:
    """Returns the names of the configs of open_clip that load."""
    return {name for one in MODELS if one.project == "open_clip" for name in one.variants}
