import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForQuestionAnswering, BertModel

from qat_runner.errors import ConfigError
from qat_runner.models import build_bert, load_tokenizer, read_checkpoint
from tests.tiny import tiny_bert


def test_weights_are_the_checkpoint_s_and_the_head_is_seeded(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    torch.manual_seed(1)
    model = build_bert(str(folder), pretrained=True)
    assert isinstance(model, BertForQuestionAnswering)
    assert model.training
    saved = BertModel.from_pretrained(folder, add_pooling_layer=False).state_dict()
    assert all(torch.equal(model.state_dict()[f"bert.{key}"], value) for key, value in saved.items())
    torch.manual_seed(1)
    again = build_bert(str(folder), pretrained=True)
    assert torch.equal(model.qa_outputs.weight, again.qa_outputs.weight)
    assert model.qa_outputs.weight.shape == (2, 16)
    torch.manual_seed(1)
    fresh = build_bert(str(folder), pretrained=False)
    key = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(fresh.state_dict()[key], model.state_dict()[key])


def test_a_half_precision_checkpoint_is_trained_in_float32(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    BertModel.from_pretrained(folder).half().save_pretrained(folder)
    assert {p.dtype for p in build_bert(str(folder), pretrained=True).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("rename", "text"),
    [
        (
            lambda key: f"module.{key}",
            r"embeddings\.LayerNorm\.bias is missing \(37 in total\); must contain all weights of a BERT",
        ),
        (
            lambda key: key.replace("layer.1.", "layer.7."),
            r"layer\.1\.attention\.output\.\S+ is missing \(16 in total\)",
        ),
        (lambda key: key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"), None),
    ],
)
def test_weights_that_are_missing_are_not_made_up(
    tmp_path: Path, rename: Callable[[str], str], text: str | None
) -> None:
    """The old names of LayerNorm's parameters are supported."""
    folder = tiny_bert(tmp_path / "bert")
    state = load_file(folder / "model.safetensors")
    save_file({rename(key): t for key, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    if text is not None:
        with pytest.raises(ConfigError, match=text):
            build_bert(str(folder), pretrained=True)
        return
    found = build_bert(str(folder), pretrained=True).state_dict()
    assert all(torch.equal(found[f"bert.{key}"], t) for key, t in state.items() if "pooler" not in key)


def test_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_bert(tmp_path / "bert")))
    encoded = tokenizer("Anna lives.", return_offsets_mapping=True, add_special_tokens=False)
    assert encoded["offset_mapping"] == [(0, 4), (5, 10), (10, 11)]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model\.checkpoint=.*empty: the folder contains no config\.json"):
        read_checkpoint(str(tmp_path / "empty"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="is a gpt2; must be a bert"):
        read_checkpoint(str(other))
    (other / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="must be a folder with a BERT, or its name on the Hugging Face hub"):
        read_checkpoint(str(other))
    folder = tiny_bert(tmp_path / "bert")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"bert: must be a folder with a BERT"):
        build_bert(str(folder), pretrained=True)
