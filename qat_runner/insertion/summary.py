"""What is quantized in a network and what is not: a table, and shares of its multiply-accumulates."""

from collections.abc import Mapping, Sequence

from torch import nn

from qat_runner.insertion.columns import columns
from qat_runner.insertion.insert import QuantizedTensor, network_of, products_of, quantized_tensors
from qat_runner.insertion.layers import (
    QuantLayer,
    QuantMatmul,
    each,
    full_precision_name,
    is_quantized,
    modules_by_name,
    operands,
    quantizer_of,
)
from qat_runner.insertion.own_weights import UsingOwnWeights
from qat_runner.insertion.products import Product, UnquantizedProducts, rest
from qat_runner.insertion.wrappers import unwrapped
from qat_runner.quant import IntAffineFormat, IntFormat, Quantizer, Range
from qat_runner.wording import percent


def summary(model: nn.Module) -> str:
    """Return a table of the quantized tensors, followed by what is not quantized.

    Elements of an input are those of one sample. The clipping method, the gradient estimator and `eval_mode` have a
    column if rules set them for some tensors only: if not all weights, or not all activations, have the same. If the
    model was traced, the share of its multiply-accumulates that multiply quantized tensors follows, with the modules
    that compute the others. Layers have the names that rules use: in DistributedDataParallel, DataParallel or
    torch.compile, those in the network inside.
    """
    model = unwrapped(model)
    tensors = quantized_tensors(model)
    own = _differing(tensors)
    rows = [
        (
            t.layer,
            t.tensor,
            t.quantizer.format.bits,
            _sign(t.quantizer),
            t.quantizer.granularity,
            t.quantizer.mode,
            t.elements or "?",
            *(values[i] for values in own.values()),
        )
        for i, t in enumerate(tensors)
    ]
    table = columns(("layer", "tensor", "bits", "signed", "granularity", "scalars", "elements", *own), rows)
    if not rows:
        return table
    left = _left(model)
    parts = [table, *_shares(model), f"in full precision: {', '.join(left)}" if left else ""]
    return "\n\n".join(filter(None, parts))


def _differing(tensors: Sequence[QuantizedTensor]) -> dict[str, list[str]]:
    """Return the settings in which weights, or activations, differ from one another, with the value of each tensor."""
    of_all = {
        "clipping": [str(t.quantizer.method) for t in tensors],
        "gradient": ["own" if t.quantizer.mode == "learned" else str(t.quantizer.gradient) for t in tensors],
        "eval_mode": ["" if t.tensor == "weight" else t.quantizer.eval_mode for t in tensors],
    }

    def alike(values: Sequence[str]) -> bool:
        pairs = {(t.tensor == "weight", value) for t, value in zip(tensors, values, strict=True)}
        return len(pairs) == len({weight for weight, _ in pairs})

    return {key: values for key, values in of_all.items() if not alike(values)}


def quantized_share(model: nn.Module) -> float | None:
    """Return the share, 0 to 1, of a network's multiply-accumulates whose operands are both quantized.

    The total is that of one forward pass of the example in eval mode, plus what is computed only in training.

    Returns:
        None if the network was not traced yet.
    """
    products, modules = products_of(model), modules_by_name(network_of(model))
    total = sum(p.macs for p in products)
    return sum(p.macs for p in products if _quantized_operands(modules, p) == 2) / total if total else None


def not_quantized(model: nn.Module) -> list[UnquantizedProducts]:
    """Return the products that have an operand in full precision, by module: repeated ones once, the largest first."""
    products, modules = products_of(model), modules_by_name(network_of(model))
    return rest([p for p in products if _quantized_operands(modules, p) < 2], sum(p.macs for p in products))


def _quantized_operands(modules: Mapping[str, nn.Module], product: Product) -> int:
    """Return how many of the two operands of a product are quantized, in a network with these modules."""
    layer = modules.get(product.module)
    if layer is None or not is_quantized(layer):
        return 0
    return sum(isinstance(quantizer_of(layer, operand), Quantizer) for operand in operands(layer))


def _shares(model: nn.Module) -> list[str]:
    """Return the quantized share, and the products in full precision; nothing if the network was not traced yet."""
    share = quantized_share(model)
    if share is None:
        return []
    lines = [f"multiply-accumulates with both operands quantized: {percent(share)}"]
    left = not_quantized(model)
    return ["\n".join([*lines, *(["not quantized, or one operand alone:"] if left else []), *(f"  {r}" for r in left)])]


def _left(model: nn.Module) -> list[str]:
    """Return the kinds of modules with parameters that are not quantized, with a count, or the name of a single one.

    A module that contains other modules, such as the network itself, is listed with its own parameters only, separately
    from other modules of its class. Parameters that layers within it quantize, such as the projections of
    `nn.MultiheadAttention`, are not listed.
    """
    names: dict[tuple[str, str], list[str]] = {}
    quantized = _quantized_parameters(model)
    for name, module in model.named_modules():
        own = [key for key, parameter in module.named_parameters(recurse=False) if id(parameter) not in quantized]
        if own and not (is_quantized(module) or isinstance(module, Quantizer | UsingOwnWeights)):
            part = f"{' and '.join(own)} of " if next(module.children(), None) is not None else ""
            names.setdefault((part, full_precision_name(module)), []).append(name)
    left = [
        part + (f"{kind} {found[0]}".rstrip() if len(found) == 1 else f"{len(found)} {kind}")  # the network has no name
        for (part, kind), found in names.items()
    ]
    return [*left, *(["softmax"] if each(model, lambda m: isinstance(m, QuantMatmul)) else [])]


def _quantized_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that every layer which multiplies by them, or by a part of them, quantizes."""
    whole: dict[int, bool] = {}
    for layer in model.modules():
        if isinstance(layer, QuantLayer):
            stored = id(layer.qat_stored_weight())
            whole[stored] = whole.get(stored, True) and isinstance(layer.weight_quantizer, Quantizer)
    return {stored for stored, quantized in whole.items() if quantized}


def _sign(quantizer: Quantizer) -> str:
    if not quantizer.decided:
        return "?"
    format = quantizer.format
    if isinstance(format, IntFormat) and format.signed and format.range is not Range.TWOS_COMPLEMENT:
        return str(format.range)
    if isinstance(format, IntAffineFormat):
        return "affine" if format.signed else "no"
    return "yes" if format.signed else "no"
