"""The kinds of input that the package reads, each with a small whole one and its use.

A kind is (make, use): `make(folder)` writes the input into an empty folder and returns the name of the file to damage;
`use(folder)` reads all of it. Texts that users type are files, too, named "text".
"""

import dataclasses
import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece
from absl import flags
from flax.traverse_util import unflatten_dict

import vlm_jax
from tests.support import few_shot, fuzz_checkpoints, fuzz_data, fuzz_families
from tests.support.records import picture
from vlm_jax import command, report
from vlm_jax.adapt.heads.gda import gda
from vlm_jax.command import values
from vlm_jax.command.commands import define
from vlm_jax.data import ops, tokenizers
from vlm_jax.data.examples import Examples
from vlm_jax.data.files import write_json
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source
from vlm_jax.evaluators import classes
from vlm_jax.evaluators.progress import Progress
from vlm_jax.models import insertion
from vlm_jax.models.insertions.adapter import Adapter
from vlm_jax.params import masks, optim
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained.embedding import unit
from vlm_jax.run import checkpoint, folder
from vlm_jax.run.metric_writer import MetricWriter
from vlm_jax.zoo.adapters import save_adapter
from vlm_jax.zoo.shapes import param_shapes, shapes_of

TEXTS = ("a", "red fox", "THE quick  brown fox 😀", "")


# --- parameters ------------------------------------------------------------------------------------------------------


def of_masks(folder):
    np.savez(folder / "masks.npz", **{name: np.ones(leaf.shape, bool) for name, leaf in towers().items()})
    return "masks.npz"


@functools.cache
def towers():
    sizes = dict(width=8, depth=1, heads=2, mlp_dim=8, out_dim=4)
    return param_shapes(dict(image=dict(sizes, patch=4, image_size=8), text=dict(sizes, vocab_size=9, length=4)))


# --- tokenizers -----------------------------------------------------------------------------------------------------


def tokenize(spec: str) -> None:
    """Builds a tokenizer, and maps texts to ids and back."""
    tokenizer = tokenizers.build(spec)
    for text in TEXTS:
        try:
            tokenizer.decode(tokenizer.encode(text))
            tokenizer(text, 8)
        except BadExample:  # counted by the loader
            continue


def of_tokenizer_json(folder):
    corpus = ["red fox", "tired foxes", "sacred boxes"] * 4
    (folder / "tokenizer.json").write_text(tokenizers.train(corpus, 270))
    return "tokenizer.json"


@functools.cache
def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    corpus = [f"{a} {b}" for a in ("red", "tired", "sacred") for b in ("fox", "foxes", "boxes")]
    options = dict(vocab_size=18, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=model, **options)
    return model.getvalue()


def of_sentencepiece(folder):
    (folder / "spm.model").write_bytes(sentencepiece_model())
    return "spm.model"


def of_wordpiece(folder):
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nred\nfox\n##es\n")
    return "vocab.txt"


def of_bpe(folder, damage="vocab.json"):
    specials = {"<|startoftext|>": 4, "<|endoftext|>": 5}
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "a</w>": 2, "ab</w>": 3} | specials))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return damage


# --- adapters -------------------------------------------------------------------------------------------------------


@functools.cache
def adapters() -> dict[str, bytes]:
    """Files of a head and of inserted modules."""
    base, files = few_shot.clip_like(scan=True), {}
    rng = np.random.default_rng(0)
    features, text = (unit(rng.standard_normal((n, few_shot.D))) for n in (6, 3))
    model = insertion.inserted(base.model, Adapter(width=2))
    new = insertion.new_leaves(unflatten_dict(shapes_of(model, 4), sep="/"))
    leaves = named_leaves(base.params) | {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in new.items()}
    changes = {
        "head": dict(head=gda(features, np.arange(6) % 3, text, 10.0)),
        "modules": dict(model=model, params=unflatten_dict(leaves, sep="/")),
    }
    with tempfile.TemporaryDirectory() as where:
        for name, change in changes.items():
            save_adapter(Path(where, name), base, dataclasses.replace(base, classes=few_shot.NAMES, **change))
            files[name] = Path(where, name).read_bytes()
    return files


