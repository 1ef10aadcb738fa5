from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qat_runner.errors import ConfigError
from qat_runner.insertion import quantize_model
from qat_runner.models import Source, build_model, find_weights, load_weights
from qat_runner.quant import Quantizer


@pytest.fixture
def model() -> nn.Module:
    return build_model("resnet20", 10, 32)


def same(a: nn.Module, b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "best_prec1": 91.7},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}, "epoch": 3},
        lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
def test_the_usual_shapes_of_files(tmp_path: Path, model: nn.Module, wrap: Any, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(model.state_dict()), path)
    other = build_model("resnet20", 10, 32)
    loaded = load_weights(other, Source(str(path)), "resnet20", new_head=False)
    assert same(other, model.state_dict())
    assert loaded.matched == loaded.of_model
    assert str(loaded) == f"{loaded.matched} of {loaded.of_model} tensors loaded"


def test_safetensors_and_quantized_models(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    other = quantize_model(build_model("resnet20", 10, 32), example=torch.randn(2, 3, 32, 32))
    load_weights(other, Source(str(path)), "resnet20", new_head=False)
    assert torch.equal(other.get_parameter("linear.weight"), model.get_parameter("linear.weight"))

    other(torch.randn(4, 3, 32, 32))  # its quantizers now remember something
    torch.save({"model": other.state_dict()}, tmp_path / "run.pt")
    third = quantize_model(build_model("resnet20", 10, 32), example=torch.randn(2, 3, 32, 32))
    load_weights(third, Source(str(tmp_path / "run.pt")), "resnet20", new_head=False)
    assert not any(m.has_scalars for m in third.modules() if isinstance(m, Quantizer))
    load_weights(third, Source(str(tmp_path / "run.pt")), "resnet20", new_head=False, quantizers=True)
    assert same(third, other.state_dict())
    load_weights(build_model("resnet20", 10, 32), Source(str(tmp_path / "run.pt")), "resnet20", new_head=False)


def test_a_new_head(tmp_path: Path) -> None:
    torch.save(build_model("resnet18", 1000, 32).state_dict(), tmp_path / "w.pt")
    model = build_model("resnet18", 10, 32)
    assert load_weights(model, Source(str(tmp_path / "w.pt")), "resnet18", new_head=True).left_fresh == ("fc.weight", "fc.bias")
    with pytest.raises(ConfigError, match=r"fc\.weight has shape \[1000, 512\], not \[10, 512\]"):
        load_weights(model, Source(str(tmp_path / "w.pt")), "resnet18", new_head=False)


def test_files_of_another_network_are_refused(tmp_path: Path, model: nn.Module) -> None:
    path = str(tmp_path / "w.pt")
    torch.save(model.state_dict(), path)
    for name in ("resnet56", "resnet18", "mobilenet_v2"):
        other = build_model(name, 10, 32)
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(ConfigError, match="little matches"):
            load_weights(other, Source(path), name, new_head=True)
        assert same(other, before)
    torch.save(build_model("resnet56", 10, 32).state_dict(), path)
    with pytest.raises(ConfigError, match="little matches"):
        load_weights(model, Source(path), "resnet20", new_head=True)
    state = model.state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(16, 16, 1, 1)
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1\.weight has shape"):
        load_weights(model, Source(path), "resnet20", new_head=True)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/nonexistent/evil", "w"))


def test_unreadable_files(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "w.pt"
    for content in (b"", b"no weights at all", b"PK\x03\x04 half a zip"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="not a readable weights file"):
            load_weights(model, Source(str(path)), "resnet20", new_head=False)
    torch.save({"state_dict": Evil()}, path)  # would run code if it were unpickled freely
    with pytest.raises(ConfigError, match="not a readable weights file"):
        load_weights(model, Source(str(path)), "resnet20", new_head=False)
    torch.save([1, 2, 3], path)
    with pytest.raises(ConfigError, match="holds no named tensors"):
        load_weights(model, Source(str(path)), "resnet20", new_head=False)


def test_find_weights(tmp_path: Path) -> None:
    (tmp_path / "w.txt").touch()
    find_weights(Source("torchvision"), "resnet18")
    for weights, message in (
        ("torchvision", "there are none for resnet20"),
        (str(tmp_path / "no.pt"), "no such file"),
        (str(tmp_path / "w.txt"), "must end in"),
        (str(tmp_path), "no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_weights(Source(weights), "resnet20")
