"""Times the input pipeline and, if torch is installed, a torch DataLoader. See README.md here."""

import argparse
import contextlib
import importlib.util
import io
import math
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from experiments import study
from vlm_jax.data import loader, sources, tokenizers
from vlm_jax.data.ops.image import STATISTICS

BATCH_SIZE, IMAGES = 64, 1024
WANTED = 400  # images a second, two workers on two cores
OPS = "decode | random_resized_crop(224, scale=(0.9, 1.0)) | normalize('clip') | caption('txt') | tokenize(77)"


def jpeg(seed: int) -> bytes:
    """A JPEG of 480x360 pixels with coarse, middle and fine detail, about 60 kB."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((360, 480, 3))
    for cell, weight in ((60, 0.55), (12, 0.25), (2, 0.2)):
        noise = Image.fromarray(rng.integers(0, 256, (360 // cell, 480 // cell, 3), dtype=np.uint8))
        picture += weight * np.asarray(noise.resize((480, 360), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, images: int, shards: int = 4) -> str:
    """Writes img2dataset's layout (jpg and txt); returns the URI."""
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, images, shards):
                for extension, data in (("jpg", jpeg(i)), ("txt", f"picture {i} of a thing on a table".encode())):
                    entry = tarfile.TarInfo(f"{i:09d}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return f"wds:{folder}/{{00000..{shards - 1:05d}}}.tar"


def rate(batches, workers: int, seconds: float) -> float:
    """Images a second in steady state: the workers run, and the batches computed ahead are used up."""
    for _ in range(4 * max(workers, 1)):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += BATCH_SIZE
    return count / (time.perf_counter() - start)


def cpu_ms(batches) -> float:
    """Process time of an image, in milliseconds: the median of three batches in this process."""
    next(batches)
    found = []
    for _ in range(3):
        start = time.process_time()
        next(batches)
        found.append(1000 * (time.process_time() - start) / BATCH_SIZE)
    return float(np.median(found))


def ours(uri: str, workers: int):
    """Batches without end."""
    tokenizer = tokenizers.build("clip")
    batches = loader.train_loader(uri=uri, ops=OPS, batch_size=BATCH_SIZE, tokenizer=tokenizer, workers=workers)
    try:
        yield from batches
    finally:
        batches.close()


class TorchDataset:
    """open_clip's training transform (PIL): RandomResizedCrop bicubic, ToTensor, Normalize; the same tokens as ours."""

    def __init__(self, uri: str):
        self.source, self.tokenizer = sources.open_source(uri), tokenizers.build("clip")

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        import torch

        record = self.source[i]
        image = Image.open(io.BytesIO(record["image"])).convert("RGB")
        left, top, right, bottom = random_box(image.width, image.height)
        image = image.crop((left, top, right, bottom)).resize((224, 224), Image.Resampling.BICUBIC)
        # torchvision's ToTensor and Normalize.
        x = torch.from_numpy(np.array(image, np.uint8, copy=True))
        x = x.view(224, 224, 3).permute((2, 0, 1)).contiguous().to(torch.float32).div(255)
        mean, std = (torch.as_tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in STATISTICS["clip"])
        return x.sub_(mean).div_(std), torch.from_numpy(self.tokenizer([record["txt"]], 77)[0])


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params with scale (0.9, 1.0); torch makes the draws."""
    import torch

    log_ratio = torch.log(torch.tensor((3 / 4, 4 / 3)))
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(0.9, 1.0).item()
        ratio = torch.exp(torch.empty(1).uniform_(log_ratio[0], log_ratio[1])).item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            top, left = torch.randint(0, height - h + 1, (1,)).item(), torch.randint(0, width - w + 1, (1,)).item()
            return left, top, left + w, top + h
    return 0, 0, width, height


def torchs(uri: str, workers: int):
    """Batches without end."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)  # as in torch's workers: threads that wait for each other cost CPU time, too
    context = "spawn" if workers else None  # as in Grain: this process has threads
    data = DataLoader(
        TorchDataset(uri),
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=context,
    )
    while True:
        yield from data


def measure(workers, repeats, seconds):
    """Measures a sitting: {loader: images a second} and {loader: CPU milliseconds of an image}."""
    loaders, packages = {"vlm_jax": ours}, ["numpy", "pillow"]
    if importlib.util.find_spec("torch"):
        loaders["torch"] = torchs
        packages.append("torch")
    else:
        print("torch is not installed: no comparison (pip install torch)")
    where, rates = study.machine(*packages), {name: [] for name in loaders}
    with tempfile.TemporaryDirectory() as folder:
        uri = write_shards(Path(folder), IMAGES)
        for _ in range(repeats):
            for name, batches in loaders.items():
                with contextlib.closing(batches(uri, workers)) as running:
                    rates[name].append(rate(running, workers, seconds))
        cpu = {}
        for name, batches in loaders.items():
            with contextlib.closing(batches(uri, 0)) as running:
                cpu[name] = cpu_ms(running)
    summary = dict(median=np.median, smallest=min, largest=max)
    shown = {name: {key: float(of(values)) for key, of in summary.items()} for name, values in rates.items()}
    return dict(machine=where, workers=workers, rates=shown, cpu_ms=cpu)


def of(sitting, measured, loader, key=None, digits=0):
    """A cell of the table; empty if the sitting has no such measurement."""
    found = sitting.get(measured, {}).get(loader)
    found = found.get(key) if key and found else found
    return "" if found is None else f"{found:,.{digits}f}"


def table(results):
    rates = [sitting for sitting in results if "rates" in sitting]
    rows = [
        [
            sitting["name"], *(of(sitting, "rates", "vlm_jax", key) for key in ("median", "smallest", "largest")),
            of(sitting, "rates", "torch", "median"), f"{sitting['rates']['vlm_jax']['median'] / WANTED:.2f}",
        ]
        for sitting in rates
    ]  # fmt: skip
    head = "images a second", "vlm_jax: median", "smallest", "largest", "torch: median", f"vlm_jax of {WANTED}"
    times = [sitting for sitting in results if "cpu_ms" in sitting]
    lines = [[name, *(of(sitting, "cpu_ms", name, digits=2) for sitting in times)] for name in ("vlm_jax", "torch")]
    names = ["CPU ms an image", *(sitting["name"] for sitting in times)]
    return f"{study.markdown(head, rows)}\n\n{study.markdown(names, lines)}"


def plot(results):
    figure, axes = study.subplots(1, 2, size=(10, 3.4))
    for ax, measured in zip(axes, ("rates", "cpu_ms"), strict=True):
        sittings = [sitting for sitting in results if measured in sitting]
        for i, name in enumerate(("vlm_jax", "torch")):
            values = [sitting[measured].get(name, 0) for sitting in sittings]
            if measured == "rates":
                values = [value and value["median"] for value in values]
            places = np.arange(len(sittings)) + 0.4 * (i - 0.5)
            ax.barh(places, values, 0.38, color=study.SHADES[2 * i], label=name, **study.BAR)
        ax.set_yticks(range(len(sittings)), [sitting["name"] for sitting in sittings])
        ax.invert_yaxis()
    axes[0].axvline(WANTED, color=study.INK, linestyle="--", linewidth=1, label="wanted, at least")
    axes[0].set_xlabel("images a second, two workers, median")
    axes[1].set_xlabel("CPU milliseconds of an image")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="of one measurement, start of the workers left out")
    parser.add_argument("--sitting", default="new", help="its name in the table; a sitting of that name is replaced")
    options = parser.parse_args()
    study.sit("input_pipeline", options.sitting, measure(options.workers, options.repeats, options.seconds))
    study.publish("input_pipeline", table, plot)


if __name__ == "__main__":
    main()
