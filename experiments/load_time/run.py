"""From a CLIP B/32 folder (safetensors) to the first prediction, as a whole process: vlm_jax beside Transformers.

    python experiments/load_time/measure.py

Needs torch and transformers (`pip install 'vlm_jax[parity]'`) and no network: it writes the checkpoint itself, random
weights at full size with CLIP's own vocabulary. The two programs below take turns, each in a fresh interpreter; the
first turn of each, which fills the disk's cache, is not counted. Prints a table, writes results.json beside this file.
Expected: at most 0.6 of Transformers' time and 0.7 of its peak memory.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
from vlm_jax.data.tokenizers import clip_vocabulary

folder, picture = sys.argv[1:]
torch.manual_seed(0)
model = CLIPModel(CLIPConfig())  # its defaults are B/32: 151 M parameters
model.logit_scale.data.fill_(np.log(100))  # as in the released model, so that two labels differ
model.save_pretrained(folder)
pieces, merges = clip_vocabulary()
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

    This process imports nothing large: Linux counts the peak of the process that forked as the child's.

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
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes on Linux
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return dict(output=output, seconds=seconds, cpu_seconds=cpu_seconds, peak_gb=usage.ru_maxrss * unit / 1e9)


def measure(folder: str, repeats: int, programs: list[str]) -> dict[str, list[dict]]:
    """The runs of each program; they alternate, and must agree on the probabilities."""
    picture = os.path.join(folder, "picture.jpg")
    run(MAKE_CHECKPOINT, folder, picture)
    runs = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name in programs:
            result = run(PROGRAMS[name], folder, picture, *LABELS)
            result["probabilities"] = [float(word) for word in result.pop("output").split()]
            if turn:
                runs[name].append(result)
    first = [results[0]["probabilities"] for results in runs.values()]
    # Transformers may resize with torchvision, which differs from PIL by a grey level here and there.
    if any(abs(a - b) > 1e-3 for other in first for a, b in zip(first[0], other, strict=True)):
        raise SystemExit(f"the programs disagree: {dict(zip(runs, first, strict=True))}")
    return runs


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="runs of each that count")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    args = parser.parse_args()

    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(folder, args.repeats, args.programs)
    load.append(os.getloadavg()[0])
    median = {
        name: {key: statistics.median(r[key] for r in results) for key in ("seconds", "cpu_seconds", "peak_gb")}
        for name, results in runs.items()
    }
    print(f"{os.cpu_count()} cores, load {load[0]:.1f} at the start, {load[1]:.1f} at the end\n")
    print("| program | runs | seconds: median | smallest | largest | CPU seconds | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for name, results in runs.items():
        seconds, middle = [r["seconds"] for r in results], median[name]
        print(
            f"| {name} | {len(results)} | {middle['seconds']:.2f} | {min(seconds):.2f} | {max(seconds):.2f} "
            f"| {middle['cpu_seconds']:.2f} | {middle['peak_gb']:.2f} |"
        )
    results = dict(runs=runs, median=median, load=load)
    if len(runs) == len(PROGRAMS):
        ratio = {key: median["vlm_jax"][key] / median["transformers"][key] for key in median["vlm_jax"]}
        print(f"\nvlm_jax / transformers: time {ratio['seconds']:.2f}, peak memory {ratio['peak_gb']:.2f}")
        results["ratio"] = ratio
    packages = ("vlm_jax", "jax", "jaxlib", "transformers", "torch", "torchvision", "numpy", "safetensors")
    results["machine"] = dict(
        cores=os.cpu_count(),
        platform=platform.platform(),
        python=platform.python_version(),
        packages={name: version(name) for name in packages},
    )
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
