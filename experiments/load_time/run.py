"""Times processes of vlm_jax and Transformers, from a CLIP folder to a prediction. See README.md here."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from experiments import study

WANTED = {"seconds": 0.6, "peak_gb": 0.7}  # of Transformers', at most
PROGRAMS = {
    "vlm_jax": """
import sys
import vlm_jax

folder, picture, *labels = sys.argv[1:]
print(*vlm_jax.load(folder).classify([picture], labels)[0])
""",
    "transformers": """
import sys
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

folder, picture, *labels = sys.argv[1:]
model = CLIPModel.from_pretrained(folder)
processor = CLIPProcessor.from_pretrained(folder)
with torch.no_grad():
    inputs = processor(text=labels, images=Image.open(picture), return_tensors="pt", padding=True)
    print(*model(**inputs).logits_per_image.softmax(-1)[0].tolist())
""",
}
MAKE_CHECKPOINT = """
import sys
import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from vlm_jax.data.tokenizers import clip

folder, picture = sys.argv[1:]
torch.manual_seed(0)
model = CLIPModel(CLIPConfig())  # its defaults are B/32: 151 M parameters
model.logit_scale.data.fill_(np.log(100))  # as in the released model, so that two labels differ
model.save_pretrained(folder)
pieces, merges = clip.vocabulary()
for special in ("<|startoftext|>", "<|endoftext|>"):
    pieces[special] = len(pieces)
CLIPTokenizer(pieces, merges, model_max_length=77).save_pretrained(folder)
CLIPImageProcessor().save_pretrained(folder)
noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(picture, quality=90)
"""
LABELS = ("a photo of a cat", "a photo of a dog")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def run(program: str, *arguments: str) -> dict:
    """Runs Python source in a fresh interpreter.

    This process must import nothing large: on Linux a child's peak memory starts at its parent's.

    Returns:
      output (str), seconds (wall clock, start and exit included), cpu_seconds, peak_gb (maximum resident set, 1e9).
    """
    start = time.perf_counter()
    command = [sys.executable, "-c", program, *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"exit status {child.returncode} from: {program}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kibibytes on Linux
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return dict(output=output, seconds=seconds, cpu_seconds=cpu_seconds, peak_gb=usage.ru_maxrss * unit / 1e9)


def measure(folder: str, repeats: int) -> dict[str, list[dict]]:
    """Returns the runs of each program; programs alternate and must agree on the probabilities."""
    picture = os.path.join(folder, "picture.jpg")
    run(MAKE_CHECKPOINT, folder, picture)
    runs = {name: [] for name in PROGRAMS}
    for turn in range(repeats + 1):
        for name in PROGRAMS:
            result = run(PROGRAMS[name], folder, picture, *LABELS)
            result["probabilities"] = [float(word) for word in result.pop("output").split()]
            if turn:
                runs[name].append(result)
    first = [results[0]["probabilities"] for results in runs.values()]
    # Transformers may resize with torchvision, which differs from PIL by a grey level here and there.
    if any(abs(a - b) > 1e-3 for other in first for a, b in zip(first[0], other, strict=True)):
        raise SystemExit(f"the programs disagree: {dict(zip(runs, first, strict=True))}")
    return runs


def medians(sitting, program):
    keys = "seconds", "cpu_seconds", "peak_gb"
    return {key: statistics.median(run[key] for run in sitting["runs"][program]) for key in keys}


def ratios(sitting):
    ours, theirs = (medians(sitting, program) for program in PROGRAMS)
    return {key: ours[key] / theirs[key] for key in ours}


def table(results):
    rows = []
    for sitting in results:
        of = ratios(sitting)
        for program, runs in sitting["runs"].items():
            seconds, middle = [run["seconds"] for run in runs], medians(sitting, program)
            found = middle["seconds"], min(seconds), max(seconds), middle["cpu_seconds"], middle["peak_gb"]
            version = sitting["machine"]["packages"][program] if program != "vlm_jax" else ""
            shares = [f"{of[key]:.2f}" if program == "vlm_jax" else "" for key in WANTED]
            rows.append([sitting["name"], f"{program} {version}".strip(), *(f"{x:.2f}" for x in found), *shares])
    head = "sitting", "program", "seconds: median", "smallest", "largest", "CPU seconds", "peak GB"
    return study.markdown([*head, "of Transformers' time", "of its memory"], rows)


def plot(results):
    figure, axes = study.subplots(1, 2, size=(9, 0.8 + 0.7 * len(results)), sharey=True)
    for ax, key, label in zip(axes, WANTED, ("seconds, dots are runs", "peak memory, GB"), strict=True):
        for place, sitting in enumerate(results):
            for i, program in enumerate(sitting["runs"]):
                at, values = place + 0.4 * (i - 0.5), [run[key] for run in sitting["runs"][program]]
                name = program if not place else None
                ax.barh(at, medians(sitting, program)[key], 0.38, color=study.SHADES[2 * i], label=name, **study.BAR)
                ax.plot(values, [at] * len(values), **study.DOT)
            wanted = WANTED[key] * medians(sitting, "transformers")[key]
            label_ = "wanted, at most" if not place else None
            ax.vlines(wanted, place - 0.4, place + 0.4, color=study.INK, linestyle="--", linewidth=1.5, label=label_)
        ax.set_xlabel(label)
    axes[0].set_yticks(range(len(results)), [f"sitting {sitting['name']}" for sitting in results])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each that count")
    parser.add_argument("--sitting", default="new", help="its name in the table; a sitting of that name is replaced")
    options = parser.parse_args()
    where = study.machine("vlm_jax", "jax", "jaxlib", "transformers", "torch", "numpy", "safetensors")
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(folder, options.repeats)
    study.sit("load_time", options.sitting, dict(machine=where, runs=runs))
    study.publish("load_time", table, plot)


if __name__ == "__main__":
    main()
