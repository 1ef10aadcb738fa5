"""A decoder of a million parameters for one's own text: a vocabulary of its byte pairs, and a configuration.

    python docs/examples/small_decoder.py TEXT FOLDER

TEXT is a UTF-8 file, FOLDER what is written: `qat-run model=decoder model.checkpoint=FOLDER dataset=text mode=scratch`.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY, POSITIONS, END = 2048, 512, "<|endoftext|>"


def vocabulary(text: Path) -> PreTrainedTokenizerFast:
    """Byte pairs of a text, as GPT-2 has them: no text is without tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def main(text: Path, folder: Path) -> None:
    tokenizer = vocabulary(text)
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
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    print(f"{folder}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
