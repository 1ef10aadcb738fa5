import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    LlamaConfig,
    LlamaModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from qat_runner.insertion import (
    calibrate,
    full_precision_state_dict,
    quantize_model,
    quantized_share,
    quantized_tensors,
    remove_quantizers,
    summary,
)
from qat_runner.insertion.attention import NAME
from qat_runner.insertion.insert import quantizers_disabled
from qat_runner.insertion.layers import QuantMatmul
from qat_runner.quant import Octav, Quantizer, fake_quantize, octav

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=24,
)
POLICY: dict[str, Any] = {"first_last_bits": None, "linear_granularity": "channel", "quantize_head": False}


def bert(attention: str = "sdpa") -> BertForQuestionAnswering:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(copy.deepcopy(CONFIG))
    model.set_attn_implementation(attention)
    return model.eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, 50, (3, 12))
    mask = (torch.arange(12) < torch.tensor([[12], [9], [5]])).long()
    return ids, mask, (torch.arange(12) > 4).long().expand(3, 12).contiguous()


def logits(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    out = model(*batch)
    return torch.stack([out.start_logits, out.end_logits])


def test_which_tensors_are_quantized(batch: tuple[Tensor, ...]) -> None:
    model = quantize_model(bert(), 4, **POLICY, example=batch)
    tensors = {t.name: t for t in quantized_tensors(model)}
    layer = "bert.encoder.layer.0"
    linears = [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
    linears += [f"{layer}.{name}" for name in ("attention.output.dense", "intermediate.dense", "output.dense")]
    products = ["scores.query", "scores.key", "context.probabilities", "context.value"]
    expected = [f"{name}.{tensor}" for name in linears for tensor in ("weight", "input")]
    expected += [f"{layer}.attention.self.{name}" for name in products]
    assert sorted(name for name in tensors if name.startswith(layer)) == sorted(expected)
    assert len(tensors) == 2 * 16
    unsigned = [name for name, t in tensors.items() if not t.quantizer.format.signed]
    assert unsigned == [f"bert.encoder.layer.{i}.attention.self.context.probabilities" for i in (0, 1)]
    assert {t.quantizer.format.bits for t in tensors.values()} == {4}
    assert {t.quantizer.granularity for t in tensors.values() if t.tensor == "weight"} == {"channel"}
    assert {t.quantizer.granularity for t in tensors.values() if t.tensor != "weight"} == {"tensor"}
    assert tensors[f"{layer}.attention.self.context.probabilities"].elements == 2 * 12 * 12
    assert "in full precision: 3 Embedding, 5 LayerNorm, Linear qa_outputs, softmax" in summary(model)


def test_without_quantizers_it_is_the_network_itself(batch: tuple[Tensor, ...]) -> None:
    plain = logits(bert(), batch)
    assert torch.equal(logits(quantize_model(bert(), 32, **POLICY), batch), plain)
    model = quantize_model(bert(), 4, **POLICY, example=batch)
    with quantizers_disabled(model):  # transformers' "eager" attention, bit for bit
        assert torch.equal(logits(model, batch), logits(bert("eager"), batch))
    assert not torch.equal(logits(model, batch), plain)
    remove_quantizers(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, batch), plain)
    assert not any(isinstance(m, Quantizer | QuantMatmul) for m in model.modules())
    assert model.state_dict().keys() == bert().state_dict().keys()


def test_a_product_of_quantized_operands() -> None:
    product = QuantMatmul(("query", "key"))
    for name in product.operands:
        product.add_module(f"{name}_quantizer", Quantizer(4, Octav(), gradient="pwl"))
    a, b = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 5, 4, requires_grad=True)
    out = product(a, b.transpose(2, 3))
    by_hand = [fake_quantize(t, octav(t, 4), 4, gradient="pwl") for t in (a, b)]
    expected = by_hand[0] @ by_hand[1].transpose(2, 3)
    assert torch.allclose(out, expected, atol=1e-5)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (a, b), upstream)
    theirs = torch.autograd.grad(expected, (a, b), upstream)
    for x, y in zip(ours, theirs, strict=True):
        assert torch.allclose(x, y, atol=1e-4)


