"""open_clip's settings and shapes: what is read of them, what is asked for, what is refused by name; no weights."""

from types import SimpleNamespace

import pytest

from vlm_jax.errors import UserError
from vlm_jax.zoo import families
from vlm_jax.zoo.formats import open_clip, open_clip_timm
from vlm_jax.zoo.released import Told

BLOCK = ("ln_1", "ln_2", "attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
VISION = dict(image_size=32, patch_size=16, layers=1, width=64)
WORDS = dict(context_length=8, vocab_size=30, width=64, heads=1, layers=1)
GELU = Told(activation="gelu")


def own(width=64, depth=1, mlp=64, text="", pre_norm=True, more=()):
    """Tensors of a CLIP with open_clip's own image tower, as far as `describe` looks at shapes."""
    shapes = {"logit_scale": (), "visual.conv1.weight": (width, 3, 16, 16), "visual.positional_embedding": (5, width)}
    shapes |= {"visual.proj": (width, 32), f"{text}text_projection": (64, 32), **dict(more)}
    shapes |= {f"{text}token_embedding.weight": (30, 64), f"{text}positional_embedding": (8, 64)}
    shapes |= {"visual.ln_pre.weight": (width,)} if pre_norm else {}
    for prefix, size, rows, count in (("visual.", width, mlp, depth), (text, 64, 64, 1)):
        shapes |= {f"{prefix}transformer.resblocks.{i}.mlp.c_fc.weight": (rows, size) for i in range(count)}
    return {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}


def timm(width=768, depth=12, mlp=3072, cls=False, mapped=True, text="text.", more=()):
    """Tensors of a CLIP with a ViT of timm."""
    tensors = {name: tensor for name, tensor in own(text=text).items() if not name.startswith("visual.")}
    trunk = {"patch_embed.proj.weight": (width, 3, 16, 16), **dict(more)}
    trunk |= {"cls_token": (1, 1, width)} if cls else {}
    trunk |= {"attn_pool.latent": (1, 1, width)} if mapped else {}
    trunk |= {f"blocks.{i}.mlp.fc1.weight": (mlp, width) for i in range(depth)} | {"blocks.0.attn.qkv.bias": (9,)}
    return tensors | {f"visual.trunk.{name}": SimpleNamespace(shape=shape) for name, shape in trunk.items()}


def image_of(tensors, told=GELU, **vision):
    cfg = dict(vision_cfg=vision, text_cfg=WORDS) if vision else None
    return open_clip.describe(tensors, cfg, told)[0]["image"]


# --- heads, pools and activations that shapes do not tell ------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "heads"),
    [((768, 12, 3072), 12), ((1024, 24, 4096), 16), ((1280, 32, 5120), 16), ((1408, 40, 6144), 16),
     ((1664, 48, 8192), 16), ((1152, 27, 4304), 16), ((640, 12, 2560), 10)],
)  # fmt: skip
def test_heads_of_bare_weights(sizes, heads):
    assert image_of(own(*sizes))["heads"] == heads


@pytest.mark.parametrize("sizes", [(1152, 12, 4304), (1280, 24, 5120), (100, 2, 400)])
def test_heads_are_asked_for(sizes):
    with pytest.raises(UserError, match=rf"the heads of the image tower \(width {sizes[0]}, .*pass heads="):
        image_of(own(*sizes))
    assert image_of(own(*sizes), Told("gelu", heads=4))["heads"] == 4
    with pytest.raises(UserError, match="heads=7 of the image tower does not divide"):
        image_of(own(*sizes), Told("gelu", heads=7))


def test_pools_of_bare_weights():
    section = open_clip.describe(own(), None, GELU)[0]
    assert (section["image"]["pool"], section["text"]["pool"], section["text"]["causal"]) == ("tok", "argmax", True)
    for tensors in (own(text="text."), timm()):
        with pytest.raises(UserError, match="do not tell the text tower's pool; pass pool='argmax' or pool='last'"):
            open_clip.describe(tensors, None, GELU)
        text = open_clip.describe(tensors, None, Told("gelu", dict(text="last")))[0]["text"]
        assert (text["pool"], text["causal"]) == ("last", False)
    with pytest.raises(UserError, match="cls token do not tell their image tower's pool; pass pool='tok' or"):
        image_of(timm(cls=True, mapped=False))
    with pytest.raises(UserError, match="do not tell the image tower's pool"):
        image_of(own(pre_norm=False))
    assert image_of(own(pre_norm=False), Told("gelu", dict(image="patches", text="last")))["pool"] == "patches"
    with pytest.raises(UserError, match="pool= has the key 'vision'; expected image or text"):
        image_of(timm(), Told("gelu", dict(vision="map")))


