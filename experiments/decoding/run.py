"""Times greedy decoding by a CapPa B/16 with caches and without. See README.md here."""

import argparse
import time

import jax
import jax.numpy as jnp

from configs import cappa
from experiments import study
from vlm_jax import config, models
from vlm_jax.models.generate import Special, sample

BATCH, LENGTH = 32, 64
SPECIAL = Special(end=-1)  # never drawn: all tokens are decoded
WANTED = 1 / 5  # of the time without caches


def without_caches(model, params, images):
    """The same loop without caches: each step decodes the whole text; pictures are encoded once here, too."""
    context, _ = model.apply({"params": params}, images, method="encode")

    def step(t, ids):
        inputs = jnp.concatenate([jnp.zeros((BATCH, 1), jnp.int32), ids[:, :-1]], axis=1)
        hidden = model.apply({"params": params}, inputs, context, method="decode").hidden
        logits = model.apply({"params": params}, hidden[:, t], method="logits")
        return ids.at[:, t].set(jnp.argmax(logits, axis=-1).astype(jnp.int32))

    return jax.lax.fori_loop(0, LENGTH, step, jnp.zeros((BATCH, LENGTH), jnp.int32))


def measure(turns):
    """Measures a sitting: wall and process seconds of each turn, and the share of equal tokens."""
    where = study.machine("jax")
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
    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    found, texts = {name: {clock: [] for clock in clocks} for name in programs}, {}
    for _ in range(turns):
        for name, program in programs.items():
            start = {clock: read() for clock, read in clocks.items()}
            texts[name] = program(params, images).block_until_ready()
            for clock, read in clocks.items():
                found[name][clock].append(read() - start[clock])
    same = float(jnp.mean(texts["with caches"] == texts["without"]))
    return dict(machine=where, equal_tokens=same, **found)


def ratio(sitting, clock):
    """The fastest turn with caches over the fastest without; None if the sitting lacks this clock."""
    with_, without = (sitting[name].get(clock) for name in ("with caches", "without"))
    return min(with_) / min(without) if with_ else None


def table(results):
    rows = []
    for sitting in results:
        seconds = [f"{min(sitting[name]['seconds']):.1f}" for name in ("with caches", "without")]
        ratios = [f"{value:.3f}" if (value := ratio(sitting, clock)) else "" for clock in ("seconds", "cpu_seconds")]
        rows.append([sitting["name"], *seconds, *ratios])
    return study.markdown(["sitting", "with caches, s", "without, s", "ratio", "of CPU time"], rows)


def plot(results):
    clocks = {"seconds": "on the wall", "cpu_seconds": "CPU time"}
    bars = {f"{s['name']}, {label}": ratio(s, clock) for s in results for clock, label in clocks.items()}
    bars = {name: value for name, value in bars.items() if value}
    figure, axes = study.subplots(size=(7, 0.9 + 0.4 * len(bars)))
    drawn = axes.barh(list(bars), list(bars.values()), 0.6, color=study.SHADES[1], **study.BAR)
    axes.bar_label(drawn, fmt="%.3f", padding=-34)
    axes.axvline(WANTED, color=study.INK, linestyle="--", linewidth=1, label="wanted, at most")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("with caches; without them = 1")
    axes.legend(loc="center right")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--sitting", default="new", help="its name in the table; a sitting of that name is replaced")
    options = parser.parse_args()
    study.sit("decoding", options.sitting, measure(options.turns))
    study.publish("decoding", table, plot)


if __name__ == "__main__":
    main()