def test_training_reaches_every_parameter(batch: tuple[Tensor, ...]) -> None:
    model = quantize_model(bert(), 4, **POLICY, example=batch).train()
    logits(model, batch).square().mean().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(name.endswith("key.bias") for name in still)  # softmax ignores what is added to all scores
    assert all(t.quantizer.ready and t.quantizer.last_s is not None for t in quantized_tensors(model))


def test_the_sign_of_probabilities_is_known_under_dropout_too(batch: tuple[Tensor, ...]) -> None:
    model = quantize_model(bert(), 4, **POLICY)  # no example: decided on the first batch
    model.train()
    model(*batch)
    signs = {t.name.rpartition(".")[2]: t.quantizer.format.signed for t in quantized_tensors(model)}
    assert signs == {"weight": True, "input": True, "query": True, "key": True, "probabilities": False, "value": True}


def test_static_scalars_travel_in_the_state_dict(batch: tuple[Tensor, ...]) -> None:
    model = quantize_model(bert(), 4, **POLICY, dynamic=False, example=batch)
    with pytest.raises(RuntimeError, match="no clipping scalars yet"):
        model(*batch)
    assert calibrate(model, [batch]) == 1
    twin = quantize_model(bert(), 4, **POLICY, dynamic=False, example=batch)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin, batch), logits(model, batch))
    assert full_precision_state_dict(model).keys() == bert().state_dict().keys()


def test_a_copy_is_a_network_of_its_own(batch: tuple[Tensor, ...]) -> None:
    model = quantize_model(bert(), 4, **POLICY, example=batch)
    before = logits(model, batch)
    twin = copy.deepcopy(model)
    remove_quantizers(twin)
    assert torch.equal(logits(twin, batch), logits(bert(), batch))
    assert model.config._attn_implementation == NAME
    assert torch.equal(logits(model, batch), before)


def test_a_network_inside_of_another_module(batch: tuple[Tensor, ...]) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert()

        def forward(self, *args: Tensor) -> Tensor:
            return logits(self.inner, args)

    model = quantize_model(Wrapper(), 4, first_last_bits=None, example=batch)
    assert sum(t.tensor == "probabilities" for t in quantized_tensors(model)) == 2
    remove_quantizers(model)
    assert torch.equal(model(*batch), logits(bert(), batch))


def test_grouped_keys_and_values() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    model, ids = LlamaModel(config).eval(), torch.randint(0, 50, (2, 8))
    model.set_attn_implementation("eager")
    plain = model(ids).last_hidden_state
    quantize_model(model, 8, example=ids)
    assert {"query", "key", "probabilities", "value"} <= {t.tensor for t in quantized_tensors(model)}
    with quantizers_disabled(model):
        assert torch.equal(model(ids).last_hidden_state, plain)
    close = model(ids).last_hidden_state
    assert not torch.equal(close, plain)
    assert (close - plain).abs().max() < 0.2


def test_modules_with_a_config_of_their_own() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = {f"decoder_{name}": value for name, value in sizes.items()}
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, image_size=16, patch_size=8)).eval()
    inputs = torch.randn(2, 3, 16, 16), torch.rand(2, 4)
    (layer,) = model.decoder.decoder_layers
    for module in layer.modules():
        if hasattr(module, "config"):
            module.config = copy.deepcopy(module.config)
            module.config._attn_implementation = "eager"
    before = {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")}
    assert {*before.values()} == {"eager", "sdpa"}
    plain = model(*inputs).logits
    quantize_model(model, 8, example=inputs)
    assert quantized_share(model) == 1
    assert sum(t.tensor == "probabilities" for t in quantized_tensors(model)) == 2
    remove_quantizers(model)
    assert before == {name: m.config._attn_implementation for name, m in model.named_modules() if hasattr(m, "config")}
    assert torch.equal(model(*inputs).logits, plain)


def test_layers_to_keep_must_be_there() -> None:
    with pytest.raises(ValueError, match="rule 'head' matches no layer or tensor that can be quantized"):
        quantize_model(bert(), 4, keep=["head"])


def test_a_saved_network_comes_back_without_a_trace(batch: tuple[Tensor, ...], tmp_path: Path) -> None:
    model = remove_quantizers(quantize_model(bert(), 4, **POLICY, example=batch))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = BertForQuestionAnswering.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, batch), logits(bert(), batch))