def test_a_tower_of_timm_is_what_its_name_says():
    """Values of timm 1.0.31, `create_model(name)`."""
    named = lambda name, tensors=None, **more: image_of(tensors or timm(), timm_model_name=name, **more)
    plain = named("vit_base_patch16_siglip_224", timm_pool="map", act_kwargs=dict(approximate="tanh"))
    assert (plain["activation"], plain["heads"], plain["norm_eps"]) == ("gelu", 12, 1e-6)
    assert named("vit_large_patch16_siglip_512")["activation"] == "gelu_tanh"
    assert named("vit_so400m_patch16_siglip_256", timm(1152, 27, 4304))["heads"] == 16
    assert named("vit_base_patch16_gap_224", timm(mapped=False), timm_pool="")["pool"] == "gap"
    clip = timm(cls=True, mapped=False, more=[("norm_pre.weight", (768,)), ("head.weight", (32, 768))])
    clip = named("vit_base_patch16_clip_quickgelu_224", clip, timm_pool="")
    assert (clip["activation"], clip["norm_eps"], clip["pool"]) == ("quick_gelu", 1e-5, "tok")
    assert (clip["pre_norm"], clip["patch_bias"], clip["out_dim"], clip["head_bias"]) == (True, False, 32, False)
    assert named("vit_base_patch16_x_224", timm(cls=True, mapped=False), timm_pool="avg")["pool"] == "patches"


# --- settings --------------------------------------------------------------------------------------------------------


def test_clipa_pools_its_patches_and_norms_the_pool():
    image = image_of(own(pre_norm=False), **VISION, pool_type="avg", final_ln_after_pool=True)
    assert (image["pool"], image["cls"], image["final_norm"]) == ("patches", True, "pooled")


def test_the_text_towers_default_heads_are_eight():
    text = {key: value for key, value in WORDS.items() if key != "heads"}
    assert open_clip.describe(own(), dict(vision_cfg=VISION, text_cfg=text))[0]["text"]["heads"] == 8


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ("model_cfg", "surprise", 1, "model_cfg has surprise 1, which is not known here"),
        ("model_cfg", "nonscalar_logit_scale", True, "only False is supported"),
        ("vision_cfg", "use_rope", False, "vision_cfg has use_rope False, which is not known here"),
        ("vision_cfg", "qk_norm", True, "vision_cfg.qk_norm is True; only False"),
        ("vision_cfg", "act_kwargs", {"alpha": 1}, "vision_cfg.act_kwargs has alpha 1"),
        ("vision_cfg", "norm_kwargs", {"elementwise_affine": False}, "only True is supported"),
        ("text_cfg", "tokenizer_mode", "clips", "text_cfg.tokenizer_mode is 'clips'"),
        ("text_cfg", "embed_cls", 1, "text_cfg.embed_cls is 1; only False"),
    ],
)
def test_a_setting_is_read_or_refused(where, key, value, message):
    cfg = dict(vision_cfg=dict(VISION), text_cfg=dict(WORDS), quick_gelu=None)
    (cfg if where == "model_cfg" else cfg[where])[key] = value
    with pytest.raises(UserError, match=message):
        open_clip.describe(own(), cfg)


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("visual.trunk.stages.0.blocks.0.conv_dw.weight", "ConvNeXt"),
        ("visual.trunk.stages.0.blocks.0.token_mixer.norm.weight", "FastViT"),
        ("visual.trunk.blocks.0.attn.q_proj.weight", "EVA02"),
        ("visual.trunk.blocks.0.attn.q_bias", "EVA01"),
        ("visual.trunk.patch_embed.backbone.stem.conv1.weight", "ViTamin"),
        ("visual.trunk.patch_embed.backbone.0.conv.weight", "a hybrid of convolutions"),
        ("visual.trunk.layers.0.blocks.0.attn.relative_position_bias_table", "Swin"),
        ("visual.layer1.0.conv1.weight", "ResNet"),
        ("visual.trunk.surprise", "of an unknown family"),
        ("text.transformer.embeddings.word_embeddings.weight", "the text tower is a model of Transformers"),
    ],
)
def test_a_family_names_itself_and_the_nearest(name, family):
    tensors = {name: SimpleNamespace(shape=(2, 2)), "visual.conv1.weight": SimpleNamespace(shape=(2, 3, 2, 2))}
    with pytest.raises(UserError, match=rf"{family}.*, which is not supported; the nearest that loads is"):
        open_clip.describe(tensors, dict(vision_cfg={}, text_cfg={}))


