"""Decoders from transformers, and their weights."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, Gemma3Config

from qat_runner.errors import ConfigError
from qat_runner.models import Source, build_decoder, load_weights, match_weights, read_decoder, tokenizer_for
from tests.tiny import byte_tokenizer, tiny_decoder, tiny_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_checkpoint_computes_what_it_does_in_transformers(tmp_path: Path, kind: str) -> None:
    checkpoint = str(tiny_decoder(tmp_path, kind))
    ids = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        ours = build_decoder(checkpoint, pretrained=True).eval()
        found = ours(ids)
        expected = AutoModelForCausalLM.from_pretrained(checkpoint).eval()(ids).logits
    assert torch.allclose(found.logits, expected, atol=1e-6)
    assert found.past_key_values is None  # no key-value cache
    linear = [module for module in ours.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == (2 * 4 + 1 if kind == "gpt2" else 2 * 7 + 1)


def test_random_weights_follow_the_seed(tmp_path: Path) -> None:
    checkpoint = str(tiny_decoder(tmp_path, weights=False))
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(build_decoder(checkpoint, pretrained=False).lm_head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(ConfigError, match="contains no weights; mode=scratch trains from random ones"):
        build_decoder(checkpoint, pretrained=True)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    file = tiny_decoder(tmp_path, "gpt2") / "model.safetensors"
    state = {key: t for key, t in load_file(file).items() if not key.startswith("transformer.h.1.")}
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"tensor transformer\.h\.1\.attn\.c_attn\.bias is missing \(12 in total\)"):
        build_decoder(str(tmp_path), pretrained=True)


def test_weights_that_are_tied_are_read_under_either_name(tmp_path: Path) -> None:
    checkpoint = tiny_decoder(tmp_path, "gpt2")  # its file contains only the embedding, not the tied head
    model = build_decoder(str(checkpoint), pretrained=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    state = {key: t.clone() for key, t in model.state_dict().items() if key != "lm_head.weight"}
    torch.save(state, tmp_path / "w.pt")
    with torch.device("meta"):
        match_weights(build_decoder(str(checkpoint), False), Source(str(tmp_path / "w.pt")), "decoder", new_head=False)
    fresh = build_decoder(str(checkpoint), pretrained=False)
    load_weights(fresh, Source(str(tmp_path / "w.pt")), "decoder", new_head=False)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert torch.equal(fresh.lm_head.weight, state["transformer.wte.weight"])


def test_a_small_decoder_for_a_text(tmp_path: Path) -> None:
    text = tiny_text(tmp_path) / "train.txt"
    runpy.run_path(str(ROOT / "scripts" / "small_decoder.py"))["main"]([str(text), str(tmp_path / "small")])
    tokenizer = tokenizer_for(str(tmp_path / "small"))
    assert tokenizer.decode(tokenizer("Neues: 東京")["input_ids"]) == "Neues: 東京"
    model = build_decoder(str(tmp_path / "small"), pretrained=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is a bert; must be a decoder, such as gpt2"):
        read_decoder(str(tmp_path))
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is a gemma3, which takes more than text; must be a decoder"):
        read_decoder(str(tmp_path))
    tiny_decoder(tmp_path / "small", weights=False)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(
        ConfigError, match=r"its tokenizer has 259 tokens; must have at most 257, the vocab_size in config\.json"
    ):
        tokenizer_for(str(tmp_path / "small"))
