"""What caches save: 64 tokens for 32 pictures by a CapPa B/16, with caches and without, taking turns in one process.

PYTHONPATH=. python experiments/decoding/measure.py [--turns=2]
"""

import argparse
import time

import jax
import jax.numpy as jnp

from configs import cappa
from vlm_jax import config, models
from vlm_jax.models.generate import Special, sample

BATCH, LENGTH = 32, 64
SPECIAL = Special(end=-1)  # never drawn: all tokens are decoded


def without_caches(model, params, images):
    """The same loop, but each step decodes the text from its beginning; the pictures are encoded once here, too."""
    context, _ = model.apply({"params": params}, images, method="encode")

    def step(t, ids):
        inputs = jnp.concatenate([jnp.zeros((BATCH, 1), jnp.int32), ids[:, :-1]], axis=1)
        hidden = model.apply({"params": params}, inputs, context, method="decode").hidden
        logits = model.apply({"params": params}, hidden[:, t], method="logits")
        return ids.at[:, t].set(jnp.argmax(logits, axis=-1).astype(jnp.int32))

    return jax.lax.fori_loop(0, LENGTH, step, jnp.zeros((BATCH, LENGTH), jnp.int32))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2)
    turns = parser.parse_args().turns
    section = config.plain(cappa.get_config("B/16"))["model"]
    model = models.build(section | {"dtype": "float32"})
    images = jax.random.normal(jax.random.key(0), (BATCH, 224, 224, 3))
    params = jax.jit(model.init)(jax.random.key(1), images[:1], jnp.zeros((1, LENGTH), jnp.int32))["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)
    cached = lambda *args: sample(model, *args, length=LENGTH, greedy=True, special=SPECIAL).token_ids
    programs = {
        "with caches": jax.jit(cached).lower(params, images).compile(),
        "without": jax.jit(lambda *args: without_caches(model, *args)).lower(params, images).compile(),
    }
    seconds, texts = {name: [] for name in programs}, {}
    for _ in range(turns):
        for name, program in programs.items():
            start = time.perf_counter()
            texts[name] = program(params, images).block_until_ready()
            seconds[name].append(time.perf_counter() - start)
    same = float(jnp.mean(texts["with caches"] == texts["without"]))
    for name, times in seconds.items():
        print(f"{name:12} {', '.join(f'{t:.1f}' for t in times)} s")
    print(f"ratio {min(seconds['with caches']) / min(seconds['without']):.3f}; equal tokens {same:.4f}")


if __name__ == "__main__":
    main()