def test_rotary_positions_are_not_taken_for_learned_ones():
    pe = timm(cls=True, more=[("norm_pre.weight", (768,))])
    with pytest.raises(UserError, match="PE-Core or alike, whose positions bare weights do not tell"):
        open_clip.describe(pe, None, GELU)
    vision = dict(timm_model_name="vit_pe_core_base_patch16_224", timm_pool="map", image_size=224)
    image = open_clip.describe(pe, dict(vision_cfg=vision, text_cfg=WORDS))[0]["image"]
    assert image["rotary"] == dict(reference=(14, 14), offset=1.0, columns_first=True)
    assert (image["heads"], image["pool_heads"], image["norm_eps"]) == (12, 8, 1e-5)
    with pytest.raises(UserError, match="timm_pool of vit_pe_core_base_patch16_224 is 'avg'; expected map"):
        open_clip.describe(pe, dict(vision_cfg=vision | dict(timm_pool="avg"), text_cfg=WORDS))
    for other in ("vit_pe_spatial_base_patch16_512", "vit_base_patch16_rope_reg1_gap_256"):
        with pytest.raises(UserError, match="a ViT with rotary positions"):
            open_clip.describe(pe, dict(vision_cfg=vision | dict(timm_model_name=other), text_cfg=WORDS))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["visual_encoder.blocks.0.attn.qkv.weight"], "BLIP"),
        (["cls_token", "blocks.0.ls1.gamma"], "DINOv2"),
        (["vision_model.embeddings.class_embedding"], "put config.json beside"),
        (["stages.0.blocks.0.conv_dw.weight"], "ConvNeXt"),
        (["student.a.weight", "student.b.weight"], "all names begin with `student.`: save them without it"),
    ],
)
def test_other_files_are_named(names, said):
    assert said in families.unknown(names)


# --- writing ---------------------------------------------------------------------------------------------------------

IMAGE = dict(width=768, depth=12, heads=12, mlp_dim=3072, patch=16, image_size=(224, 224), pool="map")
TEXT = dict(width=64, depth=1, heads=1, mlp_dim=64, vocab_size=30, length=8, pool="last", out_dim=32, head_bias=True)


def test_names_of_timm_are_real():
    """`timm.list_models("vit_*siglip*")` of 1.0.31; the name decides the size, so that no other will do."""
    vision = open_clip_timm.config(IMAGE | dict(out_dim=768, head_bias=True))
    assert vision["timm_model_name"] == "vit_base_patch16_siglip_224" and vision["image_size"] == 224
    assert vision["timm_proj"] == "linear" and vision["timm_proj_bias"]
    assert open_clip_timm.config(IMAGE | dict(pool="gap"))["timm_model_name"] == "vit_base_patch16_siglip_gap_224"
    for change in (dict(image_size=240), dict(image_size=(224, 256)), dict(depth=11), dict(heads=8), dict(pool="max")):
        with pytest.raises(UserError, match="timm has no image tower of width 768"):
            open_clip_timm.config(IMAGE | change)
    for change in (dict(layer_scale=1e-5), dict(registers=4), dict(cls=True)):
        with pytest.raises(UserError, match=f"have no {next(iter(change))}"):
            open_clip_timm.config(IMAGE | change)


def test_what_open_clips_own_towers_say():
    image = IMAGE | dict(pool="patches", final_norm="pooled", out_dim=32, layer_scale=0.1, activation="gelu")
    cfg = open_clip.config(dict(image=image, text=TEXT | dict(activation="gelu", layer_scale=0.2)))
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    assert vision["pool_type"] == "avg" and vision["final_ln_after_pool"] and vision["no_ln_pre"]
    assert (vision["ls_init_value"], text["ls_init_value"], text["proj_bias"]) == (0.1, 0.2, True)
    assert "timm_model_name" not in vision and "act_kwargs" not in vision
    without = open_clip.config(dict(image=image, text=TEXT | dict(out_dim=None)))
    assert (without["embed_dim"], without["text_cfg"]["proj_type"]) == (64, "none")
    with pytest.raises(UserError, match="image towers have out_dim; this one has none"):
        open_clip.config(dict(image=image | dict(out_dim=None), text=TEXT))
