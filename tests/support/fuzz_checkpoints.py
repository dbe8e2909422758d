"""The kinds of released checkpoints for `fuzz_kinds`: files of tensors, and the settings beside them."""

import functools
import io
import json

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import vlm_jax
from tests.support.released import unpack
from tests.support.torch_pickles import STATE, STORAGES
from tests.support.torch_writer import Call, Object, dumps, legacy_bytes, zip_bytes
from vlm_jax.data.files import write_json
from vlm_jax.errors import UserError
from vlm_jax.run import checkpoint
from vlm_jax.run.program import TrainState
from vlm_jax.zoo import recognize
from vlm_jax.zoo.readers.tensors import open_tensors, write_safetensors
from vlm_jax.zoo.shapes import param_shapes

ARRAYS = {
    "image/kernel": np.arange(60, dtype=np.float32).reshape(3, 4, 5),
    "image/bias": np.arange(8).astype(ml_dtypes.bfloat16),
    "ids": np.arange(6).reshape(2, 3),
    "scale": np.array(2.5, np.float16),
}


def of_safetensors(folder):
    write_safetensors(folder / "seed", ARRAYS, {"format": "np"})
    return (folder / "seed").read_bytes()


def of_npz(folder, save=np.savez):
    out = io.BytesIO()
    save(out, **ARRAYS, fortran=np.asfortranarray(np.ones((3, 4))))
    return out.getvalue()


def of_torch(folder):
    weights = Call("collections.OrderedDict", ([[name, tensor] for name, tensor in STATE.items()],))
    return zip_bytes({"epoch": 3, "state_dict": weights, "args": {"lr": 0.1, "betas": (1, 2)}}, STORAGES)


def of_torchscript(folder):
    module = Object("__torch__.Linear", {"training": True, **STATE})
    return zip_bytes(Object("__torch__.CLIP", {"visual": module}), STORAGES, {"constants.pkl": dumps(())})


def of_index(folder):
    write_safetensors(folder / "shard", ARRAYS)
    return json.dumps({"metadata": {"a": 1}, "weight_map": dict.fromkeys(ARRAYS, "shard")}).encode()


SEEDS = {
    "safetensors": of_safetensors,
    "npz": of_npz,
    "npz_compressed": lambda folder: of_npz(folder, np.savez_compressed),
    "torch": of_torch,
    "torchscript": of_torchscript,
    "torch_legacy": lambda folder: legacy_bytes({"model": STATE, "step": 1}, STORAGES),
    "shard_index": of_index,
}


def read_all(path) -> bool:
    """Whether the file is read, every tensor of it; False where a UserError of one line refuses it."""
    try:
        for tensor in open_tensors(path).tensors.values():
            array = tensor.read()
            assert array.shape == tensor.shape and array.dtype == tensor.dtype
            tensor.read(tuple(slice(0, None, 2) for _ in tensor.shape))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        return False
    return True


def _tensors(seed):
    def make(folder):
        (folder / "file").write_bytes(seed(folder))
        return "file"

    return make, lambda folder: read_all(folder / "file")


def _released(name, damage):
    """A folder of Transformers or open_clip, of which the settings are damaged."""

    def make(folder):
        unpack(name, folder)
        (folder / "gradients.safetensors").unlink(missing_ok=True)
        for extra in ("tokenizer.json", "preprocessor_config.json", "tokenizer_config.json"):
            if extra == damage and not (folder / extra).exists():
                (folder / extra).write_text(json.dumps(EXTRAS[extra]))
        return damage

    return make, lambda folder: recognize.understand(folder)


EXTRAS = {
    "preprocessor_config.json": dict(
        image_processor_type="CLIPImageProcessor", size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8},
        resample=3, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], do_normalize=True,
    ),
    "tokenizer_config.json": dict(tokenizer_class="CLIPTokenizer", pad_token="<|endoftext|>", model_max_length=8),
}  # fmt: skip

SECTION = dict(
    name="two_tower", image=dict(width=4, depth=1, heads=1, mlp_dim=4, patch=4, image_size=8), text=None
)  # fmt: skip


def of_native(folder):
    arrays = {name: np.zeros(leaf.shape, np.float32) for name, leaf in param_shapes(SECTION).items()}
    write_safetensors(folder / recognize.PARAMS, arrays)
    write_json(folder / "config.json", dict(model=SECTION, preprocess="decode | resize(8) | normalize", tokenizer=None))
    return "config.json"


@functools.cache
def _saved() -> dict[str, bytes]:
    """The files of a workdir with one checkpoint."""
    import tempfile
    from pathlib import Path

    from flax.traverse_util import unflatten_dict

    flat = {name: jnp.zeros(leaf.shape) for name, leaf in param_shapes(SECTION).items()}
    with tempfile.TemporaryDirectory() as folder:
        saver = checkpoint.Checkpointer(folder)
        saver.save(1, TrainState(step=jnp.int32(1), params=unflatten_dict(flat, sep="/"), opt_state=(), ema=None), {})
        saver.close()
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def of_workdir(folder, damage="config.json"):
    for name, data in _saved().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    settings = dict(model=SECTION, preprocess="decode | resize(8) | normalize", tokenizer=None, tokenize=None)
    write_json(folder / "config.json", settings)
    return damage


def of_t5x(folder):
    kernel = np.zeros((4, 4), np.float32)
    tree = {"token_embedder": {"embedding": kernel}, "encoder": {"layers_0": {"mlp": {"wi": {"kernel": kernel}}}}}
    state = {"version": 3, "optimizer": {"target": tree, "state": {"step": 3}}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(state))
    return "checkpoint"


KINDS = {
    **{kind: _tensors(seed) for kind, seed in SEEDS.items()},
    "transformers_config": _released("clip_eos", "config.json"),
    "open_clip_config": _released("open_clip", "open_clip_config.json"),
    "preprocessor_config": _released("clip_eos", "preprocessor_config.json"),
    "tokenizer_config": _released("clip_eos", "tokenizer_config.json"),
    "native_config": (of_native, vlm_jax.load),
    "workdir_config": (of_workdir, vlm_jax.load),
    "checkpoint": (
        lambda folder: of_workdir(folder, "checkpoints/1/state/_METADATA"),
        vlm_jax.load,
    ),
    "t5x": (of_t5x, lambda folder: recognize.understand(folder, "gelu_tanh")),  # the whole one is too small for a T5,
}
