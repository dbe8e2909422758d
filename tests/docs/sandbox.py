"""What the pages of docs/ take for granted, made small: pictures, texts, shards, released models, a cloud, a cluster.

All pictures are the embedded ones, all weights of released models are random: a page is right if its commands run and
say what it says that they say, not if a model knows much.
"""

import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import sentencepiece
from PIL import Image

import vlm_jax
from configs import clip
from tests.support.released import unpack
from vlm_jax import models
from vlm_jax.data import emoji, sources, tokenizers
from vlm_jax.data.class_lists import packaged
from vlm_jax.data.train_tokenizer import corpus
from vlm_jax.pretrained import Pretrained

ROOT = Path(__file__).parents[2]
CLASSES = ("banana", "bicycle", "cat", "guitar", "pizza", "umbrella")


# --- data sets ------------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Pictures and texts under the names that the pages use."""
    train, test = (sources.open_source("tfds:emoji", split) for split in ("train", "unseen_style"))
    _write_pictures(folder / "pictures", train, test)
    records = [test[i] for i in range(0, len(test), 24)]
    _write_table(folder / "data" / "pairs.jsonl", records, lambda texts: {"text": texts[0]})
    _write_table(folder / "data" / "flickr" / "test.jsonl", records, lambda texts: {"captions": texts})
    for shard in ("00000", "00001"):
        _write_shard(folder / "data" / "laion" / f"{shard}.tar", records[:32])
    for number, name in enumerate(packaged("wordnet_ids")["imagenet"]):
        path = folder / "data" / "imagenet" / "val" / name / "0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(records[number % len(records)]["image"])
    texts = [", ".join(test[i]["keywords"]["en"]) for i in range(256)]
    (folder / "data" / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "c4_en.model").write_bytes(_sentencepiece())


def _write_pictures(folder, train, test):
    """train/NAME/*.png, ten of each, and test/NAME/*.png; cat.png and umbrella.png beside the folder."""
    number = {name: concept for concept, name in emoji.concepts().items()}
    names = {number[name]: name for name in CLASSES}
    for split, source in (("train", train), ("test", test)):
        for i in sources.select(source, {"concept": list(names)}):
            record = source[i]
            name = names[record["concept"]]
            picture = Image.open(io.BytesIO(record["image"])).convert("RGB")
            path = folder / split / name / f"{record['style']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            if split == "train":
                picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path.with_stem(f"{path.stem}_flipped"))
            elif name in ("cat", "umbrella"):
                picture.save(folder.parent / f"{name}.png")


