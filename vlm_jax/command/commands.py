"""The commands of vlm-jax and their flags. This module imports nothing heavy, so that `--help` answers at once.

A command's description and examples stand in the docstring of its module; see `help_page`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from absl import flags

from vlm_jax.command import configs


class Flag(NamedTuple):
    """A flag.

    Attributes:
      define: a function of absl.flags, or `configs.define`.
      name, help, default: arguments of `define`.
      needed: whether the command requires the flag.
    """

    define: Callable
    name: str
    help: str
    default: Any = None
    needed: bool = False


class Command(NamedTuple):
    """A command: `vlm_jax.NAME`.

    Attributes:
      flags: heading in `--help` -> the flags below that heading.
      arguments: names of the positional arguments; brackets mark optional ones.
      families: families of the methods that the command takes, see `vlm_jax.catalogue`; `--help` lists the methods.
      module: where it is not the command's name, the name of its module below `vlm_jax`.
    """

    flags: Mapping[str, Sequence[Flag]]
    arguments: str = ""
    families: Sequence[str] = ()
    module: str = ""

    def all(self) -> list[Flag]:
        """Returns the command's flags and the flags of every command."""
        return [*(flag for group in self.flags.values() for flag in group), *EVERY]


def _define_path(name: str, default: str | None, help: str, flag_values: flags.FlagValues) -> None:
    """A flag with a path, whose `~` is the home folder."""
    parser = flags.ArgumentParser()
    parser.parse = os.path.expanduser
    flags.DEFINE(parser, name, default, help, flag_values=flag_values)


text = partial(Flag, flags.DEFINE_string)
path = partial(Flag, _define_path)
several = partial(Flag, flags.DEFINE_multi_string)
listed = partial(Flag, flags.DEFINE_list)
whole = partial(Flag, flags.DEFINE_integer)
switch = partial(Flag, flags.DEFINE_bool, default=False)
config = partial(Flag, configs.define, "config", needed=True)

EVERY = (
    switch("json", "Print one JSON object instead of a table; progress goes to stderr"),
    switch("debug", "Show the traceback of an error"),
)
DISTRIBUTED = text("distributed", "On several hosts: auto, or address:port,processes,index")

MODEL = text("model", "A workdir, a folder, a file, hf:org/name, pkg:package/path", needed=True)
DATA = text("data", "Data set: tfds:, wds:, arrayrecord:, parquet:, jsonl:, csv:, folder:", needed=True)
OUTSIDE = switch("allow_outside", "Pictures may be outside of the data set's folder")
LABELLED = (
    text("split", "The data set's split"),
    several("where", "Records that count: field=value,value; repeatable"),
    text("label", "The field with the label"),
    text("classes", "imagenet, emoji:seen, emoji:subgroups, a file, a list (the data set's own)"),
    several("templates", "imagenet80, a file, a prompt with {}; repeatable"),
    whole("batch_size", "Pictures at a time over all devices", 256),
    OUTSIDE,
)
ADAPTER = path("adapter", "File of an adapted model, made by `vlm-jax adapt`, or a folder of PEFT")
LOADING = (  # the arguments of `vlm_jax.load`
    text("preprocess", "For model files without preprocessing: openai, siglip, ..., or an op string"),
    text("tokenizer", "For model files without tokenizer: clip, json:/path, ..."),
    text("tokenize", "For model files without tokenization: e.g. tokenize(77)"),
    text("activation", "For bare CLIP weights (quick_gelu, gelu) and T5X (gelu_tanh, silu)"),
    whole("heads", "For bare files whose tensors do not tell it: attention heads of the image tower", None),
    text("pool", "For bare files whose tensors do not tell it: gap, first, last, ..."),
    text("weights", "ema: the averaged weights of a training checkpoint"),
    listed("image_size", "Another size than the model's: 384 or 384,288; needs --resample"),
    text("resample", "Resampling of learned positions to --image_size: linear, bicubic, bicubic_sharp"),
    whole("text_length", "Another number of tokens of texts: 248 for a CLIP of 77", None),
    text("dtype", "Compute dtype (the run's own, else float32)"),
    ADAPTER,
)
ADAPTED = tuple(flag for flag in LOADING if flag.name != "pool")  # `adapt` has a pool of pictures

