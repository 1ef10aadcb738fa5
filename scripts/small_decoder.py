"""Prepare a decoder of a million parameters for a text of your own: a byte-pair vocabulary and a model config.

    python scripts/small_decoder.py TEXT FOLDER

Afterwards, FOLDER can be used as model.checkpoint with mode=scratch; it contains no weights.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY, POSITIONS, END = 2048, 512, "<|endoftext|>"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="UTF-8 file with the text")
    parser.add_argument("folder", type=Path, help="folder to write to")
    args = parser.parse_args(argv)
    if not args.text.is_file():
        parser.error(f"{args.text}: there is no such file")
    tokenizer = vocabulary(args.text)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokenizer.save_pretrained(args.folder)
    config.save_pretrained(args.folder)
    print(f"{args.folder}: {len(tokenizer)} tokens")


def vocabulary(text: Path) -> Any:
    """Return a byte-pair tokenizer for a text, as GPT-2's; it includes all bytes, so every text can be tokenized."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


if __name__ == "__main__":
    main()
