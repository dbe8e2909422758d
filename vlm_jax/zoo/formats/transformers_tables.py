"""The key tables of Transformers' towers, see `key_map`: names below a tower's prefix."""

Rows = tuple[tuple[str, str, str], ...]

CLIP_BLOCKS: Rows = (
    ("blocks_{i}/norm1", "encoder.layers.{i}.layer_norm1", "norm"),
    ("blocks_{i}/attn/query", "encoder.layers.{i}.self_attn.q_proj", "dense"),
    ("blocks_{i}/attn/key", "encoder.layers.{i}.self_attn.k_proj", "dense"),
    ("blocks_{i}/attn/value", "encoder.layers.{i}.self_attn.v_proj", "dense"),
    ("blocks_{i}/attn/out", "encoder.layers.{i}.self_attn.out_proj", "dense"),
    ("blocks_{i}/norm2", "encoder.layers.{i}.layer_norm2", "norm"),
    ("blocks_{i}/mlp/fc1", "encoder.layers.{i}.mlp.fc1", "dense"),
    ("blocks_{i}/mlp/fc2", "encoder.layers.{i}.mlp.fc2", "dense"),
)
CLIP_VISION: Rows = (
    ("patch_embed", "embeddings.patch_embedding", "conv"),
    ("cls", "embeddings.class_embedding", "vector"),
    ("pos_embed", "embeddings.position_embedding.weight", "table"),
    ("pre_norm", "pre_layrnorm", "norm"),
    *CLIP_BLOCKS,
    ("norm", "post_layernorm", "norm"),
)
CLIP_TEXT: Rows = (
    ("token_embed", "embeddings.token_embedding", "embedding"),
    ("pos_embed", "embeddings.position_embedding.weight", "table"),
    *CLIP_BLOCKS,
    ("norm", "final_layer_norm", "norm"),
)
SIGLIP_HEAD: Rows = (
    ("map_pool/probe", "head.probe", "same"),
    ("map_pool/attn/query", "head.attention.in_proj#0/3", "in_proj"),
    ("map_pool/attn/key", "head.attention.in_proj#1/3", "in_proj"),
    ("map_pool/attn/value", "head.attention.in_proj#2/3", "in_proj"),
    ("map_pool/attn/out", "head.attention.out_proj", "dense"),
    ("map_pool/norm", "head.layernorm", "norm"),
    ("map_pool/mlp/fc1", "head.mlp.fc1", "dense"),
    ("map_pool/mlp/fc2", "head.mlp.fc2", "dense"),
)
SIGLIP_VISION: Rows = (*CLIP_VISION, *SIGLIP_HEAD)
SIGLIP2_VISION: Rows = (("patch_embed", "embeddings.patch_embedding", "dense"), *SIGLIP_VISION[1:])
SIGLIP_TEXT: Rows = (*CLIP_TEXT, ("head", "head", "dense"))
VIT_STEM: Rows = (
    ("patch_embed", "embeddings.patch_embeddings.projection", "conv"),
    ("cls", "embeddings.cls_token", "same"),
    ("pos_embed", "embeddings.position_embeddings", "same"),
    ("blocks_{i}/attn/query", "encoder.layer.{i}.attention.attention.query", "dense"),
    ("blocks_{i}/attn/key", "encoder.layer.{i}.attention.attention.key", "dense"),
    ("blocks_{i}/attn/value", "encoder.layer.{i}.attention.attention.value", "dense"),
    ("blocks_{i}/attn/out", "encoder.layer.{i}.attention.output.dense", "dense"),
    ("norm", "layernorm", "norm"),
)
VIT: Rows = (
    *VIT_STEM,
    ("blocks_{i}/norm1", "encoder.layer.{i}.layernorm_before", "norm"),
    ("blocks_{i}/norm2", "encoder.layer.{i}.layernorm_after", "norm"),
    ("blocks_{i}/mlp/fc1", "encoder.layer.{i}.intermediate.dense", "dense"),
    ("blocks_{i}/mlp/fc2", "encoder.layer.{i}.output.dense", "dense"),
    ("rep", "pooler.dense", "dense"),
)
DINOV2_STEM: Rows = (
    *VIT_STEM,
    ("registers", "embeddings.register_tokens", "same"),
    ("blocks_{i}/norm1", "encoder.layer.{i}.norm1", "norm"),
    ("blocks_{i}/layer_scale1", "encoder.layer.{i}.layer_scale1.lambda1", "same"),
    ("blocks_{i}/norm2", "encoder.layer.{i}.norm2", "norm"),
    ("blocks_{i}/layer_scale2", "encoder.layer.{i}.layer_scale2.lambda1", "same"),
)
DINOV2: Rows = (
    *DINOV2_STEM,
    ("blocks_{i}/mlp/fc1", "encoder.layer.{i}.mlp.fc1", "dense"),
    ("blocks_{i}/mlp/fc2", "encoder.layer.{i}.mlp.fc2", "dense"),
)
DINOV2_GATED: Rows = (
    *DINOV2_STEM,
    ("blocks_{i}/mlp/gate", "encoder.layer.{i}.mlp.weights_in#0/2", "dense"),
    ("blocks_{i}/mlp/fc1", "encoder.layer.{i}.mlp.weights_in#1/2", "dense"),
    ("blocks_{i}/mlp/fc2", "encoder.layer.{i}.mlp.weights_out", "dense"),
)
DINOV3: Rows = (
    ("patch_embed", "embeddings.patch_embeddings", "conv"),
    ("cls", "embeddings.cls_token", "same"),
    ("registers", "embeddings.register_tokens", "same"),
    ("blocks_{i}/norm1", "layer.{i}.norm1", "norm"),
    ("blocks_{i}/attn/query", "layer.{i}.attention.q_proj", "dense"),
    ("blocks_{i}/attn/key", "layer.{i}.attention.k_proj", "dense"),
    ("blocks_{i}/attn/value", "layer.{i}.attention.v_proj", "dense"),
    ("blocks_{i}/attn/out", "layer.{i}.attention.o_proj", "dense"),
    ("blocks_{i}/layer_scale1", "layer.{i}.layer_scale1.lambda1", "same"),
    ("blocks_{i}/norm2", "layer.{i}.norm2", "norm"),
    ("blocks_{i}/mlp/fc1", "layer.{i}.mlp.up_proj", "dense"),
    ("blocks_{i}/mlp/fc2", "layer.{i}.mlp.down_proj", "dense"),
    ("blocks_{i}/layer_scale2", "layer.{i}.layer_scale2.lambda1", "same"),
    ("norm", "norm", "norm"),
)
DINOV3_GATED: Rows = (*DINOV3, ("blocks_{i}/mlp/gate", "layer.{i}.mlp.gate_proj", "dense"))
BERT: Rows = (
    ("token_embed", "embeddings.word_embeddings", "embedding"),
    ("pos_embed", "embeddings.position_embeddings.weight", "table"),
    ("token_type_embed", "embeddings.token_type_embeddings.weight", "same"),
    ("pre_norm", "embeddings.LayerNorm", "norm"),
    ("blocks_{i}/attn/query", "encoder.layer.{i}.attention.self.query", "dense"),
    ("blocks_{i}/attn/key", "encoder.layer.{i}.attention.self.key", "dense"),
    ("blocks_{i}/attn/value", "encoder.layer.{i}.attention.self.value", "dense"),
    ("blocks_{i}/attn/out", "encoder.layer.{i}.attention.output.dense", "dense"),
    ("blocks_{i}/norm1", "encoder.layer.{i}.attention.output.LayerNorm", "norm"),
    ("blocks_{i}/mlp/fc1", "encoder.layer.{i}.intermediate.dense", "dense"),
    ("blocks_{i}/mlp/fc2", "encoder.layer.{i}.output.dense", "dense"),
    ("blocks_{i}/norm2", "encoder.layer.{i}.output.LayerNorm", "norm"),
    ("rep", "pooler.dense", "dense"),
)
ALTCLIP_TEXT: Rows = (
    *((ours, f"roberta.{theirs}", kind) for ours, theirs, kind in BERT[:-1]),
    ("norm", "pre_LN", "norm"),
    ("rep", "transformation", "dense"),
)
