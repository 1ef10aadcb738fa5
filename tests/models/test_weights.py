from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SwiftFormerConfig

from qat_runner.config.fingerprints import fingerprint
from qat_runner.errors import ConfigError
from qat_runner.insertion import quantize_model
from qat_runner.models import Source, build_model, find_weights, load_weights, match_weights
from qat_runner.quant import Quantizer


@pytest.fixture
def model() -> nn.Module:
    return build_model("resnet20", 10, 32)


def same(a: nn.Module, b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.state_dict().items())


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in state.items()}


SHAPES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "plain": (lambda s: s, ""),
    "older BatchNorm": (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, ""),
    "parameters": (lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()}, ""),
    "nested": (lambda s: {"state_dict": s, "best_prec1": 91.7, "best_acc1": torch.tensor(1.0)}, ""),
    "data parallel": (lambda s: {"state_dict": under("module.", s)}, ""),
    "compiled": (lambda s: {"model": under("_orig_mod.module.", s), "epoch": 3}, ""),
    "compiled within": (lambda s: {"model": under("module._orig_mod.", s)}, ""),
    "compiled in parts": (lambda s: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()}, ""),
    "Fabric": (lambda s: under("_forward_module.", s), ""),
    "Lightning": (lambda s: {"state_dict": under("model.", s), "pytorch-lightning_version": "2.0"}, ""),
    "Lightning, parallel": (lambda s: {"state_dict": under("net.module.", s)}, ""),
    "one beginning": (lambda s: under("backbone.body.", s), ""),
    "beside a loss": (lambda s: {"state_dict": under("model.", s) | {"criterion.weight": torch.ones(10)}}, ""),
    "DeepSpeed": (lambda s: {"module": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, ""),
    "optimizer beside": (lambda s: s | {"optimizer": {"state": {"a": {"exp_avg": torch.ones(3)}}}}, ""),
    "twice nested": (lambda s: {"checkpoint": {"model": {"state_dict": under("module.", s)}}}, ""),
    "an unknown key": (lambda s: {"params": s, "args": {"lr": 0.1}}, ""),
    "AveragedModel": (lambda s: under("module.", s) | {"n_averaged": torch.tensor(7)}, ""),
    "averages alone": (lambda s: {"state_dict_ema": s}, " from state_dict_ema"),
    "timm": (lambda s: {"state_dict_ema": zeros(s), "state_dict": s}, " from state_dict (not state_dict_ema)"),
    "torchvision": (lambda s: {"model_ema": zeros(s), "model": s}, " from model (not model_ema)"),
    "Lightning's average": (
        lambda s: {"state_dict": under("ema_model.module.", zeros(s)) | under("model.", s)},
        " from state_dict.model (not state_dict.ema_model)",
    ),
    "half": (lambda s: {k: v.half() for k, v in s.items()}, "; float16 became float32"),
    "bfloat16": (lambda s: {k: v.bfloat16() for k, v in s.items()}, "; bfloat16 became float32"),
    "double": (lambda s: {k: v.double() for k, v in s.items()}, "; float64 became float32"),
    "mixed": (
        lambda s: {k: v.double() if "bn" in k else v.to(torch.bfloat16) for k, v in s.items()},
        "; bfloat16, float64 became float32",
    ),
}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) for name, t in state.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_usual_shapes_of_files(tmp_path: Path, model: nn.Module, shape: str) -> None:
    path, (wrap, said) = tmp_path / "weights.pt", SHAPES[shape]
    state = {k: v.half().to(v.dtype) if "half" in shape else v for k, v in model.state_dict().items()}
    state = {k: v.bfloat16().to(v.dtype) if shape in ("bfloat16", "mixed") else v for k, v in state.items()}
    torch.save(wrap(state), path)
    other = build_model("resnet20", 10, 32)
    loaded = load_weights(other, Source(str(path)), "resnet20", new_head=False)
    assert same(other, state)
    assert str(loaded) == f"97 of 97 tensors loaded{said}"


