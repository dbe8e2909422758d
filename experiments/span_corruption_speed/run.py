"""Sequences a second of span corruption: `corrupt_batch` of 512 tokens on one core, `corrupt` and the op beside it.

    PYTHONPATH=. taskset -c 0 nice python experiments/span_corruption_speed/measure.py

Wanted: at least 20,000 sequences a second for every denoiser of UL2. By process time, which other programs distort
less; by the clock on the wall too.
"""

import os
import time

import numpy as np
from absl import app, flags

from vlm_jax.data import examples, ops, spans, tokenizers

BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Sequences of a call.")
LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a sequence.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each; the median is printed.")
SECONDS = flags.DEFINE_float("seconds", 1, "Length of one measurement.")
WANTED = 20_000


def rate(call, count: int) -> tuple[float, float]:
    """Sequences a second of `call`, which makes `count`: by process time and on the wall; medians."""
    call()
    rates = []
    for _ in range(REPEATS.value):
        calls, cpu, wall = 0, time.process_time(), time.perf_counter()
        while time.perf_counter() - wall < SECONDS.value:
            call()
            calls += 1
        rates.append((calls * count / (time.process_time() - cpu), calls * count / (time.perf_counter() - wall)))
    return tuple(np.median(rates, axis=0))


def main(_):
    batch, length = BATCH_SIZE.value, LENGTH.value
    denoisers = tuple(denoiser for denoiser, _ in spans.UL2)
    rng = examples.generator(0, 0)
    ids = rng.integers(2, 32_000, (batch, length), dtype=np.int32)
    lengths, mixed, modes = np.full(batch, length), np.arange(batch) % len(denoisers), [(32_100,)] * len(denoisers)
    room = dict(vocab_size=32_300, eos_id=1, inputs_length=length + 128, targets_length=length + 128)

    def batched(which):
        return lambda: spans.corrupt_batch(ids, lengths, which, denoisers, rng, modes=modes, **room)

    one_by_one = lambda: [spans.corrupt(ids[0], d, rng, mode=(32_100,), **room) for d in denoisers]
    tokenizer = tokenizers.build("clip")
    op = ops.parse("denoise(inputs=77, targets=77, vocab_size=49_511)", tokenizer)
    caption = {"text": "a red bicycle leans against the white wall of an old house near the sea"}
    cases = {str(tuple(d)): (batched(np.full(batch, i)), batch) for i, d in enumerate(denoisers)}
    cases |= {
        "all seven in a batch": (batched(mixed), batch),
        "one at a time (`corrupt`)": (one_by_one, len(denoisers)),
        "captions (op `denoise`, text remembered)": (lambda: op(caption, rng), 1),
    }
    print(f"{length} tokens, batches of {batch}, numpy {np.__version__}, load at start {os.getloadavg()[0]:.1f}\n")
    print(f"| denoiser | sequences a second | of {WANTED:,} | on the wall |\n|---|---|---|---|")
    for name, (call, count) in cases.items():
        cpu, wall = rate(call, count)
        print(f"| {name} | {cpu:,.0f} | {cpu / WANTED:.1f}x | {wall:,.0f} |", flush=True)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    app.run(main)
