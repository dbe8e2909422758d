"""Times span corruption on one core: `corrupt_batch`, `corrupt` and the op `denoise`. See README.md here."""

import argparse
import time

import numpy as np

from experiments import study
from vlm_jax.data import examples, ops, spans, tokenizers

BATCH, LENGTH, REPEATS, SECONDS = 128, 512, 5, 1
WANTED = 20_000
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def rate(call, count):
    """{clock: median sequences a second} of `call`, which makes `count` sequences."""
    call()
    rates = {clock: [] for clock in CLOCKS}
    for _ in range(REPEATS):
        calls, start = 0, {clock: read() for clock, read in CLOCKS.items()}
        while time.perf_counter() - start["wall"] < SECONDS:
            call()
            calls += 1
        for clock, read in CLOCKS.items():
            rates[clock].append(calls * count / (read() - start[clock]))
    return {clock: float(np.median(values)) for clock, values in rates.items()}


def measure():
    where = study.machine("numpy")
    denoisers = tuple(denoiser for denoiser, _ in spans.UL2)
    rng = examples.generator(0, 0)
    ids = rng.integers(2, 32_000, (BATCH, LENGTH), dtype=np.int32)
    lengths, mixed, modes = np.full(BATCH, LENGTH), np.arange(BATCH) % len(denoisers), [(32_100,)] * len(denoisers)
    room = dict(vocab_size=32_300, eos_id=1, inputs_length=LENGTH + 128, targets_length=LENGTH + 128)

    def batched(which):
        return lambda: spans.corrupt_batch(ids, lengths, which, denoisers, rng, modes=modes, **room)

    one_by_one = lambda: [spans.corrupt(ids[0], d, rng, mode=(32_100,), **room) for d in denoisers]
    tokenizer = tokenizers.build("clip")
    op = ops.parse("denoise(inputs=77, targets=77, vocab_size=49_511)", tokenizer)
    caption = {"text": "a red bicycle leans against the white wall of an old house near the sea"}
    cases = {str(tuple(d)): (batched(np.full(BATCH, i)), BATCH) for i, d in enumerate(denoisers)}
    cases |= {
        "all seven in a batch": (batched(mixed), BATCH),
        "one at a time (`corrupt`)": (one_by_one, len(denoisers)),
        "captions (op `denoise`, text remembered)": (lambda: op(caption, rng), 1),
    }
    return dict(machine=where, rates={name: rate(*case) for name, case in cases.items()})


def table(results):
    head = ["mean span, rate, mode"]
    for sitting in results:
        head += [f"{sitting['name']}: of CPU time", f"of {WANTED:,}", "on the wall"]
    rows = []
    for name in results[0]["rates"]:
        of = [sitting["rates"][name] for sitting in results]
        cells = [(f"{one['cpu']:,.0f}", f"{one['cpu'] / WANTED:.1f}x", f"{one['wall']:,.0f}") for one in of]
        rows.append([name, *(cell for three in cells for cell in three)])
    return study.markdown(head, rows)


def plot(results):
    figure, axes = study.subplots(size=(8, 4.2))
    names = list(results[0]["rates"])
    for i, sitting in enumerate(results):
        at = np.arange(len(names)) + 0.4 * (i - 0.5)
        rates = [sitting["rates"][name]["cpu"] for name in names]
        axes.barh(at, rates, 0.38, color=study.SHADES[2 * i], label=sitting["name"], **study.BAR)
    axes.axvline(WANTED, color=study.INK, linestyle="--", linewidth=1, label="wanted, at least")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("sequences of 512 tokens a second of CPU time")
    axes.legend(loc="lower right")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sitting", default="new", help="its name in the table; a sitting of that name is replaced")
    study.sit("span_corruption_speed", parser.parse_args().sitting, measure())
    study.publish("span_corruption_speed", table, plot)


if __name__ == "__main__":
    main()