def _write_table(path, records, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, record in enumerate(records):
        (path.parent / f"{path.stem}_{i}.png").write_bytes(record["image"])
        row = {"image": f"{path.stem}_{i}.png"} | texts([record["name"]["en"], *record["keywords"]["en"][:4]])
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


def _write_shard(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, record in enumerate(records):
            for suffix, data in (("png", record["image"]), ("txt", record["name"]["en"].encode())):
                member = tarfile.TarInfo(f"{i:06}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _sentencepiece() -> bytes:
    texts = corpus(sources.open_source("tfds:emoji", "unseen_style"), ["keywords/en", "name/en"])
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=stream, vocab_size=400, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return stream.getvalue()


# --- released models ------------------------------------------------------------------------------------------------


def write_hub(folder: Path, spiece: Path) -> None:
    """A cache of the Hugging Face hub with models of one block, under the names of released ones."""
    section = clip.get_config("B/32").to_dict()
    shrunk = {side: dict(section["model"][side], variant="mu/32"[: -3 if side == "text" else None], out_dim=32)
              for side in ("image", "text")}  # fmt: skip
    model = dict(section["model"], dtype="float32", **shrunk)
    picture, words = np.zeros((1, 224, 224, 3), np.float32), np.zeros((1, 77), np.int32)
    two_towers = _random(model, (picture, words), "clip", section["preprocess"], section["tokenize"])
    vlm_jax.save_pretrained(two_towers, _snapshot(folder, "openai/clip-vit-base-patch32"), "hf")

    vit = dict(variant="mu/16", image_size=224, pool="tok", cls_position=True, norm_eps=1e-12, out_dim=10)
    image = _random(dict(image=vit, text=None), (picture, None), None, "decode | resize(224) | normalize", None)
    vlm_jax.save_pretrained(image, _snapshot(folder, "google/vit-base-patch16-224"), "hf")

    tokenizer = f"sentencepiece:{spiece}?extra_ids=100"
    sizes = dict(width=32, depth=1, heads=2, head_dim=16, mlp_dim=64, activation="gelu_tanh")
    decoder = dict(sizes, vocab_size=tokenizers.build(tokenizer).vocab_size, length=512)
    section = dict(name="encoder_decoder", encoder=sizes, decoder=decoder)
    t5 = _random(section, (words, words), tokenizer, None, "tokenize(512, bos=False)")
    vlm_jax.save_pretrained(t5, _snapshot(folder, "google/flan-t5-base"), "hf")

    coca = _snapshot(folder, "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k")
    coca.mkdir()
    unpack("coca", coca)


def _random(section, inputs, tokenizer, preprocess, tokenize) -> Pretrained:
    model = models.build(section)
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    built = tokenizers.build(tokenizer) if tokenizer else None
    return Pretrained(model, params, built, preprocess, tokenize, dict(model=section, tokenizer=tokenizer))


def _snapshot(folder: Path, name: str) -> Path:
    """The folder of a repository's files in a cache, still to be made."""
    repository, commit = folder / f"models--{name.replace('/', '--')}", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    return repository / "snapshots" / commit


# --- programs -------------------------------------------------------------------------------------------------------

JOB = "SLURM_JOB_ID=$$ SLURM_STEP_NODELIST=localhost SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0"
PROGRAMS = {
    "vlm-jax": 'exec {python} -m tests.docs.shrunk -m vlm_jax "$@"',
    "python": 'exec {python} -m tests.docs.shrunk "$@"',
    # an environment is there already, so that nothing is installed; that the extras exist is checked
    "activate": "",
    "python3": 'case "$*" in "-m venv "* | "-m pip "*) ;; *) exit 2;; esac',
    "pip": 'exec {python} -m tests.docs.shrunk pip "$@"',
    "ruff": 'exec {python} -m ruff "$@"',
    "uv": 'case "$1" in venv) mkdir .venv && ln -s "$DOCS_PROGRAMS" .venv/bin;; pip) shift; exec pip "$@";; esac',
    # a cluster of one task, and a cloud whose one host is a folder
    "sbatch": 'script=$1; shift; SLURM_JOB_NAME=$(basename "$script" .sbatch) SLURM_JOB_ID=$$ bash "$script" "$@"',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; export ' + JOB + '; exec "$@"',
    "scontrol": "exit 2",  # no job is to come again
    "git": 'case "$1" in archive) tar czf "${{2#--output=}}" configs pyproject.toml;; *) exit 2;; esac',
    "gcloud": """
command=${{@: -1}}
case "$4" in
    describe) [ -d host ];;
    create) mkdir host;;
    scp) cp "$6" host/;;
    ssh) cd host && export """
    + JOB
    + """ && bash -c "${{command#--command=}}";;
    *) exit 2;;
esac
""",
}


def write_programs(folder: Path) -> dict[str, str]:
    """Puts stand-ins for programs into `folder` and returns the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    for name, text in PROGRAMS.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/bash\nexport PYTHONPATH=.:{ROOT}\n" + text.format(python=sys.executable) + "\n")
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "HF_HOME": str(folder.parent / "hf"),
        "HF_HUB_OFFLINE": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # others on this computer may plan, too
        "DOCS_DATA": str(folder.parent / "data"),
        "DOCS_PROGRAMS": str(folder / "bin"),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def write_checkout(folder: Path, shared: Path) -> None:
    """A page's folder: the repository's files that commands name, an environment that is installed, the data."""
    for name in ("configs", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("colab", "docs", "tests", "vlm_jax"):
        (folder / name).symlink_to(ROOT / name)
    for path in (shared / "data").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(shared / "programs" / "bin")
    for extra in ("", "-test", "-parity", "-docs"):
        (folder / ".venv" / f"installed{extra}").touch()  # newer than what make compares it with