class Indexed(nn.Linear):
    """A layer with an integer buffer beside its weights, like the position indices of Swin."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("index", torch.arange(2))


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.int64, ""), (torch.int32, "; int32 became int64"), (torch.float32, "; float32 became int64")],
)
def test_integers_stay_integers(dtype: torch.dtype, said: str, tmp_path: Path) -> None:
    state = Indexed().state_dict()
    torch.save(state | {"index": state["index"].to(dtype)}, tmp_path / "w.pt")
    loaded = load_weights(model := Indexed(), Source(str(tmp_path / "w.pt")), "indexed", new_head=False)
    assert str(loaded) == f"3 of 3 tensors loaded{said}"
    assert same(model, state)


def test_bookkeeping_beyond_half_precision_is_left_out(tmp_path: Path, model: nn.Module) -> None:
    state = {k: v + 100_000 if "num_batches" in k else v for k, v in model.state_dict().items()}
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "w.pt")  # 100,000 becomes infinity
    assert str(load_weights(model, Source(str(tmp_path / "w.pt")), "resnet20", False)).startswith("97 of 97")
    assert int(model.state_dict()["bn1.num_batches_tracked"]) == 0


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("state_dict", 1),
        ("state_dict_ema", 2),
        ("model", 3),
        ("model.module", 3),
        ("both.student", 4),
        ("both.teacher", 5),
        ("both.teacher.module", 5),
    ],
)
def test_a_part_can_be_chosen(tmp_path: Path, model: nn.Module, part: str, value: int) -> None:
    def full(value: int) -> dict[str, Tensor]:
        return {name: torch.full_like(t, value) for name, t in model.state_dict().items()}

    path = tmp_path / "w.pt"
    both = under("student.", full(4)) | under("teacher.module.", full(5))
    content = {"model": under("module.", full(3)), "state_dict_ema": full(2), "state_dict": full(1), "both": both}
    torch.save(content, path)
    loaded = load_weights(model, Source(str(path), part), "resnet20", new_head=False)
    assert loaded.matched == 97
    assert bool((model.get_parameter("conv1.weight") == value).all())
    if part == "both.student":
        with pytest.raises(
            ConfigError, match=r"both\.student, both\.teacher all match resnet20; set weights_part=NAME to"
        ):
            load_weights(model, Source(str(path), "both"), "resnet20", new_head=False)
        with pytest.raises(
            ConfigError, match=r"has no part bot; the parts are both, model, state_dict, state_dict_ema"
        ):
            load_weights(model, Source(str(path), "bot"), "resnet20", new_head=False)
        torch.save(both, path)
        with pytest.raises(
            ConfigError, match=r"r.teacher=.*: student, teacher all match resnet20; set r.teacher_part="
        ):
            load_weights(model, Source(str(path), key="r.teacher"), "resnet20", new_head=False)


def named_state() -> dict[str, Tensor]:
    return tiny().state_dict()


def tiny() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1, bias=False)))
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 3, 1), layers=layers, linear=nn.Linear(4, 2)))


WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module")
words = st.sampled_from(("state_dict", "model", "net", "weights", "ckpt", "ema", "a b", "\u00fc", "0"))


@given(st.data())
def test_any_nesting_and_wrapping_is_seen_through(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state, source = {}, named_state()
    beginning = data.draw(st.lists(st.sampled_from(("model", "net", "backbone", *WRAPPERS)), max_size=3))
    inside = data.draw(st.dictionaries(st.sampled_from(("stem", "layers", "linear")), st.sampled_from(WRAPPERS)))
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    for name, tensor in source.items():
        first, _, rest = name.partition(".")
        wrapped = [*beginning, first, *([inside[first]] if first in inside else []), rest]
        state[".".join(wrapped)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    content: Any = state
    for key in data.draw(st.lists(words, max_size=4)):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}}}
    path = tmp_path_factory.mktemp("any") / "w.pt"
    torch.save(content, path)
    model = tiny()
    loaded = load_weights(model, Source(str(path)), "tiny", new_head=False)
    assert loaded.matched == loaded.of_model == len(source) - 1  # without the counter of batches
    assert same(model, source)


def test_safetensors_and_quantized_models(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    other = quantize_model(build_model("resnet20", 10, 32), example=torch.randn(2, 3, 32, 32))
    load_weights(other, Source(str(path)), "resnet20", new_head=False)
    assert torch.equal(other.get_parameter("linear.weight"), model.get_parameter("linear.weight"))

    other(torch.randn(4, 3, 32, 32))  # gives its quantizers clipping scalars
    torch.save({"model": other.state_dict()}, tmp_path / "run.pt")
    third = quantize_model(build_model("resnet20", 10, 32), example=torch.randn(2, 3, 32, 32))
    load_weights(third, Source(str(tmp_path / "run.pt")), "resnet20", new_head=False)
    assert not any(m.has_scalars for m in third.modules() if isinstance(m, Quantizer))
    load_weights(third, Source(str(tmp_path / "run.pt")), "resnet20", new_head=False, quantizers=True)
    assert same(third, other.state_dict())
    load_weights(build_model("resnet20", 10, 32), Source(str(tmp_path / "run.pt")), "resnet20", new_head=False)


class Coded(nn.Module):
    """A network with a layer whose name ends in _quantizer, although it is not a quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.vector_quantizer = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.vector_quantizer(self.layer(x))
        return out