COMMANDS = {
    "train": Command(
        {
            "": (
                config("Experiment: NAME:VARIANT of configs/, e.g. clip:smoke, or a file, mine.py:VARIANT"),
                path("workdir", "Folder of the run: checkpoints, metrics, results, report", needed=True),
                DISTRIBUTED,
            )
        }
    ),
    "evaluate": Command(
        {
            "": (
                MODEL,
                text("task", "Name of an evaluator", needed=True),
                DATA,
                path("out", "Folder for results.json, artifacts and report", needed=True),
            ),
            "data": LABELLED,
            "task": (
                listed("captions", "retrieval, captions: the fields with captions"),
                text("template", "retrieval: a prompt, {} for the caption"),
                listed("ks", "retrieval: the k of recall@k, e.g. 1,5,10"),
                text("train_data", "probe: data set to learn from (--data)"),
                whole("gallery", "Pictures in the report (24)"),
                several("option", "Any other argument of the task: name=value; repeatable"),
            ),
            "model": LOADING,
            "machine": (
                listed("mesh", "data=2,fsdp=4,tensor=1 (all devices in data)"),
                Flag(flags.DEFINE_float, "memory_share", "Share of the free memory for embeddings (0.25)"),
                DISTRIBUTED,
            ),
        },
        families=("evaluators",),
    ),
    "adapt": Command(
        {
            "": (
                MODEL,
                listed("method", "Names of methods, separated by commas", needed=True),
                DATA,
                path("out", "Folder for results.json and the adapters", needed=True),
            ),
            "draws": (
                whole("shots", "Training pictures of each class", 16),
                whole("pool", "Training pictures without labels, for methods that use such pictures", 0),
                Flag(flags.DEFINE_float, "seen", "Share of the classes with labels; the pool is of the others (1.0)"),
                whole("budget", "Labels of the pool that a strategy asks for, in place of the shots", 0),
                whole("rounds", "In so many rounds (8)", None),
                text("acquisition", "Strategy that chooses what to label, see acquisitions (pcb)"),
                whole("seeds", "Number of random draws", 3),
                text("train_data", "Data set to draw from (--data), e.g. csv:train.csv beside --data=csv:test.csv"),
                text("train_split", "The split to draw from (train)"),
                several("train_where", "Records of that split that count: field=value,value; repeatable"),
                switch("base_to_new", "Train on half of the classes, test the others as well"),
                several("option", "Options of the methods: steps=100, learning_rate=1e-3, rank=8; repeatable"),
            ),
            "data": LABELLED,
            "model": ADAPTED,
        },
        families=("heads", "parameters", "modules", "prompts", "acquisitions"),
    ),
    "convert": Command(
        {
            "": (
                text("format", "What to write: native, hf, open_clip, big_vision, t5x, stablehlo, peft", "native"),
                text("dtype", "Of the weights in DST: float32 or bfloat16", "float32"),
                switch("inspect", "Describe SRC and where each tensor goes; convert nothing"),
            ),
            "model": (
                *LOADING[:7],
                listed("image_size", "For positions of unknown grid: 384 or 384,288"),
                ADAPTER,
            ),
        },
        arguments="SRC DST",
    ),
    "precompute": Command(
        {
            "": (
                config("Experiment with model_init or teachers, e.g. lit:tiny or configs/lit.py:tiny"),
                DATA._replace(needed=False),
                path("out", "Folder of the embeddings", needed=True),
                text("split", "The data set's split"),
                whole("views", "Views of each example of the config's data, embedded by its teachers", None),
                whole("batch_size", "Pictures at a time", 64),
                OUTSIDE,
                DISTRIBUTED,
            )
        }
    ),
    "plan": Command(
        {
            "": (
                config("Experiment, e.g. ul2:20b or configs/ul2.py:20b"),
                text("topology", "Slice: v5e:16x16, v5p:4x8x8, v6e:16x16, h100:1x1x8, ... (this machine)"),
                switch("search", "Search for the fastest mesh, remat and accumulation"),
                switch("table", "Also print the parameters and their shardings"),
                switch("codegen", "Also generate TPU machine code: takes minutes, gives the same plan"),
            )
        }
    ),
    "compare": Command(
        {"": (path("out", "Also write one HTML page, comparison.html, with figures"),)}, arguments="RUN RUN ..."
    ),
    "methods": Command(
        {"": (text("family", "Only one family: heads, modules, prompts, objectives, ..."),)}, arguments="[NAME ...]"
    ),
    "models": Command({}, arguments="[NAME]", module="zoo"),
    "index": Command(
        {
            "": (
                path("out", "Folder of the index (beside the shards)"),
                text("to", "Copy the shards instead: arrayrecord"),
                whole("workers", "Processes that read shards (one a core)"),
            )
        },
        arguments="URI",
    ),
    "inspect": Command(
        {
            "": (
                text("split", "The data set's split"),
                whole("sample", "Records that are looked at", 1000),
                path("out", "File to write as a page with pictures"),
            )
        },
        arguments="URI",
    ),
    "score": Command(
        {
            "": (
                MODEL,
                DATA,
                text("caption", "The field with the text", "text"),
                listed("fields", "Further fields to store: concept,language"),
                switch("embeddings", "Store embeddings of the pictures, by which near duplicates are found"),
                path("out", "Folder of the scores", needed=True),
            ),
            "data": (*LABELLED[:2], *LABELLED[5:]),
            "model": LOADING,
            "machine": (
                listed("mesh", "data=2,fsdp=4,tensor=1 (all devices in data)"),
                Flag(flags.DEFINE_float, "memory_share", "Share of the free memory for the scores (0.25)"),
                DISTRIBUTED,
            ),
        }
    ),
    "select": Command(
        {
            "": (
                text("by", "Rules: top('similarity', 0.3) | unlike(0.95) | cap('concept', 100)", needed=True),
                path("out", "The index to write, .npz", needed=True),
                whole("seed", "Of what `cap` draws", 0),
            )
        },
        arguments="SCORES",
    ),
    "data.train_tokenizer": Command(
        {
            "": (
                text("uri", "The data set, as in config.data.uri", needed=True),
                listed("fields", "Text fields, nested ones as name/en", needed=True),
                path("out", "The file to write", needed=True),
                text("split", "The data set's split"),
                whole("vocab_size", "Maximum number of tokens, including 256 bytes and 3 special tokens", 4096),
            )
        }
    ),
    "data.emoji.build": Command(
        {
            "": (
                path("tarballs", "Folder of the npm tarballs; fetched if missing", needed=True),
                path("out", "Folder to replace with the prepared files (the package's own)"),
            )
        }
    ),
}


def define(name: str, values: flags.FlagValues) -> None:
    """Defines the flags of a command. An import defines none, because the importing program has its own flags."""
    for flag in COMMANDS[name].all():
        flag.define(flag.name, flag.default, flag.help, flag_values=values)
