"""Networks of other libraries selected by one name, their published weights, and their image preprocessing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from qat_runner.cli.run import main
from qat_runner.config import Config, from_hydra, run_name
from qat_runner.config.composing import command, compose_config
from qat_runner.config.model_names import label
from qat_runner.errors import ConfigError
from qat_runner.experiment import preflight
from qat_runner.models import Source, build_model, load_weights
from qat_runner.models.libraries import LIBRARIES, preprocessing_keys
from qat_runner.models.weights import _head_keys

FAKE = ("dataset=fake", "dataset.image_size=32", "dataset.fake_pictures=32")


def composed(*overrides: str) -> Config:
    return from_hydra(compose_config(overrides))


@pytest.fixture
def of_hub(tmp_path: Path) -> Path:
    """The folder of a tiny ViT with 5 classes, as saved by transformers."""
    folder = tmp_path / "some.folder" / "vit"
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(
        ViTConfig(**sizes, num_hidden_layers=1, image_size=32, patch_size=8, num_labels=5)
    ).save_pretrained(folder)
    described = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize(
    "word", ["timm/test_vit.r160_in1k", "torchvision/squeezenet1_1", "hf/google/vit-base-patch16-224"]
)
def test_a_word_is_a_value_of_model(word: str) -> None:
    config = composed(f"model={word}", "dataset=fake")
    assert config.model.name == word
    assert "/" not in run_name(config) and run_name(config).startswith(word.partition("/")[0])
    asked = command(config)
    assert asked is not None and f"model={word}" in asked
    for recipe in ("deit", "imagenet"):
        assert composed(f"model={word}", "dataset=imagenet", f"recipe={recipe}").recipe.name == "deit"


def test_names_of_our_own_are_what_they_were() -> None:
    assert [label(name) for name in ("resnet18", "mobilenet_v3_small", "bert")] == [
        *("resnet18", "mobilenet_v3_small", "bert")
    ]
    assert composed("model=torchvision/resnet50", "dataset=imagenet").recipe.name == "paper_resnet50"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model=timm/test_vitt"], "did you mean timm/test_vit"),
        (["model=torchvision/resnet19"], "did you mean torchvision/resnet1"),
        (["model=nobodys/resnet18"], "torchvision/NAME, timm/NAME, hf/NAME"),
        (["model=hf/."], "contains no config.json"),
        (["model=torchvision/vit_b_16"], "cannot be built (Input shape indivisible by patch size!)"),
        (["model=timm/vgg11", "recipe.scratch.drop_path=0.1"], "timm/vgg11 does not support the drop_path of a stage"),
        (["model=resnet18", "model.stride_in=1x1"], "resnet18 has no bottlenecks"),
        (
            ["model=resnet20", "mode=ptq", "weights=pretrained"],
            "model=resnet20: no library describes its image preprocessing",
        ),
        (["dataset=squad", "model=bert_base", "recipe.finetune.mixup=1"], "is only for images"),
    ],
)
def test_what_cannot_be_is_told(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qat_runner.experiment.checks.find_dataset", lambda *args: tmp_path)
    monkeypatch.setattr("qat_runner.tasks.question_answering.read_checkpoint", lambda *args: None)
    assert main(args) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["timm/test_vit", "timm/test_resnet", "torchvision/squeezenet1_1", "hf"])
def test_it_fits_the_data_set(word: str, of_hub: Path) -> None:
    word = f"hf/{of_hub}" if word == "hf" else word
    preflight(composed(f"model={word}", *FAKE))
    model = build_model(word, 7, 32)
    out = model.eval()(torch.randn(2, 3, 32, 32))
    assert (out if isinstance(out, Tensor) else out.logits).shape == (2, 7)


def test_a_sweep_over_words(of_hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    small = (
        *FAKE,
        "batch_size=16",
        "bits=32",
        "epochs=1",
        "noise_batches=0",
        "limit_val_batches=1",
        "limit_train_batches=1",
    )
    assert main(["-m", f"model=timm/test_resnet,hf/{of_hub}", *small]) == 0
    assert sorted(path.name.partition("_fake")[0] for path in Path("runs").glob("*/")) == ["hf-vit", "timm-test_resnet"]


def test_published_weights_of_torchvision(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    published = torchvision.models.resnet50()
    asked: list[str] = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url",
        lambda url, **options: asked.append(url) or published.state_dict(),  # type: ignore[func-returns-value]
    )
    with caplog.at_level(logging.INFO):
        for name, value in (("resnet50", "pretrained"), ("torchvision/resnet50", "torchvision")):
            model = build_model(name, 1000, 224)
            load_weights(model, Source(value), name, new_head=False)
            assert torch.equal(model.get_parameter("fc.weight"), published.fc.weight)
    assert "ResNet50_Weights.IMAGENET1K_V2 from torchvision" in caplog.text
    assert [url.rpartition("/")[2] for url in asked] == ["resnet50-11ad3fa6.pth", "resnet50-0676ba61.pth"]


def test_published_weights_of_timm_at_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    published = timm.create_model("test_vit").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **options: dict(published))
    model = build_model("timm/test_vit", 10, 32)
    loaded = load_weights(model, Source("pretrained", image_size=32), "timm/test_vit", new_head=True)
    assert loaded.left_fresh == ("head.weight", "head.bias")
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], published["blocks.0.attn.qkv.weight"])


def test_a_failed_download_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(ConfigError, match=r"weights=pretrained: download failed \(OSError: no network\)"):
        load_weights(build_model("timm/test_vit", 10, 32), Source("pretrained"), "timm/test_vit", new_head=True)


def test_published_weights_of_a_folder(of_hub: Path) -> None:
    name = f"hf/{of_hub}"
    model, published = build_model(name, 5, 32), ViTForImageClassification.from_pretrained(of_hub).state_dict()
    load_weights(model, Source("pretrained"), name, new_head=False)
    assert all(torch.equal(t, published[key]) for key, t in model.state_dict().items())
    before = run_name(composed(f"model={name}", *FAKE))
    moved = of_hub.rename(of_hub.parents[1] / "vit")
    assert run_name(composed(f"model=hf/{moved}", *FAKE)) == before


def test_images_as_the_model_is_described(of_hub: Path) -> None:
    weights = ("mode=retrain", "weights=pretrained")
    config = composed("model=timm/test_vit", "dataset=imagenet", *weights)
    described = timm.data.resolve_data_config(model=timm.create_model("test_vit"))  # type: ignore[attr-defined]
    assert config.dataset.image_size == described["input_size"][-1]
    assert (tuple(config.dataset.mean), tuple(config.dataset.std)) == (described["mean"], described["std"])
    assert config.dataset.interpolation == described["interpolation"]
    assert config.dataset.resize_size == int(config.dataset.image_size / described["crop_pct"])
    given = composed(
        "model=timm/test_vit", "dataset=imagenet", *weights, "dataset.image_size=224", "dataset.std=[1,1,1]"
    )
    assert (given.dataset.image_size, given.dataset.std) == (224, [1, 1, 1])
    assert given.dataset.mean == config.dataset.mean
    assert composed("model=timm/test_vit", "dataset=imagenet", "mode=ptq", "weights=w.pt").dataset.mean[0] == 0.485
    assert composed("model=resnet50", "dataset=imagenet", *weights).dataset.resize_size == 232
    folder = composed(f"model=hf/{of_hub}", "dataset=imagenet", *weights).dataset
    assert (folder.image_size, folder.resize_size, folder.std, folder.interpolation) == (32, 32, [0.25] * 3, "bicubic")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Bit", {"size": {"shortest_edge": 256}}),
        ("ConvNext", {"size": {"shortest_edge": 224}}),
        ("ConvNext", {"size": {"shortest_edge": 384}}),
        ("Levit", {}),
        ("Levit", {"size": {"height": 240, "width": 240}}),
        ("Perceiver", {}),
        ("PoolFormer", {}),
        ("PoolFormer", {"crop_pct": 0.95, "size": {"height": 224, "width": 224}}),
        ("ViT", {}),
    ],
)
def test_transformers_describes_them_as_its_image_processors_do(
    kind: str, options: dict[str, Any], of_hub: Path
) -> None:
    """The scale is measured on an image that gets brighter from left to right: its pixels per pixel of the input."""
    processor = getattr(transformers, f"{kind}ImageProcessor")(**options)
    processor.save_pretrained(of_hub)
    ramp = torch.arange(1000.0).repeat(3, 1000, 1) / 1000
    shown = processor(ramp, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0, 0, 0]
    middle = shown[len(shown) // 4 : -len(shown) // 4]
    keys = preprocessing_keys(f"hf/{of_hub}")
    assert keys["image_size"] == len(shown)
    assert keys["resize_size"] == pytest.approx((len(middle) - 1) / float(middle[-1] - middle[0]), abs=0.1)


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "swin_t"])
def test_torchvision_describes_them_as_its_transforms_do(name: str) -> None:
    keys = preprocessing_keys(f"torchvision/{name}")
    described = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert ([keys["image_size"]], [keys["resize_size"]]) == (described.crop_size, described.resize_size)


def test_a_drop_path_rises_to_what_is_asked_for() -> None:
    model = LIBRARIES["torchvision"].build("convnext_tiny", 10, 32, 0.3)
    rates = [m.p for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert rates[0] == 0 and rates[-1] == 0.3 and rates == sorted(rates)


def test_the_stride_of_a_bottleneck_may_be_in_its_first_convolution() -> None:
    """As in He et al. 2016, figure 5 and table 1: the first layer of conv3_1 and of the later stages has the stride."""
    later, first = (build_model("torchvision/resnet50", 10, 64, stride_in=where).eval() for where in ("3x3", "1x1"))
    first.load_state_dict(later.state_dict())
    places: dict[str, tuple[int, ...]] = {}
    hook: Callable[..., None] = lambda m, args, out: places.__setitem__(m.place, tuple(out.shape[2:]))  # noqa: E731
    for i in (1, 2):
        conv = first.get_submodule(f"layer2.0.conv{i}")
        conv.place = f"conv{i}"  # type: ignore[assignment]
        conv.register_forward_hook(hook)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(later(x), first(x))
    assert places == {"conv1": (8, 8), "conv2": (8, 8)}


def test_batchnorm_may_have_another_epsilon() -> None:
    model = build_model("resnet20", 10, 32, bn_eps=1e-3)
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize(
    ("name", "metadata", "doubted"),
    [
        ("resnet50_keras.safetensors", None, True),
        ("resnet50_v1.safetensors", None, True),
        ("resnet50_v1.5.safetensors", None, False),
        ("resnet50_v1b.safetensors", None, False),
        ("model.safetensors", {"source": "converted from Caffe"}, True),
        ("model.safetensors", {"format": "pt"}, False),
    ],
)
def test_files_of_other_resnets_are_doubted(
    name: str, metadata: dict[str, str] | None, doubted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)
    save_file(model.state_dict(), tmp_path / name, metadata)
    load_weights(model, Source(str(tmp_path / name)), "resnet50", new_head=False)
    assert ("need model.stride_in=1x1" in caplog.text) == doubted


def test_blocks_whose_second_convolution_is_several_are_not_doubted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(torchvision.models.resnet.Bottleneck(16, 4))
    model[0].conv2 = nn.Sequential(nn.Conv2d(4, 4, 3, 2))  # as in ResNeSt and SKNet
    save_file(model.state_dict(), tmp_path / "resnet50_keras.safetensors")
    load_weights(model, Source(str(tmp_path / "resnet50_keras.safetensors")), "resnest", new_head=False)
    assert "stride_in" not in caplog.text


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("googlenet", {"fc", "aux1.fc2", "aux2.fc2"}),
        ("inception_v3", {"fc", "AuxLogits.fc"}),
        ("squeezenet1_1", {"classifier.1"}),
        ("resnet18", {"fc"}),
    ],
)
def test_classifiers_are_known_also_where_they_are_several_or_convolutions(name: str, heads: set[str]) -> None:
    with torch.device("meta"):
        model = LIBRARIES["torchvision"].build(name, 10, 64, None)
    assert {key.rpartition(".")[0] for key in _head_keys(model)} == heads
    assert getattr(model, "transform_input", None) is (
        True if len(heads) > 1 else None
    )  # required by published weights
