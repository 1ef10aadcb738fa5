"""Run networks of all families, tiny or on small images, with random weights, through all steps of the library.

    python scripts/zoo.py                        # all networks, as a table on the screen
    python scripts/zoo.py --only 'timm/*' --csv zoo.csv
    python scripts/zoo.py --markdown docs/results/networks.md --csv docs/results/networks.csv

Each network is quantized to 4 bits, run forward and backward, copied, saved and loaded, frozen, exported as integers,
and restored. The table shows which share of the multiply-accumulates has quantized operands, what this share would be
with only the Conv2d and Linear layers that are called as such, what is not quantized and why, and how far the exported
file is from the frozen network.
"""

import argparse
import copy
import csv
import fnmatch
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qat_runner import export
from qat_runner.exporting.formats import read_program
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
from qat_runner.insertion.tensors import tensors_of
from qat_runner.insertion.unchanged import computed, difference, tolerance
from qat_runner.tasks import fields_of
from qat_runner.wording import percent

Make = Callable[[], tuple[nn.Module, tuple[Any, ...]]]
"""A function that returns a network and the arguments of its forward pass."""

TORCHVISION: dict[str, int] = {
    **dict.fromkeys(
        (
            *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
            *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
            *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_16"),
            "wide_resnet50_2",
        ),
        64,
    ),
    "inception_v3": 299,
    "maxvit_t": 224,
}
"""The smallest network of each torchvision family -> side of its input images in pixels."""

TIMM: dict[str, int] = {
    **dict.fromkeys(
        (
            *("convnext_atto", "dm_nfnet_f0", "edgenext_xx_small", "fastvit_t8", "ghostnet_050", "hrnet_w18_small"),
            *("inception_next_atto", "mambaout_femto", "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs"),
            *("poolformer_s12", "repvgg_a0", "resnetv2_50x1_bit", "rexnet_100", "skresnet18", "starnet_s1"),
            *("swiftformer_xs", "tf_efficientnet_b0", "tf_efficientnet_cc_b0_4e"),
        ),
        64,
    ),
    **dict.fromkeys(
        (
            *("cait_xxs24_224", "coatnet_nano_rw_224", "deit_tiny_patch16_224", "efficientformer_l1"),
            *("efficientvit_b0", "eva02_tiny_patch14_224", "gmixer_12_224", "hiera_tiny_224", "lambda_resnet26t"),
            *("levit_128s", "mixer_s32_224", "pit_ti_224", "pvt_v2_b0", "resmlp_12_224", "sequencer2d_s"),
            *("swin_tiny_patch4_window7_224", "tiny_vit_5m_224", "visformer_tiny", "vit_tiny_patch16_224"),
            *("volo_d1_224", "xcit_nano_12_p16_224"),
        ),
        224,
    ),
    **dict.fromkeys(("botnet26t_256", "halonet26t"), 256),
    "crossvit_tiny_240": 240,
    "test_vit": 160,
}
"""The same for timm."""

TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
"""The names that most configs of transformers use for the sizes of a text network."""

DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}
EXPERTS = {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
BART = {
    **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
    "d_model": 16,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
IMAGES = {**TEXT, "image_size": 32, "patch_size": 8}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        (
            *("BertModel", "RobertaModel", "ElectraModel", "DebertaV2Model", "MPNetModel", "CamembertModel"),
            *(
                "XLMRobertaModel",
                "RoFormerModel",
                "ConvBertModel",
                "MegatronBertModel",
                "ErnieModel",
                "NystromformerModel",
            ),
        ),
        ("tokens", TEXT),
    ),
    "AlbertModel": ("tokens", {**TEXT, "embedding_size": 8}),
    "DistilBertModel": ("tokens", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}),
    "ModernBertModel": ("tokens", TEXT),
    "FNetModel": ("tokens", TEXT),
    "GPT2Model": ("tokens", GPT),
    "GPTNeoModel": (
        "tokens",
        {**TEXT, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    "GPTNeoXModel": ("tokens", TEXT),
    "GPTJModel": ("tokens", {**GPT, "rotary_dim": 4}),
    "OPTModel": ("tokens", {**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "BloomModel": ("tokens", {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}),
    "FalconModel": ("tokens", TEXT),
    "MptModel": ("tokens", {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 50, "max_seq_len": 32}),
    **dict.fromkeys(
        (
            *("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "GemmaModel", "Gemma2Model", "PhiModel"),
            *(
                "Phi3Model",
                "OlmoModel",
                "Olmo2Model",
                "StableLmModel",
                "Starcoder2Model",
                "GraniteModel",
                "SmolLM3Model",
            ),
            *("CohereModel", "Glm4Model"),
        ),
        ("tokens", DECODER),
    ),
    "MixtralModel": ("tokens", EXPERTS),
    "GptOssModel": ("tokens", EXPERTS),
    "Qwen3MoeModel": ("tokens", {**EXPERTS, "num_experts": 2, "moe_intermediate_size": 16}),
    "MambaModel": ("tokens", {**TEXT, "state_size": 4}),
    "T5EncoderModel": ("tokens", T5),
    "T5Model": ("both", T5),
    "BartModel": ("both", BART),
    "MarianModel": ("both", BART),
    **dict.fromkeys(("ViTModel", "DeiTModel", "BeitModel", "CLIPVisionModel"), ("images", IMAGES)),
    **dict.fromkeys(("SiglipVisionModel", "Dinov2Model"), ("images", IMAGES)),
    "SwinModel": (
        "images",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "ConvNextModel": ("images", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}),
    "SegformerModel": ("images", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}),
    "WhisperEncoder": ("spectrum", {**BART, "num_mel_bins": 8, "max_source_positions": 16}),
    "Wav2Vec2Model": (
        "sound",
        {**TEXT, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
    "HubertModel": (
        "sound",
        {**TEXT, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
}
"""Network of transformers -> (kind of its input, a key of INPUTS; arguments of a tiny config)."""

INPUTS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "tokens": lambda: (torch.randint(2, 50, (2, 8)),),
    "both": lambda: (torch.randint(2, 50, (2, 8)), torch.ones(2, 8, dtype=torch.int64), torch.randint(2, 50, (2, 6))),
    "images": lambda: (torch.randn(2, 3, 32, 32),),
    "spectrum": lambda: (torch.randn(2, 8, 32),),
    "sound": lambda: (torch.randn(2, 400),),
}

REASONS: dict[str, str] = {
    "timm/tf_efficientnet_cc_b0_4e": "its convolution weights are mixed separately for each image",
    "timm/sequencer2d_s": "it is built from LSTMs",
    "transformers/FalconModel": "attention is not quantized in a module whose linear layers call matmul directly",
    "transformers/MambaModel": "the mixer uses its layers' weights without calling them, and implements its own scan",
}
"""Network of which a share below ENOUGH is quantized -> the reason."""

KEPT: dict[str, Sequence[str]] = {
    "transformers/MambaModel": [f"layers.{i}.mixer.{name}" for i in range(2) for name in ("conv1d", "dt_proj")]
}
"""Network -> layers that are never called, and so have no scalars to freeze."""

ENOUGH = 0.95

FAR = 0.5
"""How far an exported file may be from its network: where sums are rounded differently, a value may get another 4-bit
code, and so may the values computed from it. A file of a different network is further away than 1."""


def _torchvision(name: str, side: int) -> Make:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        import torchvision

        more: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        more |= {"image_size": side} if name.startswith("vit") else {}
        return torchvision.models.get_model(name, num_classes=10, **more), (torch.randn(2, 3, side, side),)

    return make


def _timm(name: str, side: int) -> Make:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        import timm

        return timm.create_model(name, num_classes=10), (torch.randn(2, 3, side, side),)

    return make


def _transformers(name: str, takes: str, config: dict[str, Any]) -> Make:
    def make() -> tuple[nn.Module, tuple[Any, ...]]:
        import transformers
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        kind: Any = WhisperEncoder if name == WhisperEncoder.__name__ else getattr(transformers, name)
        fixed = {f"{which}_token_id": 1 for which in ("pad", "bos", "eos")}
        fixed |= {"decoder_start_token_id": 1, "use_cache": False}
        return kind(kind.config_class(**config, **fixed)), INPUTS[takes]()

    return make


def _alive(make: Make) -> Make:
    """Replace zero initializations, such as those of heads, with random numbers, because zeros would hide errors."""

    def made() -> tuple[nn.Module, tuple[Any, ...]]:
        model, inputs = make()
        for parameter in model.parameters():
            if not parameter.detach().any():
                nn.init.normal_(parameter, std=0.02)
        return model, inputs

    return made


def zoo() -> dict[str, Make]:
    """Return all networks by "library/name"."""
    networks = {
        **{f"torchvision/{name}": _torchvision(name, side) for name, side in TORCHVISION.items()},
        **{f"timm/{name}": _timm(name, side) for name, side in TIMM.items()},
        **{f"transformers/{name}": _transformers(name, *how) for name, how in TRANSFORMERS.items()},
    }
    return {name: _alive(make) for name, make in networks.items()}


@dataclass
class Row:
    """The results of one network."""

    network: str
    layers_alone: float = 0.0
    """share, 0 to 1, of Conv2d and Linear layers that are called, and of attention by transformers' interface"""
    quantized: float = 0.0
    """share, 0 to 1, that is quantized"""
    off: str = ""
    """how the network with its quantizers disabled differs from the original: "same" bits, or "rounding" """
    exported: str = ""
    """how the file differs from the frozen network: "same" bits, or the norm of the difference over the output's"""
    steps: str = ""
    """ "all", or the last step that succeeded and the error of the next one"""
    left: str = ""
    """what is not quantized, largest share first"""
    reason: str = ""
    """the reason, if much is not quantized"""
    seconds: float = 0.0

    def cells(self) -> list[str]:
        """Return the cells of the table for readers."""
        shares = percent(self.layers_alone), percent(self.quantized)
        why = "; ".join(filter(None, (self.reason, self.left)))
        return [self.network, *shares, self.off, self.exported, self.steps, why]


HEADS = ("network", "layers alone", "quantized", "off", "exported", "steps", "what is left")


def visit(name: str, make: Make) -> Row:
    """Run one network through all steps."""
    began, row, step = time.perf_counter(), Row(name), "nothing"
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    try:
        for step, result in _steps(model, inputs, make, KEPT.get(name, ())):
            if step == "insert":
                _tell_shares(row, model)
            row.off = result if step == "off" else row.off
            row.exported = result if step == "export" else row.exported
        row.steps = "all"
    except Exception as error:  # every error becomes a line of the table
        row.steps = f"after {step}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def _tell_shares(row: Row, model: nn.Module) -> None:
    row.layers_alone, row.quantized = _of_layers_alone(model), quantized_share(model) or 0
    row.left = "; ".join(str(r) for r in not_quantized(model))
    if row.quantized < ENOUGH:
        _must(
            row.network in REASONS, f"only {percent(row.quantized)} is quantized, and REASONS has no entry: {row.left}"
        )
        row.reason = REASONS[row.network]


def _steps(model: nn.Module, inputs: tuple[Any, ...], make: Make, keep: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Execute the steps, and yield the name and the result of each."""
    state = copy.deepcopy(model.state_dict())
    plain, counted = computed(model, inputs), _counted(model, inputs)
    _must(any(bool(t.std() > 0) for t in plain if t is not None), "its outputs are constant")
    quantize_model(model, example=inputs, keep=keep)
    _check_shares(model, counted)
    yield "insert", ""
    with quantizers_disabled(model):
        now = computed(model, inputs)
    same = difference(plain, now, 0) is None
    _must(same or difference(plain, now, tolerance(model)) is None, "its outputs differ with quantizers disabled")
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
    _must(difference(quantized, computed(copy.deepcopy(model), inputs), 0) is None, "the outputs of its copy differ")
    yield "copy", ""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "net.pt")
        again = load(Path(folder) / "net.pt", make()[0]).eval()
        _must(difference(quantized, computed(again, inputs), 0) is None, "its outputs differ after save and load")
        yield "save, load", ""
        freeze(again, batches=[inputs])
        computed(again, inputs)
        yield "freeze", ""
        yield "export", _exported(again, inputs, Path(folder) / "net.pt2")
    remove_quantizers(model)
    _must(difference(plain, computed(model, inputs), 0) is None, "its outputs differ after remove_quantizers")
    _must(model.state_dict().keys() == state.keys(), "its state dict has other keys after remove_quantizers")
    yield "remove", ""


def _counted(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Return the number of multiply-accumulates according to PyTorch's own counter."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)  # the counter would need gradients of module arguments, including parameters
    with FlopCounterMode(display=False) as counter:
        computed(model, inputs)
    for p in trained:
        p.requires_grad_(True)
    return int(counter.get_total_flops()) // 2


def _check_shares(model: nn.Module, counted: int) -> None:
    """Check that the shares add up to 1, and that no products are missing compared with PyTorch's own counter."""
    shares = [quantized_share(model) or 0, *(r.share for r in not_quantized(model))]
    _must(math.isclose(sum(shares), 1, abs_tol=1e-9), f"shares add up to {sum(shares)}")
    found = sum(p.macs for p in products_of(model) if not p.training)
    _must(found >= counted, f"only {found} of {counted} multiply-accumulates are known")


@torch.no_grad()
def _exported(frozen: nn.Module, inputs: tuple[Any, ...], path: Path) -> str:
    """Export a frozen network as an integer program, and return how far its outputs are from those of the network."""
    out = frozen(*inputs)
    export(frozen, path, inputs)
    found = read_program(path)(*inputs)
    named = fields_of(out)
    expected = _floats(out if named is None else [t for t in named.values() if isinstance(t, Tensor)])
    gaps = [_gap(a, b) for a, b in zip(expected, _floats(found), strict=True)]
    _must(max(gaps) <= FAR, f"the file is {max(gaps):.2g} from the frozen network")
    return "same" if max(gaps) == 0 else f"{max(gaps):.1g}"


def _gap(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference, relative to that of the first tensor."""
    return 0.0 if torch.equal(a, b) else float((a - b).norm() / a.norm())


def _must(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)


def _floats(out: Any) -> list[Tensor]:
    return [t for t in tensors_of(out) if t is not None and t.is_floating_point()]


def _of_layers_alone(model: nn.Module) -> float:
    """Return the share of products in plain Conv2d and Linear layers and in attention of transformers."""
    modules, products = modules_by_name(network_of(model)), products_of(model)
    total = sum(p.macs for p in products)
    return sum(p.macs for p in products if _is_alone(modules, p.module)) / max(total, 1)


def _is_alone(modules: dict[str, nn.Module], name: str) -> bool:
    layer = modules.get(name)
    around = modules.get(name.rpartition(".")[0])
    if isinstance(layer, QuantMatmul):
        return hasattr(around, "eager_attention")
    past = type(around).__name__ in ("QuantShiftedWindowAttention", "QuantShiftedWindowAttentionV2")
    return not past and getattr(layer, "qat_full", None) in (nn.Conv2d, nn.Linear)


def page(rows: Sequence[Row]) -> str:
    """Return the table as a page of the docs."""
    import timm
    import torchvision
    import transformers

    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, timm, transformers))
    whole = sum(row.steps == "all" for row in rows)
    shares = [row.quantized for row in rows]
    parts = [
        PAGE.strip().format(
            networks=len(rows),
            whole="all of them" if whole == len(rows) else f"{whole} of them",
            median=percent(statistics.median(shares)),
            everything=sum(share == 1 for share in shares),
            enough=sum(share >= ENOUGH for share in shares),
            versions=versions,
            minutes=round(sum(row.seconds for row in rows) / 60),
        )
    ]
    for library in dict.fromkeys(row.network.partition("/")[0] for row in rows):
        parts += [f"## {library}", _table([row for row in rows if row.network.startswith(f"{library}/")])]
    return "\n\n".join(parts) + "\n"


PAGE = """# Tested networks

{networks} networks of torchvision, timm and transformers, with random weights and quantized to 4 bits, were taken
through everything that the library does: {whole} pass. The median share of multiply-accumulates that are quantized
is {median}; the share is 100 % in {everything} networks, and at least 95 % in {enough}.

<!-- shell: not run, takes half an hour -->
```bash
python scripts/zoo.py --markdown docs/results/networks.md --csv docs/results/networks.csv
```

The columns are:

- *layers alone*: the share of multiply-accumulates computed by Conv2d and Linear layers that are called as modules, and
  by attention through the attention interface of transformers.
- *quantized*: the share of multiply-accumulates with both operands quantized. This share and those in the last column
  add up to 100 %. The total is checked against PyTorch's own FLOP counter on the original network.
- *off*: the output with quantizers switched off, compared with the original output: bitwise the same, or the same up to
  rounding.
- *exported*: the output of an exported file (`torch.export`) that was read back, compared with that of the frozen
  network: bitwise the same, or the norm of the difference relative to the output. Each layer rounds its input to
  sixteen codes, so sums that round differently, as with folded BatchNorm, mostly have no effect; they have one where a
  value falls on another code.
- *steps*: the steps that pass. All steps are forward and backward pass, the state dict in both directions, a copy,
  `save` and `load`, `freeze`, `export`, and `remove_quantizers`, after which the output is bitwise the original one.
- *what is left*: what is not quantized, with the reason if less than 95 % is quantized.

The run took {minutes} minutes on one core of a busy machine, with {versions}.
[networks.csv](networks.csv) has the same data, and the seconds of each network.
"""


def _table(rows: Sequence[Row]) -> str:
    """Return a Markdown table."""
    lines = [HEADS, ["---"] * len(HEADS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in line)} |" for line in lines)


def read(path: Path) -> dict[str, Row]:
    """Read the rows of a file that `write` has written, by network."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [Row(**row) for row in csv.DictReader(file)]  # type: ignore[arg-type]
    for row in rows:
        row.layers_alone, row.quantized, row.seconds = map(float, (row.layers_alone, row.quantized, row.seconds))
    return {row.network: row for row in rows}


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write all fields of the rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([[field.name for field in fields(Row)], *map(astuple, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="*", help="glob pattern of names such as timm/levit_128s")
    parser.add_argument(
        "--csv", type=Path, help="also write the table to this file; rows of other networks in it are kept"
    )
    parser.add_argument("--markdown", type=Path, help="also write the table to this file, as a page of the docs")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    networks = zoo()
    if not fnmatch.filter(networks, asked.only):
        parser.error(f"--only {asked.only}: there is no such network")
    found = read(asked.csv) if asked.csv is not None and asked.csv.exists() else {}
    for name in fnmatch.filter(networks, asked.only):
        found[name] = visit(name, networks[name])
        print(f"{name}: {percent(found[name].quantized)}, {found[name].steps}", file=sys.stderr)
        rows = [found[name] for name in networks if name in found]
        if asked.csv is not None:
            write(asked.csv, rows)
        if asked.markdown is not None:
            asked.markdown.write_text(page(rows), encoding="utf-8")
    print(columns(HEADS, [row.cells() for row in rows]))
    print(f"median share: {percent(statistics.median(row.quantized for row in rows))}")


if __name__ == "__main__":
    main()
