"""Images a second of the input pipeline: JPEGs 480x360 (60 kB) -> RandomResizedCrop(224) -> normalise -> CLIP tokens.

    python experiments/input_pipeline/measure.py --workers=2

Writes tar shards of synthetic JPEGs to a temporary folder and reads them with `vlm_jax.data.loader` and, where torch is
installed, with a torch DataLoader whose steps are those of open_clip's training transform. The two take turns, so that
a busy machine is unfair to neither. Expected on 2 cores: at least 400 images a second with 2 workers.
"""

import io
import math
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

from vlm_jax.data import image_ops, loader, sources, tokenizers

WORKERS = flags.DEFINE_list("workers", ["2"], "Numbers of worker processes to measure.")
SECONDS = flags.DEFINE_float("seconds", 8, "Length of one measurement, start of the workers left out.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements of each.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Images of a batch.")
IMAGES = flags.DEFINE_integer("images", 1024, "Different images in the shards.")

OPS = "decode | random_resized_crop(224, scale=(0.9, 1.0)) | normalize('clip') | caption('txt') | tokenize(77)"


def jpeg(seed: int) -> bytes:
    """A picture 480x360 of coarse, middle and fine detail; about 60 kB as JPEG of quality 88."""
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


def rate(batches, batch_size: int, workers: int, seconds: float) -> float:
    """Images a second, once the workers run and what they computed ahead is used up."""
    for _ in range(4 * max(workers, 1)):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - start)


def ours(uri: str, workers: int) -> float:
    batches = loader.train_loader(
        uri=uri,
        ops=OPS,
        batch_size=BATCH_SIZE.value,
        tokenizer=tokenizers.build("clip"),
        workers=workers,
    )
    try:
        return rate(batches, BATCH_SIZE.value, workers, SECONDS.value)
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
        mean, std = (torch.as_tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in image_ops.STATISTICS["clip"])
        return x.sub_(mean).div_(std), torch.from_numpy(self.tokenizer([record["txt"]], 77)[0])


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params with scale (0.9, 1.0), its draws by torch."""
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


def torchs(uri: str, workers: int) -> float:
    from torch.utils.data import DataLoader

    context = "spawn" if workers else None  # as Grain's; this process has threads
    data = DataLoader(
        TorchDataset(uri),
        BATCH_SIZE.value,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=context,
    )

    def forever():
        while True:
            yield from data

    return rate(forever(), BATCH_SIZE.value, workers, SECONDS.value)


def main(argv):
    del argv
    contestants = {"vlm_jax": ours}
    try:
        import torch

        contestants[f"torch {torch.__version__} DataLoader"] = torchs
    except ImportError:
        print("torch is not installed: no comparison (pip install torch)")
    with tempfile.TemporaryDirectory() as folder:
        uri = write_shards(Path(folder), IMAGES.value)
        source = sources.open_source(uri)
        size = np.mean([len(source[i]["image"]) for i in range(64)])
        setting = f"{len(source)} JPEGs 480x360 of {size / 1000:.0f} kB, batches of {BATCH_SIZE.value}"
        print(f"{setting}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
        print("\n| loader | workers | images/s: median | smallest | largest |\n|---|---|---|---|---|")
        for workers in map(int, WORKERS.value):
            rates = {name: [] for name in contestants}
            for _ in range(REPEATS.value):
                for name, measure in contestants.items():
                    rates[name].append(measure(uri, workers))
            for name, values in rates.items():
                print(f"| {name} | {workers} | {np.median(values):.0f} | {min(values):.0f} | {max(values):.0f} |")
                sys.stdout.flush()


if __name__ == "__main__":
    app.run(main)
