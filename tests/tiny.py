"""A BERT and a SQuAD of a few kilobytes each, made on the spot."""

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertForQuestionAnswering

NAMES = ("anna", "bert", "carla", "dora", "emil", "frida", "georg", "hanna")
PLACES = ("athens", "bern", "cairo", "delhi", "essen", "florence")
WORDS = (*NAMES, *PLACES, "lives", "in", "works", "where", "does", "live", "work", "?", ".", "the", "old", "town", "of")


def tiny_bert(folder: Path, layers: int = 2, positions: int = 64) -> Path:
    """A checkpoint of a BERT with random weights, without an answer head, and its vocabulary."""
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


def paragraph(i: int, sentences: int = 2) -> dict[str, object]:
    """A paragraph and a question on each of its sentences; the answer has two accepted forms."""
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
    """A file in SQuAD's format."""
    data = [{"title": "t", "paragraphs": [paragraph(i, sentences) for i in range(paragraphs)]}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return path


def tiny_squad(folder: Path, paragraphs: int = 12) -> Path:
    """A folder with both splits."""
    squad_file(folder / "train-v1.1.json", paragraphs)
    squad_file(folder / "dev-v1.1.json", paragraphs // 2)
    return folder
