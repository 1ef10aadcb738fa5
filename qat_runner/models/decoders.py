"""Decoders, which predict the next token of a text, from transformers: any checkpoint, by folder or name on the hub.

A folder with a `config.json` and a tokenizer is enough to train a decoder from random weights.
"""

import functools
from typing import Any

import torch
from torch import nn

from qat_runner.config import path_of
from qat_runner.errors import ConfigError
from qat_runner.models.hub import load_from_checkpoint, load_tokenizer, load_whole

DECODERS = ("decoder",)
"""Names of the models of this module."""


def read_decoder(checkpoint: str) -> Any:
    """Read the configuration of a checkpoint, without its weights, and disable the key-value cache in it.

    Args:
        checkpoint: a folder as `save_pretrained` writes it, with or without weights; or a name on the hub.

    Raises:
        ConfigError: the checkpoint does not exist, or is not a causal (left-to-right) decoder of text.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config: Any = load_from_checkpoint(checkpoint, AutoConfig.from_pretrained, "a decoder")
    kind = config.model_type
    sees_what_follows = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or sees_what_follows:
        raise ConfigError(
            f"model.checkpoint={checkpoint}: is a {kind}; must be a decoder, such as gpt2, llama or qwen2"
        )
    if config.get_text_config() is not config:
        raise ConfigError(f"model.checkpoint={checkpoint}: is a {kind}, which takes more than text; must be a decoder")
    config.use_cache = False
    return config


def tokenizer_for(checkpoint: str) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises:
        ConfigError: there is none, or it has more tokens than the vocabulary of the network.
    """
    tokenizer = load_tokenizer(checkpoint)
    known = read_decoder(checkpoint).vocab_size
    if len(tokenizer) > known:
        raise ConfigError(
            f"model.checkpoint={checkpoint}: its tokenizer has {len(tokenizer)} tokens; must have at most {known}, "
            f"the vocab_size in config.json"
        )
    return tokenizer


def build_decoder(checkpoint: str, pretrained: bool) -> nn.Module:
    """Build the network, from input_ids, int64 [N, L], to logits [N, L, tokens] of each position's next token.

    Args:
        checkpoint: as in `read_decoder`.
        pretrained: load the weights of the checkpoint; otherwise all are initialized from torch's global random state.

    Raises:
        ConfigError: the checkpoint cannot be loaded, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    network: Any = AutoModelForCausalLM
    config = read_decoder(checkpoint)
    if not pretrained:
        return _with_linear_layers(network.from_config(config, dtype=torch.float32)).train()
    _check_weights(checkpoint)
    load = functools.partial(network.from_pretrained, config=config, dtype=torch.float32)
    return _with_linear_layers(load_whole(checkpoint, load, "a decoder")).train()


def _check_weights(checkpoint: str) -> None:
    """Raise ConfigError if a folder contains only the configuration of a network."""
    folder = path_of(checkpoint)
    if folder.is_dir() and not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise ConfigError(f"model.checkpoint={checkpoint}: contains no weights; mode=scratch trains from random ones")


def _with_linear_layers(model: nn.Module) -> nn.Module:
    """Replace GPT-2's linear layers, which have a separate class with transposed weights (Conv1D), by nn.Linear."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in [(name, module) for name, module in model.named_modules() if type(module) is Conv1D]:
        parent, _, own = name.rpartition(".")
        inputs, outputs = layer.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
        linear.bias = layer.bias
        setattr(model.get_submodule(parent), own, linear)
    return model
