"""Released checkpoints, very small: their files out of `tests/golden`, read as models, in their names again."""

import flax
import jax
import jax.numpy as jnp
import numpy as np

from tests.support.paths import GOLDEN
from vlm_jax import models
from vlm_jax.zoo import key_map, recognize
from vlm_jax.zoo.load import read_params


def unpack(name, folder):
    """Writes the files of a stored checkpoint into `folder`; returns (inputs, outputs)."""
    stored = np.load(GOLDEN / f"released_{name}.npz")
    for key in stored:
        if "/" not in key:
            (folder / key).write_bytes(stored[key].tobytes())
    part = lambda prefix: {key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)}
    return part("input/"), part("output/")


def read(path, activation=None, **told):
    """(what the files are, the model, its parameters)."""
    released = recognize.understand(path, activation, **told)
    params = read_params(released.match(), released.shapes, released.tensors)
    return released, models.build(released.model), flax.traverse_util.unflatten_dict(params, sep="/")


def loss_and_embeddings(model, params, images, token_ids, sigmoid):
    out = model.apply({"params": params}, images, token_ids)
    logits = out.scale * out.image @ out.text.T + (0 if out.bias is None else out.bias)
    if sigmoid:
        loss = -jax.nn.log_sigmoid((2 * jnp.eye(len(logits)) - 1) * logits).sum() / len(logits)
    else:
        loss = -(jnp.diag(jax.nn.log_softmax(logits, 0)) + jnp.diag(jax.nn.log_softmax(logits, 1))).mean() / 2
    return loss, (out, logits)


def by_their_names(released, tree):
    """Arrays in our tree, put into their tensors by the key table."""
    arrays, shapes, found = flax.traverse_util.flatten_dict(tree, sep="/"), released.shapes, {}
    for entry in released.entries:
        name, i = key_map.blocks_of(entry.ours, shapes)
        if name in shapes:
            into = found.setdefault(entry.theirs, np.zeros(released.tensors[entry.theirs].shape, np.float32))
            entry.write(np.asarray(arrays[name] if i is None else arrays[name][i]), into)
    return found
