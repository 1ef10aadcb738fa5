"""Networks of all families through the steps of the library, tiny or with small pictures, weights random: a table.

    python scripts/zoo.py                        # all of them, as Markdown, to the screen
    python scripts/zoo.py --only 'timm/*' --csv zoo.csv

Each is quantized, run forward and backward, copied, written and read, frozen, and given back. The table says which
share of the multiply-accumulates is of quantized tensors, what it is with Conv2d and Linear layers alone that are
called as such, and what is left.
"""

import argparse
import copy
import csv
import fnmatch
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion import (
    freeze,
    full_precision_state_dict,
    load,
    not_quantized,
    quantize_model,
    quantized_share,
    remove_quantizers,
    save,
)
from qat_runner.insertion.columns import columns
from qat_runner.insertion.insert import network_of, products_of, quantizers_disabled
from qat_runner.insertion.layers import QuantMatmul, modules_by_name
from qat_runner.insertion.products import percent
from qat_runner.insertion.tensors import tensors_of
from qat_runner.insertion.unchanged import computed, difference, tolerance

Make = Callable[[], tuple[nn.Module, tuple[Any, ...]]]
"""A network and arguments of its forward."""

TORCHVISION = {
    **dict.fromkeys(
        (
            *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5"),
            *("mobilenet_v3_small", "regnet_x_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"),
            *("swin_t", "swin_v2_t", "vgg11"),
        ),
        64,
    ),
    "inception_v3": 299,
    "maxvit_t": 224,
    "vit_b_16": 224,
}
"""Smallest networks of torchvision's families -> side of a picture that they take."""

TIMM = {
    **dict.fromkeys(
        (
            *("convnext_atto", "resnetv2_50x1_bit", "dm_nfnet_f0", "tf_efficientnet_b0", "efficientnet_b0"),
            *("mobilevit_xxs", "edgenext_xx_small", "poolformer_s12", "regnetx_002", "ghostnet_050", "rexnet_100"),
            "hrnet_w18_small",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            *("vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224"),
            *("levit_128s", "coatnet_nano_rw_224", "crossvit_tiny_240", "cait_xxs24_224", "xcit_nano_12_p16_224"),
            *("beit_base_patch16_224", "eva02_tiny_patch14_224", "halonet26t", "pvt_v2_b0", "efficientvit_b0"),
        ),
        224,
    ),
    "test_vit": 160,
    "crossvit_tiny_240": 240,
    "halonet26t": 256,
}
"""The same of timm."""

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
"""What most configs of transformers call the sizes of a network."""

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "BertModel": SMALL,
    "GPT2Model": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32},
    "LlamaModel": {**SMALL, "num_key_value_heads": 1},
    "MixtralModel": {**SMALL, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1},
    "T5EncoderModel": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
    "DistilBertModel": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50},
    "DebertaV2Model": SMALL,
}
"""Network of transformers -> its config, tiny."""


def _torchvision(name: str, side: int) -> Make:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        import torchvision

        more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, num_classes=10, **more), (torch.randn(2, 3, side, side),)

    return make


def _timm(name: str, side: int) -> Make:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        import timm

        return timm.create_model(name, num_classes=10), (torch.randn(2, 3, side, side),)

    return make


def _transformers(name: str, config: dict[str, Any]) -> Make:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        import transformers

        tokens = {f"{which}_token_id": 1 for which in ("pad", "bos", "eos")}
        kind: Any = getattr(transformers, name)
        return kind(kind.config_class(**config, **tokens)), (torch.randint(2, 50, (2, 8)),)

    return make


def zoo() -> dict[str, Make]:
    """All networks, by "library/name"."""
    return {
        **{f"torchvision/{name}": _torchvision(name, side) for name, side in TORCHVISION.items()},
        **{f"timm/{name}": _timm(name, side) for name, side in TIMM.items()},
        **{f"transformers/{name}": _transformers(name, config) for name, config in TRANSFORMERS.items()},
    }


