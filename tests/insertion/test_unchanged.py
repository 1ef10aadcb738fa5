"""With quantizers switched off, a network computes what it did before, or an error names the module that differs."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface

from qat_runner.insertion import PolicyError, quantize_model, quantized_tensors, remove_quantizers
from qat_runner.insertion.attention import NAME
from qat_runner.insertion.insert import QuantizationWarning, quantizers_disabled
from qat_runner.insertion.layers import QuantLinear

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 50, "max_position_embeddings": 32, "use_cache": False}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
T5: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
SEEN: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 8}
TOKENS: dict[str, Any] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id"), 1)

NETWORKS: dict[str, Callable[[], Any]] = {
    "position bias": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "sinks, a sliding window": lambda: hf.GptOssModel(
        hf.GptOssConfig(**DECODER, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    ),
    "soft caps": lambda: hf.Gemma2Model(hf.Gemma2Config(**DECODER, attn_logit_softcapping=0.1, sliding_window=4)),
    "a scale of another name": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SEEN)),
    "a head of torch's own attention": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SEEN)),
    "local and global": lambda: hf.ModernBertModel(hf.ModernBertConfig(**TEXT, **TOKENS, local_attention=4)),
}


def ids() -> Tensor:
    return torch.randint(2, 50, (2, 8))


def example_of(model: nn.Module) -> Tensor:
    return torch.randn(2, 3, 16, 16) if "Vision" in type(model).__name__ else ids()


@pytest.mark.filterwarnings("ignore::qat_runner.insertion.insert.QuantizationWarning")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_of_every_kind_is_the_networks_own(name: str, attention: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    if attention == "sdpa" and not (model._supports_sdpa and "soft" not in name):
        pytest.skip("transformers has no such")
    model.set_attn_implementation(attention)
    for parameter in model.parameters():  # otherwise missing biases and sinks, initially zero, would go unnoticed
        nn.init.normal_(parameter, std=0.3)
    x = example_of(model)
    with torch.no_grad():
        plain = model(x).last_hidden_state
        quantize_model(model, 4, example=x)
        assert sum(t.tensor == "probabilities" for t in quantized_tensors(model)) >= model.config.num_hidden_layers
        with quantizers_disabled(model):
            off = model(x).last_hidden_state
        assert torch.equal(off, plain) if attention == "eager" else torch.allclose(off, plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(x).last_hidden_state, plain, atol=1e-3)
        assert torch.equal(remove_quantizers(model)(x).last_hidden_state, plain)


def test_the_network_is_left_alone_that_shares_a_config(tmp_path: Path) -> None:
    config = hf.BertConfig(**TEXT)
    model, other = hf.BertModel(config).eval(), hf.BertModel(config).eval()
    x = ids()
    before = other(x).last_hidden_state
    other.save_pretrained(tmp_path / "other")
    quantize_model(model, example=x)
    assert other.config is config and config._attn_implementation != NAME
    assert model.config is model.encoder.layer[0].attention.self.config is not config
    assert torch.equal(other(x).last_hidden_state, before)
    model.save_pretrained(tmp_path / "model")
    saved, others = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "other"))
    assert saved == others


def test_a_network_saved_whole_brings_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    x, file = ids(), io.BytesIO()
    model = quantize_model(hf.BertModel(hf.BertConfig(**TEXT)), example=x).eval()
    torch.save(model, file)
    file.seek(0)
    monkeypatch.delitem(AttentionInterface._global_mapping, NAME)  # as in another process
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x).last_hidden_state, model(x).last_hidden_state)


def test_rows_that_are_wholly_masked_are_told_of() -> None:
    model = hf.LlamaModel(hf.LlamaConfig(**DECODER)).eval()
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.warns(QuantizationWarning, match=r"layers\.0\.self_attn \(LlamaAttention\) does not compute the same"):
        quantize_model(model, example=(ids(), mask))
    assert quantized_tensors(model)
    eager = hf.LlamaModel(hf.LlamaConfig(**DECODER)).eval()
    eager.set_attn_implementation("eager")
    quantize_model(eager, example=(ids(), mask))


class Picky(nn.Module):
    """A module whose output depends on the class of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * 1.001 if isinstance(self.layer, QuantLinear) else y


def test_a_network_that_computes_something_else_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Picky())
    with pytest.raises(PolicyError, match=r"^2 \(Picky\) does not compute the same .* \(differs by up to .*, for "):
        quantize_model(model, example=torch.randn(2, 4))
    assert not quantized_tensors(model)
    assert type(model[0]) is nn.Linear
    tolerant = copy.deepcopy(model)
    quantize_model(tolerant)  # without an example nothing is compared


def test_attention_that_does_more_under_some_names_is_refused() -> None:
    config = hf.DeepseekV32Config(
        **{**TEXT, "num_key_value_heads": 2},
        first_k_dense_replace=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        index_topk=4,
        index_n_heads=2,
        index_head_dim=8,
    )
    model = hf.DeepseekV32Model(config)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn \(DeepseekV32Attention\) has code that depends"):
        quantize_model(model)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_a_random_network_is_compared_as_closely_as_it_repeats_itself() -> None:
    class Random(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * (1 + 1e-6 * self.calls)

    assert quantized_tensors(quantize_model(Random(nn.Linear(4, 4)), example=torch.randn(2, 4)))
    assert quantized_tensors(quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), example=torch.randn(2, 4)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qat_runner.insertion.insert.QuantizationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "efficientnet_b0", "convnext_atto", "levit_128s"],
)
def test_networks_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    model, x = timm.create_model(name, num_classes=7).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        plain = model(x)
        quantize_model(model, example=x)
        with quantizers_disabled(model):
            assert torch.equal(model(x), plain)
        assert not torch.equal(model(x), plain)
