"""Checks 20,000 scenes by another grammar, and measures speed and memory of the source. See README.md here."""

import argparse
import resource
import time

from experiments import study

CHECKED = 20_000
WANTED = 2_500  # scenes of 64 px a second on one core
SIZES = (64, 128, 256)
WARM, TIMED, REPEATS = 6_000, 2_000, 5


def check():
    """Returns counts over CHECKED examples, a quarter of each split: captions, false captions, foils, true foils."""
    from tests.support import scene_truth
    from vlm_jax.data.scenes.scene import SPLITS
    from vlm_jax.data.sources import open_source

    found = dict(captions=0, false_captions=0, foils=0, true_foils=0)
    for split in SPLITS:
        source = open_source("scenes:?objects=1-6", split)
        source = source.narrow(frozenset(["objects", "caption", "foils"]))
        for i in range(CHECKED // len(SPLITS)):
            record = source[i]
            found["captions"] += 1
            found["false_captions"] += not scene_truth.is_true(record["caption"], record["objects"])
            for foil in record["foils"].values():
                found["foils"] += 1
                found["true_foils"] += bool(scene_truth.is_true(foil, record["objects"]))
    return found


def speed(size):
    """Returns scenes a second of CPU time, of pictures and captions, and the memory of cached drawings."""
    from vlm_jax.data.scenes import pictures
    from vlm_jax.data.sources import open_source

    source = open_source(f"scenes:?size={size}", "train").narrow(frozenset(["image", "caption"]))
    for i in range(WARM):
        source[i]
    rates = []
    for repeat in range(REPEATS):
        start = time.process_time()
        for i in range(TIMED):
            source[repeat * TIMED + i]
        rates.append(TIMED / (time.process_time() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(rates=rates, cached_bytes=pictures.cached_bytes(), peak_bytes=peak)


def table(results):
    found = results["check"]
    head = ["examples", "false captions", "foils", "true foils"]
    shown = [f"{found[key]:,}" for key in ("captions", "false_captions", "foils", "true_foils")]
    rows = []
    for size in SIZES:
        one = results[str(size)]
        rates = sorted(one["rates"])
        shape = [f"{rates[len(rates) // 2]:,.0f}", f"{rates[0]:,.0f}", f"{rates[-1]:,.0f}"]
        rows.append([f"{size}", *shape, f"{one['cached_bytes'] / 1e6:.0f}", f"{one['peak_bytes'] / 1e6:.0f}"])
    columns = ["side, px", "scenes a second: median", "smallest", "largest", "cached MB", "peak MB of the process"]
    return f"{study.markdown(head, [shown])}\n\n{study.markdown(columns, rows)}"


def plot(results):
    figure, ax = study.subplots(size=(6, 2.6))
    for place, size in enumerate(SIZES):
        rates = results[str(size)]["rates"]
        ax.barh(place, sorted(rates)[len(rates) // 2], color=study.SHADES[1], **study.BAR)
        ax.plot(rates, [place] * len(rates), **study.DOT)
    ax.axvline(WANTED, color=study.INK, linestyle="--", linewidth=1.5, label="wanted at 64 px, at least")
    ax.set_yticks(range(len(SIZES)), [f"{size} px" for size in SIZES])
    ax.invert_yaxis()
    ax.set_xlabel("scenes a second of one core, dots are repeats")
    figure.legend(loc="outside right upper")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="parts to measure again: check, 64, 128, 256")
    options = parser.parse_args()
    results = {} if not options.only else study.read("scenes", {})
    parts = {"check": check} | {str(size): lambda size=size: speed(size) for size in SIZES}
    for name in options.only or parts:
        results[name] = parts[name]()
        results["machine"] = study.machine("numpy", "pillow")
        study.save("scenes", results)
    study.publish("scenes", table, plot)


if __name__ == "__main__":
    main()
