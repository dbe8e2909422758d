"""Named sizes of towers.

Dosovitskiy et al. 2020, table 1; Zhai et al. 2021, table 2; Alabdulmohsin et al. 2023; T5 v1.1 (Xue et al. 2021, mT5,
section 3.2, has the same); UL2 (Tay et al. 2022, section 5.1).
"""

from vlm_jax.config import choose
from vlm_jax.errors import UserError

VARIANTS = {  # width, depth, mlp_dim, heads
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}

T5 = {  # width, depth of the encoder and of the decoder, mlp_dim, heads, head_dim, activation
    "small": (512, 8, 1024, 6, 64, "gelu_tanh"),
    "base": (768, 12, 2048, 12, 64, "gelu_tanh"),
    "large": (1024, 24, 2816, 16, 64, "gelu_tanh"),
    "xl": (2048, 24, 5120, 32, 64, "gelu_tanh"),
    "xxl": (4096, 24, 10240, 64, 64, "gelu_tanh"),
    "20b": (4096, 32, 16384, 16, 256, "silu"),
}


def t5(variant):
    """Returns the sizes of T5 v1.1 "base" or UL2 "20b": dict(width, depth, mlp_dim, heads, head_dim, activation)."""
    sizes = choose(T5, variant, "variant")
    return dict(zip(("width", "depth", "mlp_dim", "heads", "head_dim", "activation"), sizes, strict=True))


def lookup(variant):
    """Returns the sizes of "B" (a text tower) or "B/32" (an image tower with patches of 32 px).

    Returns:
      dict(width, depth, mlp_dim, heads), and patch if the name has a patch size.
    """
    name, slash, patch = variant.partition("/")
    sizes = choose(VARIANTS, name, "variant")
    fields = dict(zip(("width", "depth", "mlp_dim", "heads"), sizes, strict=True))
    if slash:
        if not patch.isdecimal() or int(patch) == 0:
            raise UserError(f"variant `{variant}` should be a size and a patch in pixels, such as `{name}/16`")
        fields["patch"] = int(patch)
    return fields
