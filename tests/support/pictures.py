"""A small data set in a folder: pictures of noise with captions, some of them broken."""

import io
import json

import numpy as np
from PIL import Image


def write_pictures(folder, count, truncated=(), empty=(), sizes=((32, 32),)):
    """Writes data.jsonl and JPEGs of sizes (height, width), in turns.

    Those in `truncated` are cut short, those in `empty` have no caption.
    """
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*sizes[i % len(sizes)], 3), np.uint8)).save(data, "JPEG")
        (folder / f"{i}.jpg").write_bytes(data.getvalue()[: 300 if i in truncated else None])
        rows.append(json.dumps({"image": f"{i}.jpg", "text": "" if i in empty else f"picture {i}"}))
    (folder / "data.jsonl").write_text("\n".join(rows))
