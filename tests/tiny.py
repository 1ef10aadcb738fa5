"""A BERT, decoders, a SQuAD and texts of a few kilobytes each, created when needed."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

NAMES = ("anna", "bert", "carla", "dora", "emil", "frida", "georg", "hanna")
PLACES = ("athens", "bern", "cairo", "delhi", "essen", "florence")
WORDS = (*NAMES, *PLACES, "lives", "in", "works", "where", "does", "live", "work", "?", ".", "the", "old", "town", "of")


def tiny_bert(folder: Path, layers: int = 2, positions: int = 64) -> Path:
    """Write a checkpoint of a BERT with random weights and without an answer head, and its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
    )
    BertForQuestionAnswering(config).bert.save_pretrained(folder)
    return folder


END = "<|end|>"
"""The token at the end of a text."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte, and END."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, END])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def tiny_decoder(folder: Path, kind: str = "llama", weights: bool = True, layers: int = 2) -> Path:
    """Write a checkpoint of a decoder that reads bytes, a Llama or a GPT-2, with random weights or without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config: PreTrainedConfig = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        **ends,
    )
    if kind == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=layers, n_head=2, n_positions=64, **ends)
    torch.manual_seed(0)
    (AutoModelForCausalLM.from_config(config) if weights else config).save_pretrained(folder)
    return folder


def tiny_text(folder: Path, sentences: int = 80) -> Path:
    """Write both splits of a text to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, first, count in (("train", 0, sentences), ("val", 3, sentences // 8)):
        text = "".join(str(paragraph(i, 1)["context"]) + "\n" for i in range(first, first + count))
        (folder / f"{split}.txt").write_text(text)
    return folder


def paragraph(i: int, sentences: int = 2) -> dict[str, object]:
    """Return a paragraph and a question on each of its sentences; each answer has two accepted forms."""
    context, qas = "", []
    for k in range(sentences):
        name, place = NAMES[(i + k) % len(NAMES)], PLACES[(i * 3 + k) % len(PLACES)]
        context += f"{name.capitalize()} lives in the old town of "
        answers = [{"text": place.capitalize(), "answer_start": len(context)}]
        answers.append({"text": f"of {place.capitalize()}", "answer_start": len(context) - 3})
        context += f"{place.capitalize()}. "
        qas.append({"id": f"{i}-{k}", "question": f" Where does {name.capitalize()} live?", "answers": answers})
    return {"context": context, "qas": qas}


def squad_file(path: Path, paragraphs: int, sentences: int = 2) -> Path:
    """Write a file in SQuAD's format."""
    data = [{"title": "t", "paragraphs": [paragraph(i, sentences) for i in range(paragraphs)]}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return path


def tiny_squad(folder: Path, paragraphs: int = 12) -> Path:
    """Write both splits of a SQuAD to a folder."""
    squad_file(folder / "train-v1.1.json", paragraphs)
    squad_file(folder / "dev-v1.1.json", paragraphs // 2)
    return folder