@pytest.mark.parametrize("quantized", [True, False])
def test_layers_that_are_called_quantizers(quantized: bool, tmp_path: Path) -> None:
    model, other = Coded(), Coded()
    if quantized:
        quantize_model(model, example=torch.randn(2, 8))
    path = tmp_path / "w.pt"
    torch.save(model.state_dict(), path)
    loaded = load_weights(other, Source(str(path)), "coded", new_head=False)
    assert (loaded.matched, loaded.of_model) == (4, 4) and same(other, model.state_dict())
    del model.vector_quantizer
    torch.save(model.state_dict(), path)
    with pytest.raises(ConfigError, match="too few tensors match, 2 of the 4 tensors"):
        load_weights(other, Source(str(path)), "coded", new_head=False)


def test_a_new_head(tmp_path: Path) -> None:
    torch.save(build_model("resnet18", 1000, 32).state_dict(), tmp_path / "w.pt")
    model = build_model("resnet18", 10, 32)
    assert load_weights(model, Source(str(tmp_path / "w.pt")), "resnet18", new_head=True).left_fresh == (
        "fc.weight",
        "fc.bias",
    )
    with pytest.raises(ConfigError, match=r"fc\.weight has shape \[1000, 512\], not \[10, 512\]"):
        load_weights(model, Source(str(tmp_path / "w.pt")), "resnet18", new_head=False)