def of_adapter(folder, kind="head"):
    (folder / "a.safetensors").write_bytes(adapters()[kind])
    return "a.safetensors"


def of_adapter_metadata(folder):
    data = adapters()["head"]
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    (folder / "about.json").write_text(header["__metadata__"]["vlm_jax.adapter"])
    return "about.json"


def use_adapter_metadata(folder):
    data = adapters()["head"]
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["vlm_jax.adapter"] = text_of(folder / "about.json")
    text = json.dumps(header).encode()
    (folder / "a").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    use_adapter(folder / "a")


def use_adapter(path):
    vlm_jax.load_adapter(path, few_shot.clip_like(scan=True))


# --- runs -----------------------------------------------------------------------------------------------------------

SETTINGS = dict(model=dict(name="two_tower"), data=dict(uri="jsonl:x"), batch_size=8, duration="2 steps")
RESULTS = {"step": 2, "params_sha256": "ab", "train/seconds": 1.5, "zeroshot/top1": 0.25, "zeroshot/examples": 9.0}


def of_run(folder, damage="results.json"):
    (folder / "checkpoints" / "2").mkdir(parents=True)
    write_json(folder / "results.json", RESULTS)
    write_json(folder / "config.json", SETTINGS)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5, "lr": 0.1}\n')
    return damage


def use_run(folder):
    """What training, again, and the report read of a run."""
    checkpoint.finished(folder, SETTINGS)
    checkpoint.check_same_config(folder / "config.json", SETTINGS)
    MetricWriter(folder, start_step=1, tensorboard=False).close()
    report.series(folder)
    (folder / "metrics.jsonl").unlink()  # its figure is a kind of its own
    report.write(folder)


def of_artifacts(folder, damage="artifacts/retrieval.json"):
    (folder / "artifacts").mkdir()
    write_json(folder / "artifacts" / "retrieval.json", {"name": "retrieval", "artifacts": {"confusion/names": ["a"]}})
    np.savez_compressed(folder / "artifacts" / "retrieval.npz", **{"other/numbers": np.ones(3)})
    return damage


def of_progress(folder):
    progress = Progress(folder / "progress")
    progress.begin(examples=3)
    progress.table("train", 1e6).append(feature=np.ones((3, 2), np.float32), label=np.arange(3))
    progress.save(now=True, train_batches=1)
    return "progress/progress.json"


def use_progress(folder):
    progress = Progress(folder / "progress")
    progress.begin(examples=3)
    table = progress.table("train", 1e6)
    if len(table):
        table.read("feature")
    table.append(feature=np.ones((1, 2), np.float32), label=np.arange(1))
    progress.save(now=True, train_batches=2)
    progress.delete()


def of_lock(where):
    (where / folder.NAME).write_text(json.dumps({"host": "here", "pid": 1, "since": "2026-01-01 00:00:00"}))
    return folder.NAME


def use_lock(where):
    seconds, folder.PULSE_SECONDS = folder.PULSE_SECONDS, 0.001
    try:
        with folder.locked(where):
            pass
    finally:
        folder.PULSE_SECONDS = seconds


# --- texts ----------------------------------------------------------------------------------------------------------


