"""Growth: parameters of a larger model that computes what a smaller one does.

    larger = grow(params, fresh)    # fresh: initial parameters of the larger model

A tower may grow in depth, in width by a whole factor, and in the hidden units of its MLPs and attention. Heads grow in
number and keep their width, which the shapes do not tell. Blocks are residual with norms before the branches.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.params import layers
from vlm_jax.params.table import map_with_name, named_leaves

# Regex of names -> what the last axes are: w, W the tower's width, written and read; h, H hidden units, likewise.
AXES = (
    (r"(.*/)?(attn/(query|key|value|gate)|mlp/(fc1|gate))/kernel", "Wh"),
    (r"(.*/)?(attn/(query|key|value|gate)|mlp/(fc1|gate))/bias", "h"),
    (r"(.*/)?(attn/out|mlp/fc2)/kernel", "Hw"),
    (r"(.*/)?head/kernel", "W."),
    (r"(.*/)?(attn/out|mlp/fc2|patch_embed|\w*norm\d?)/(bias|scale)", "w"),
    (r"(.*/)?(pos_embed|cls|registers|layer_scale\d|token_embed/embedding|patch_embed/kernel)", "w"),
)
LAST_OF_BRANCH = r"(.*/)?(attn/out|mlp/fc2)/(kernel|bias)"  # zeros make a block the identity
BLOCK = r"(.*/)?blocks_\d+/"
WIDTH = r"(.*/)?norm1/scale"


@method(
    family="growth",
    system="GrowCLIP",
    paper="arXiv:2308.11331",
    differs="a model grows in depth and width, and inherits what it has learned with a momentum",
)
def grow(params: Any, fresh: Any, momentum: float = 1.0) -> Any:
    """Returns momentum * inherited + (1 - momentum) * fresh parameters of a larger model.

    The inherited parameters compute the function of the smaller model: new blocks end in zeros, new hidden units are
    read by zeros, and a width that is k times as large holds k copies of each channel, read by weights / k. A momentum
    below 1 mixes random values in (parameter inheriting with momentum, Deng et al. 2023).

    Args:
      params: of the smaller model.
      fresh: of the larger model, as initialised; they fill what reads the larger width for new units, and new blocks.
      momentum: 1 leaves the function as it is.

    Raises:
      UserError: a parameter is smaller, absent, or of a kind that cannot grow; a width is no multiple.
    """
    if not 0 <= momentum <= 1:
        raise UserError(f"the momentum of growth is {momentum}; expected 0 to 1")
    old, new = named_leaves(params), named_leaves(fresh)
    factors = _factors(old, new)
    for name in sorted(old.keys() - new.keys()):
        raise UserError(f"growth: the larger model has no `{name}`; expected the same model with more blocks or units")

    def one(name, leaf):
        factor, block = factors.get(places[name].tower, (1, 1)), re.match(BLOCK, name)
        inherited = _inherited(name, old.get(name), leaf, *factor, bool(block) and block[0] not in blocks)
        return (momentum * inherited + (1 - momentum) * leaf).astype(leaf.dtype) if momentum < 1 else inherited

    places = layers.places(fresh)
    blocks = {block[0] for block in (re.match(BLOCK, name) for name in old) if block}
    return map_with_name(one, fresh)


def _factors(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns {tower: (its width, how many times as wide it becomes)}."""
    places, found = layers.places(dict(old)), {}
    for name, leaf in old.items():
        if re.fullmatch(WIDTH, name) and name in new:
            width, wider = leaf.shape[-1], new[name].shape[-1]
            if wider % width:
                raise UserError(f"growth: `{name}` has {width} channels and would have {wider}; expected a multiple")
            found[places[name].tower] = width, wider // width
    return found


def _inherited(name: str, old: Any, fresh: jax.Array, width: int, factor: int, in_new_block: bool) -> jax.Array:
    """Returns one parameter of the larger model that leaves the function as it is."""
    ends = bool(re.fullmatch(LAST_OF_BRANCH, name))
    if old is None:
        if not in_new_block:
            raise UserError(f"growth: the smaller model has no `{name}`; only blocks and hidden units may be new")
        return jnp.zeros_like(fresh) if ends else fresh
    if old.shape == fresh.shape:
        return old
    axes = next((axes for regex, axes in AXES if re.fullmatch(regex, name)), "")
    scanned = bool(re.search(r"(^|/)blocks/", name))
    kept = old
    for axis, role in enumerate(axes, old.ndim - len(axes)):
        if role in "wW" and factor > 1:
            parts = (*kept.shape[:axis], -1, 1, width, *kept.shape[axis + 1 :])  # such as a pooled pair, side by side
            copies = jnp.repeat(kept.reshape(parts), factor, axis=axis + 1)
            kept = copies.reshape(*kept.shape[:axis], -1, *kept.shape[axis + 1 :])
            kept = kept / factor if role == "W" else kept
    may_grow = {axis for axis, role in enumerate(axes, old.ndim - len(axes)) if role in "hH"} | (
        {0} if scanned else set()
    )
    sizes = list(zip(kept.shape, fresh.shape, strict=True))
    if any(mine > wanted or (mine < wanted and axis not in may_grow) for axis, (mine, wanted) in enumerate(sizes)):
        raise UserError(f"growth: `{name}` of shape {old.shape} cannot become {fresh.shape}")
    rest = jnp.zeros_like(fresh) if ends else fresh
    return rest.at[tuple(slice(0, size) for size in kept.shape)].set(kept.astype(fresh.dtype))