def blank(word: str, classes: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network of a library on the meta device, and a state dict for it that takes no memory."""
    with torch.device("meta"):
        model = build_model(word, classes, 224)
    return model, {key: torch.zeros((), dtype=t.dtype).expand(t.shape) for key, t in model.state_dict().items()}


def from_state(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr("qat_runner.models.weights.read_file", lambda path: {"": state})
    return Source("w.pt")


@pytest.mark.parametrize(
    ("word", "heads"),
    [
        ("timm/levit_128s", {"head.linear", "head_dist.linear"}),
        ("timm/repvit_m0_9", {"head.head.l", "head.head_dist.l"}),
        ("timm/sequencer2d_s", {"head.fc"}),
        ("timm/volo_d1_224", {"head", "aux_head"}),
        ("torchvision/alexnet", {"classifier.6"}),
        ("hf/swiftformer", {"head", "dist_head"}),
    ],
)
def test_heads_of_all_kinds_may_be_new(
    word: str, heads: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if word.startswith("hf/"):
        small: dict[str, Any] = {"depths": [1] * 4, "embed_dims": [8] * 4, "mlp_ratio": 1}
        SwiftFormerConfig(**small).save_pretrained(tmp_path)
        word = f"hf/{tmp_path}"
    model, (_, state) = blank(word, 10)[0], blank(word, 1000)
    loaded = match_weights(model, source := from_state(state, monkeypatch), word, new_head=True)[1]
    assert {key.rpartition(".")[0] for key in loaded.left_fresh} == heads
    assert loaded.matched + len(loaded.left_fresh) == loaded.of_model
    with pytest.raises(ConfigError, match=r"has shape \[1000.*\], not \[10|too few tensors match, 14 of the 16"):
        match_weights(model, source, word, new_head=False)


def test_a_head_that_is_missing_may_be_new_and_another_layer_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(width: int, classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, classes))

    model, state = small(8, 3), small(8, 5).state_dict()
    body = {key: t for key, t in state.items() if not key.startswith("2.")}
    for tensors in (state, body):
        loaded = match_weights(model, from_state(tensors, monkeypatch), "small", new_head=True)[1]
        assert (loaded.matched, loaded.left_fresh) == (6, ("2.weight", "2.bias"))
    wider = {key: t for key, t in small(9, 5).state_dict().items() if not key.startswith("2.")}
    for tensors in ({"a": torch.zeros(3)}, wider):
        with pytest.raises(ConfigError, match="too few tensors match, 0 of the 8 tensors"):
            match_weights(model, from_state(tensors, monkeypatch), "small", new_head=True)
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(40)), small(8, 3))
    other = nn.Sequential(*(nn.Linear(4, 4) for _ in range(40)), small(9, 5)).state_dict()
    for tensors in (other, {key: t for key, t in other.items() if not key.startswith("40.2.")}):
        with pytest.raises(
            ConfigError, match=r"tensor 40\.0\.weight has shape \[9, 4\], not \[8, 4\] \(6 such tensors\)"
        ):
            match_weights(deep, from_state(tensors, monkeypatch), "deep", new_head=True)


def test_files_of_another_network_are_refused(tmp_path: Path, model: nn.Module) -> None:
    path = str(tmp_path / "w.pt")
    torch.save(model.state_dict(), path)
    for name in ("resnet56", "resnet18", "mobilenet_v2"):
        other = build_model(name, 10, 32)
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(ConfigError, match="too few tensors match"):
            load_weights(other, Source(path), name, new_head=True)
        assert same(other, before)
    torch.save(build_model("resnet56", 10, 32).state_dict(), path)
    with pytest.raises(ConfigError, match="too few tensors match"):
        load_weights(model, Source(path), "resnet20", new_head=True)
    state = model.state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(16, 16, 1, 1)
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1\.weight has shape"):
        load_weights(model, Source(path), "resnet20", new_head=True)


def test_find_weights(tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.txt").touch()
    find_weights(Source("torchvision"), "resnet18")
    find_weights(Source("torchvision"), "torchvision/resnet18")
    with pytest.raises(
        ConfigError, match="torchvision/vit_h_14 has no IMAGENET1K_V1; teacher=pretrained loads its best weights"
    ):
        find_weights(Source("torchvision", key="teacher"), "torchvision/vit_h_14")
    for weights, message in (
        ("torchvision", "no published weights exist for resnet20, only for resnet18, .*_v3_large and torchvision/NAME"),
        (str(tmp_path / "no.pt"), "no such file"),
        (str(tmp_path / "w.txt"), "must end in"),
        (str(tmp_path), "is a folder that contains none of model.safetensors.index.json"),
        ("~nobody/w.pt", "no such file"),
        ("w\0.pt", "no such file"),
        ("w" * 5000 + ".pt", "no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_weights(Source(weights), "resnet20")
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(model.state_dict(), tmp_path / "w.PTH")
    assert load_weights(model, Source("~/w.PTH"), "resnet20", new_head=False).matched == 97
    assert fingerprint("~/w.PTH") == fingerprint(str(tmp_path / "w.PTH"))