def text_of(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape")


def typed(text: str, use: Callable[[str], None]) -> tuple:
    """A kind that is one text."""

    def make(folder):
        (folder / "text").write_text(text)
        return "text"

    return make, lambda folder: use(text_of(folder / "text"))


def read_scenes(text):
    source = open_source(text, "train")
    source[len(source) - 1]


def parse_ops(text):
    pipeline = ops.parse(text, few_shot.clip_like(scan=True).tokenizer)
    record = {"image": picture(9, 7), "text": "a red fox", "captions": ["a", "b"], "label": 3}
    try:
        Examples([record], pipeline, None, 0).read(0, 0)
    except BadExample:  # counted by the loader
        return


def override(text):
    defined = flags.FlagValues()
    define("train", defined)
    command.parse("train", ["train", "--config=clip:smoke", "--workdir=x", f"--config.{text}"], defined)


def flag(command_name: str, name: str) -> Callable[[str], None]:
    def use(text):
        defined = flags.FlagValues()
        define(command_name, defined)
        needed = [f"--{one}=x" for one in ("model", "task", "method", "data", "out") if one in defined]
        command.parse(command_name, [command_name, *needed, f"--{name}={text}"], defined)
        values.given(defined, [name])

    return use


def masks_of(folder):
    masks.trainable(unflatten_dict(towers(), sep="/"), str(folder / "masks.npz"), where="config.mask")


KINDS = {
    **fuzz_data.KINDS,
    "masks": (of_masks, masks_of),
    "uri": typed("wds:/nowhere/{000..002}.tar", lambda text: fuzz_data.read_source(text)),
    "scenes": typed("scenes:?size=64x48&objects=1-6&styles=twemoji,fxemoji&examples=3&seed=1", read_scenes),
    "tokenizer_json": (of_tokenizer_json, lambda folder: tokenize(f"json:{folder}/tokenizer.json")),
    "sentencepiece": (of_sentencepiece, lambda folder: tokenize(f"sentencepiece:{folder}/spm.model")),
    "wordpiece": (of_wordpiece, lambda folder: tokenize(f"wordpiece:{folder}/vocab.txt")),
    "bpe_vocabulary": (of_bpe, lambda folder: tokenize(f"bpe:{folder}/vocab.json")),
    "bpe_merges": (
        lambda folder: of_bpe(folder, "merges.txt"),
        lambda folder: tokenize(f"bpe:{folder}/vocab.json"),
    ),
    "tokenizer_spec": typed("emoji?pad_id=0&lower=true", tokenize),
    "adapter": (of_adapter, lambda folder: use_adapter(folder / "a.safetensors")),
    "adapter_modules": (
        lambda folder: of_adapter(folder, "modules"),
        lambda folder: use_adapter(folder / "a.safetensors"),
    ),
    "adapter_metadata": (of_adapter_metadata, use_adapter_metadata),
    "results": (of_run, use_run),
    "metrics": (lambda folder: of_run(folder, "metrics.jsonl"), use_run),
    "run_config": (lambda folder: of_run(folder, "config.json"), use_run),
    "curves": (lambda folder: of_run(folder, "metrics.jsonl"), report.write),
    "artifacts": (of_artifacts, report.write),
    "artifacts_arrays": (lambda folder: of_artifacts(folder, "artifacts/retrieval.npz"), report.write),
    "progress": (of_progress, use_progress),
    "lock": (of_lock, use_lock),
    "ops": typed(
        "decode | random_resized_crop(8, (0.5, 1.0)) | flip(0.5) | normalize('clip') | keep('image')", parse_ops
    ),
    "text_ops": typed("caption('captions') | lower | tokenize(8, bos=False) | keep('token_ids', 'label')", parse_ops),
    "override": typed("optimizer.lr=1e-3", override),
    "where": typed("style=noto,twemoji", flag("evaluate", "where")),
    "option": typed("kinds=['order', 3]", flag("evaluate", "option")),
    "classes_flag": typed("{7: 'cat', 3: 'dog'}", flag("adapt", "classes")),
    "mesh": typed("data=2,fsdp=4", flag("evaluate", "mesh")),
    "duration": typed("3 epochs", lambda text: optim.duration_to_steps(text, 8, 100, 1000)),
    "classes_txt": (
        lambda folder: (folder / "c.txt").write_text("cat\ndog\nred fox\n") and "c.txt",
        lambda folder: classes.read(str(folder / "c.txt")),
    ),
    "classes_json": (
        lambda folder: (folder / "c.json").write_text('{"0": "cat", "1": "dog"}') and "c.json",
        lambda folder: classes.read(str(folder / "c.json")),
    ),
    "templates": (
        lambda folder: (folder / "t.json").write_text('["a {}", "the {}."]') and "t.json",
        lambda folder: classes.read_templates(str(folder / "t.json")),
    ),
    **fuzz_checkpoints.KINDS,
    **fuzz_families.KINDS,
}
