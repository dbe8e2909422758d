"""configs/fpt.py: attention and MLPs of the image tower's blocks are frozen, and nothing else."""

import jax
import jax.numpy as jnp

from configs import fpt, ul2
from vlm_jax import config, models
from vlm_jax.params import optim
from vlm_jax.params.table import named_leaves


def test_what_is_frozen_is_what_a_language_model_gives():
    """Norms of the blocks train, too; the blocks have the shapes of UL2's encoder."""
    settings, language = (config.plain(one.get_config(name)) for one, name in ((fpt, "random-smoke"), (ul2, "smoke")))
    shapes = lambda section, *inputs: jax.eval_shape(models.build(section).init, jax.random.key(0), *inputs)["params"]
    params = shapes(settings["model"], jnp.zeros((1, 32, 32, 3)), None)
    _, groups, _ = optim.build(settings["optimizer"], params, total_steps=1)
    frozen = {name for name, group in groups.items() if group == "frozen"}
    blocks = {name: leaf for name, leaf in named_leaves(params).items() if name.startswith("image/blocks")}
    assert frozen == {name for name in blocks if "norm" not in name} and len(frozen) < len(blocks)
    texts = named_leaves(shapes(language["model"], jnp.ones((1, 4), int), jnp.ones((1, 4), int)))
    encoder = {
        name.replace("encoder", "image"): leaf for name, leaf in texts.items() if name.startswith("encoder/bloc")
    }
    assert {name: leaf.shape for name, leaf in encoder.items()} == {name: leaf.shape for name, leaf in blocks.items()}
