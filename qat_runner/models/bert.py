"""BERT with an answer head, from transformers: any checkpoint, by folder or by name on the hub."""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qat_runner.errors import ConfigError
from qat_runner.models.hub import load_from_checkpoint, load_whole

if TYPE_CHECKING:
    from transformers import BertConfig

BERTS = ("bert_base", "bert_large", "bert")
"""Names of the models of this module; `bert` has no default checkpoint."""


def read_checkpoint(checkpoint: str) -> "BertConfig":
    """Read the configuration of a checkpoint, without its weights.

    Args:
        checkpoint: a folder as `save_pretrained` writes it, or a name on the hub.

    Raises:
        ConfigError: the checkpoint does not exist, or is not a BERT.
    """
    from transformers import AutoConfig

    config: Any = load_from_checkpoint(checkpoint, AutoConfig.from_pretrained, "a BERT")
    if config.model_type != "bert":
        raise ConfigError(f"model.checkpoint={checkpoint}: is a {config.model_type}; must be a bert")
    config.num_labels = 2  # start and end
    return config  # type: ignore[no-any-return]


def build_bert(checkpoint: str, pretrained: bool) -> nn.Module:
    """Build the network.

    It maps (input_ids, attention_mask, token_type_ids), int64 [N, L] each, to start and end logits, [N, L] each.

    Args:
        checkpoint: as in `read_checkpoint`.
        pretrained: load the weights of the checkpoint; if it has no answer head, the head is initialized from torch's
            global random state. Otherwise all weights are initialized from it.

    Raises:
        ConfigError: the checkpoint cannot be loaded, or lacks weights other than those of the head.
    """
    from transformers import BertForQuestionAnswering

    config = read_checkpoint(checkpoint)
    if not pretrained:
        return BertForQuestionAnswering(config)
    load = functools.partial(BertForQuestionAnswering.from_pretrained, config=config, dtype=torch.float32)
    return load_whole(checkpoint, load, "a BERT", head="qa_outputs").train()