@dataclass(frozen=True)
class Row:
    """What became of one network."""

    network: str
    layers_alone: str
    """share of what Conv2d and Linear layers compute when they are called, and attention by transformers' interface"""
    quantized: str
    """share that is quantized"""
    off: str
    """how the network with quantizers switched off differs: "same" bits, or "rounding" """
    steps: str
    """ "all", or the first that fails and how"""
    left: str
    """what is not quantized, the largest first"""
    seconds: float


def visit(name: str, make: Make) -> Row:
    """Take one network through all steps."""
    began, shares, off = time.perf_counter(), ("", ""), ""
    left: list[str] = []
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    step = "insert"
    try:
        for step, result in _steps(model, inputs, make):
            if step == "insert":
                shares = percent(_of_layers_alone(model)), percent(quantized_share(model) or 0)
                left = [str(r) for r in not_quantized(model)]
            off = result if step == "off" else off
        done = "all"
    except Exception as error:  # whatever it is, it is a line of the table
        done = f"after {step}: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return Row(name, *shares, off, done, "; ".join(left[:3]), round(time.perf_counter() - began, 1))


def _steps(model: nn.Module, inputs: tuple[Any, ...], make: Make) -> Iterator[tuple[str, str]]:
    """The steps, each told when it is done."""
    state, plain = copy.deepcopy(model.state_dict()), computed(model, inputs)
    quantize_model(model, example=inputs)
    yield "insert", ""
    with quantizers_disabled(model):
        now = computed(model, inputs)
    same = difference(plain, now, 0) is None
    _must(same or difference(plain, now, tolerance(model)) is None, "it differs with quantizers off")
    yield "off", "same" if same else "rounding"
    out = model.train()(*inputs)
    sum(t.square().mean() for t in _floats(out)).backward()  # type: ignore[union-attr]
    model.zero_grad()
    model.eval()
    yield "backward", ""
    model.load_state_dict(state)
    make()[0].load_state_dict(full_precision_state_dict(model))
    yield "state dict", ""
    quantized = computed(model, inputs)
    _must(difference(quantized, computed(copy.deepcopy(model), inputs), 0) is None, "its copy differs")
    yield "copy", ""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "net.pt")
        again = load(Path(folder) / "net.pt", make()[0]).eval()
        _must(difference(quantized, computed(again, inputs), 0) is None, "it differs when loaded")
    yield "save, load", ""
    computed(freeze(again, batches=[inputs]), inputs)
    yield "freeze", ""
    remove_quantizers(model)
    _must(difference(plain, computed(model, inputs), 0) is None, "without quantizers it is not what it was")
    _must(model.state_dict().keys() == state.keys(), "its state has other keys")
    yield "remove", ""


def _must(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)


def _floats(out: Any) -> list[Tensor]:
    return [t for t in tensors_of(out) if t is not None and t.is_floating_point()]


def _of_layers_alone(model: nn.Module) -> float:
    """The share of products that plain Conv2d and Linear layers compute, and products of transformers' attention."""
    modules, products = modules_by_name(network_of(model)), products_of(model)
    total = sum(p.macs for p in products)
    return sum(p.macs for p in products if _is_alone(modules, p.module)) / max(total, 1)


def _is_alone(modules: dict[str, nn.Module], name: str) -> bool:
    layer = modules.get(name)
    around = modules.get(name.rpartition(".")[0])
    if isinstance(layer, QuantMatmul):
        return hasattr(around, "eager_attention")
    past = type(around).__name__ in ("QuantShiftedWindowAttention", "QuantShiftedWindowAttentionV2")
    return not past and getattr(layer, "full_precision", None) in (nn.Conv2d, nn.Linear)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="*", help="glob over names such as timm/levit_128s")
    parser.add_argument("--csv", type=Path, help="file for the table, besides")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    for name, make in zoo().items():
        if fnmatch.fnmatchcase(name, asked.only):
            rows.append(visit(name, make))
            print(f"{name}: {rows[-1].quantized}, {rows[-1].steps}", file=sys.stderr)
    heads = [field.name.replace("_", " ") for field in fields(Row)]
    print(columns(heads, [astuple(row) for row in rows]))
    if asked.csv is not None:
        with asked.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([heads, *map(astuple, rows)])


if __name__ == "__main__":
    main()
