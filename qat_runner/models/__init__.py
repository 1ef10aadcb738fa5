"""Models by name, and their weights."""

from qat_runner.models.bert import BERTS, build_bert, read_checkpoint
from qat_runner.models.decoders import DECODERS, build_decoder, read_decoder, tokenizer_for
from qat_runner.models.hub import load_tokenizer
from qat_runner.models.libraries import library_of
from qat_runner.models.vision import MODELS, STEMS, build_model
from qat_runner.models.weights import Loaded, Source, find_weights, load_weights, match_weights

__all__ = [
    "BERTS",
    "DECODERS",
    "MODELS",
    "STEMS",
    "Loaded",
    "Source",
    "build_bert",
    "build_decoder",
    "build_model",
    "find_weights",
    "library_of",
    "load_tokenizer",
    "load_weights",
    "match_weights",
    "read_checkpoint",
    "read_decoder",
    "tokenizer_for",
]
