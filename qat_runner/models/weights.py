"""Load weights into a model, from a file (see `tensor_files`) or from the published weights of a library.

The tensors of a file are matched with those of the model by name. The dict of the file that contains them, and the
prefixes that wrappers have added to their names, are found by trying what fits. Every tensor is checked before its use.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.config import PRETRAINED, TORCHVISION, path_of
from qat_runner.errors import ConfigError
from qat_runner.models.libraries import LIBRARIES, Library, library_of
from qat_runner.models.tensor_files import Parts, TensorFileError, dotted, find_file, read_file, shortened
from qat_runner.models.vision import TORCHVISION_MODELS
from qat_runner.quant.state import ADDED_LATER

log = logging.getLogger("qat_runner")

_MIN_SHARE = 0.9  # of the tensors of the model and of the file; if fewer match, the file is for another network
_FIRST = "IMAGENET1K_V1"  # torchvision's first published weights
_WRAPPERS = {
    *("module", "_orig_mod"),  # DistributedDataParallel and AveragedModel; torch.compile
    *("_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),  # Fabric, FSDP, activation checkpoints
}
_RAW = ("state_dict", "model_state_dict", "model", "net", "module")  # usual keys of weights in checkpoints
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?)([._]|$)")
_BOOKKEEPING = ("num_batches_tracked", "n_averaged")  # BatchNorm's (missing in older files), and AveragedModel's
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Source:
    """The source of weights that a config specifies."""

    value: str
    """a path, "pretrained" or "torchvision" """
    part: str | None = None
    """the dict of the file, or the prefix of the names of the tensors; None: found by trying what fits"""
    key: str = "weights"
    """the config key of the source, for messages"""
    image_size: int = 0
    """side length, in pixels, of the images for which published position embeddings are resampled; 0: not resampled"""

    @property
    def published(self) -> bool:
        """Whether the weights are published by a library, and not in a file."""
        return self.value in (PRETRAINED, TORCHVISION)

    @property
    def path(self) -> Path:
        return path_of(self.value)

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


@dataclass(frozen=True)
class Loaded:
    """The result of matching a file with a model, counted in tensors."""

    matched: int
    of_model: int
    left_fresh: tuple[str, ...]
    """tensors of the model that were not loaded and keep their initialization"""
    part: str = ""
    """the part of the file that was loaded, where the file has others, or this one contains averages"""
    converted: str = ""
    """the dtypes before and after, where the model has another dtype"""

    def __str__(self) -> str:
        part = f" from {self.part}" if self.part else ""
        converted = f"; {self.converted}" if self.converted else ""
        rest = f"; left as initialized: {', '.join(self.left_fresh)}" if self.left_fresh else ""
        return f"{self.matched} of {self.of_model} tensors loaded{part}{converted}{rest}"


def find_weights(source: Source, model_name: str) -> None:
    """Check, before any work, that weights can exist.

    Raises:
        ConfigError: the file does not exist or has an unknown suffix, or the model has no published weights.
    """
    if source.value == PRETRAINED:
        library, name = _library(source, model_name)
        if not library.has_weights(name):
            raise ConfigError(f"{source}: no published weights exist for {model_name}")
        return
    if source.value == TORCHVISION:
        _check_first_of_torchvision(source, model_name)
        return
    try:
        find_file(source.path)
    except TensorFileError as error:
        raise ConfigError(f"{source}: {error}") from error


def _check_first_of_torchvision(source: Source, model_name: str) -> None:
    name = _torchvision_name(model_name)
    if name is None:
        some = f"{', '.join(TORCHVISION_MODELS)} and torchvision/NAME"
        raise ConfigError(f"{source}: no published weights exist for {model_name}, only for {some}")
    from torchvision.models import get_model_weights  # deferred: the import takes a second

    if _FIRST not in get_model_weights(name).__members__:
        raise ConfigError(f"{source}: {model_name} has no {_FIRST}; {source.key}={PRETRAINED} loads its best weights")


def load_weights(model: nn.Module, source: Source, model_name: str, new_head: bool, quantizers: bool = False) -> Loaded:
    """Load the weights that `match_weights` finds into a model."""
    state, loaded = match_weights(model, source, model_name, new_head, quantizers)
    if not source.published and (doubt := _doubt(model, source)):
        log.warning(f"{source}: {doubt}")
    model.load_state_dict(state)
    return loaded


_OF_OTHERS = re.compile(
    r"caffe|keras|tensorflow|tf[_-]?slim|msra|detectron|resnet[_-]?(?:50|101|152)[_-]?v1(?![b-z\d]|[._-]?5)",
    re.IGNORECASE,
)
"""Names of files whose ResNets have the stride of a bottleneck in its first convolution."""


def _doubt(model: nn.Module, source: Source) -> str:
    """Return a warning if the name or description of a file suggests weights that load, but are for another network."""
    found = _OF_OTHERS.search(f"{source.path.parent.name}/{source.path.name} {_description(source.path)}")
    seconds = [getattr(module, "conv2", None) for module in model.modules() if hasattr(module, "conv3")]
    strided = any(isinstance(conv, nn.Conv2d) and conv.stride == (2, 2) for conv in seconds)
    if found is None or not strided:
        return ""
    return (
        f"{shortened(found[0])} suggests that the first convolution of each bottleneck has the stride; such weights "
        f"load either way, but need model.stride_in=1x1, and those from Keras also model.bn_eps=1.001e-5"
    )


def _description(path: Path) -> str:
    """Return the metadata of a safetensors file as text; empty for other files."""
    if path.suffix.lower() != ".safetensors":
        return ""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return str(file.metadata() or "")


def match_weights(
    model: nn.Module, source: Source, model_name: str, new_head: bool, quantizers: bool = False
) -> tuple[dict[str, Tensor], Loaded]:
    """Match weights with a model by name, and check every tensor that matches.

    Args:
        model: the model, with or without quantizers, on any device.
        source: the source of the weights.
        model_name: name of the model among MODELS.
        new_head: whether the last layer may keep its initialization where the file has another number of classes or no
            such layer. If there are several heads, this applies to all of them.
        quantizers: whether to load the state of quantizers that are the same in the file; the others, or without it all
            of them, stay as they are.

    Returns:
        A state dict for the model, and the result of the match.

    Raises:
        ConfigError: the file is unreadable, contains no tensors, or is for another network (the message says how many
            tensors match); or tensors cannot be used, for example integers, sparse tensors or NaN.
    """
    wanted = model.state_dict()
    head = set(_head_keys(model)) if new_head else set()
    parts = _part_of(source, read_weights(source, model_name))
    chosen, part = _choose(_candidates(parts, wanted, head), source, model_name)
    found, uncounted, of_quantizers = chosen.tensors, _uncounted(wanted), _quantizer_keys(wanted)
    fitting = _fitting_quantizers(found, wanted) if quantizers else {}
    passed_over = of_quantizers | _quantizer_keys(found)
    found = {key: t for key, t in found.items() if key not in passed_over} | fitting
    found = _with_tied(model, found)
    missing = [key for key in wanted if key not in found and key not in uncounted]
    clashing = [key for key in wanted if key in found and not _same_shape(found[key], wanted[key])]
    head |= _of_other_heads(clashing, head, found, wanted)
    wrong = [key for key in [*clashing, *missing] if key not in head and not _is_bookkeeping(key)]
    if wrong:
        key = wrong[0]
        why = f"has shape {list(found[key].shape)}, not {list(wanted[key].shape)}" if key in found else "is missing"
        hint = _hint(source, model_name)
        raise ConfigError(
            f"{source}: tensor {key} {why} ({len(wrong)} such tensors); must be a file for {model_name}{hint}"
        )
    usable = {key: found[key] for key in wanted if key in found and key not in clashing}
    converted = _conversions({key: t for key, t in usable.items() if key not in uncounted}, wanted)
    usable = _checked(usable, wanted, source)
    state = {key: t for key, t in wanted.items() if key not in of_quantizers} | usable
    left = tuple(key for key in [*clashing, *missing] if not _is_bookkeeping(key))
    return state, Loaded(chosen.matched, chosen.of_model, left, part, converted)


def _conversions(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Describe which dtypes of the file are converted to which dtypes of the model."""
    became: dict[str, set[str]] = {}
    for key, t in found.items():
        if t.dtype != wanted[key].dtype:
            became.setdefault(_name(wanted[key].dtype), set()).add(_name(t.dtype))
    return ", ".join(f"{', '.join(sorted(became[name]))} became {name}" for name in sorted(became))


def _of_other_heads(
    clashing: Collection[str], head: Collection[str], found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> set[str]:
    """Return all tensors with a wrong shape if they differ only in the number of classes: then they belong to heads.

    Otherwise return an empty set. A changed layer other than a head would also change the inputs of the next layer.
    """
    fit = all(found[key].dim() and found[key].shape[1:] == wanted[key].shape[1:] for key in clashing)
    numbers = {(len(found[key]), len(wanted[key])) for key in clashing} if fit else set()
    classes = {len(wanted[key]) for key in head if wanted[key].dim()}
    return set(clashing) if len(numbers) == 1 and classes.issuperset(number for _, number in numbers) else set()


def _with_tied(model: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the other names of tied tensors: a safetensors file contains only one of the names of a tied parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    one = {name: next((other for other in names if other in found), "") for names in names.values() for name in names}
    return {**{name: found[other] for name, other in one.items() if other}, **found}


def read_weights(source: Source, model_name: str) -> Parts:
    """Read all named tensors of a weights file, unchanged and on the CPU, or the published weights of a library.

    Raises:
        ConfigError: the file is unreadable or contains no tensors, or the published weights cannot be downloaded.
    """
    if source.published:
        return {"": _published(source, model_name)}
    try:
        return read_file(source.path)
    except TensorFileError as error:
        raise ConfigError(f"{source}: {error}") from error


def _published(source: Source, model_name: str) -> dict[str, Tensor]:
    """Return the published weights of a model.

    These are the best weights of its library, or the first weights of torchvision, which were trained with the classic
    recipe, like the paper's baselines.
    """
    try:
        if source.value == TORCHVISION:
            from torchvision.models import get_model_weights  # deferred: the import takes a second

            first = get_model_weights(_torchvision_name(model_name))[_FIRST]
            return dict(first.get_state_dict(progress=False, check_hash=True))
        library, name = _library(source, model_name)
        called, state = library.published(name, source.image_size)
    except ConfigError:
        raise
    except Exception as error:  # downloads may raise any exception
        reason = shortened(" ".join(str(error).split()))
        raise ConfigError(f"{source}: download failed ({type(error).__name__}: {reason})") from error
    log.info(f"{source}: {called} from {library.prefix}")
    return state


def _library(source: Source, model_name: str) -> tuple[Library, str]:
    """Return the library that publishes the weights of a model, and the name of the model there.

    Raises:
        ConfigError: there is none.
    """
    if (found := library_of(model_name)) is not None:
        return found
    if model_name not in TORCHVISION_MODELS:
        raise ConfigError(f"{source}: no published weights exist for {model_name}")
    return LIBRARIES["torchvision"], model_name


def _torchvision_name(model_name: str) -> str | None:
    """Return torchvision's name of a model; None: torchvision has no weights for it."""
    library, name = library_of(model_name) or (LIBRARIES["torchvision"], model_name)
    return name if library.prefix == "torchvision" and library.has_weights(name) else None


def _hint(source: Source, model_name: str) -> str:
    """Return a hint for messages where published weights do not fit."""
    if not source.published:
        return ""
    if library_of(model_name) is None:
        return "; model.stem=imagenet uses the published network"
    return "; mode=retrain uses a new head for another number of classes"


@dataclass(frozen=True)
class _Candidate:
    """Tensors of a file that may belong to a model, under the model's names."""

    part: str
    """place of the tensors in the file, including the prefix of their names"""
    tensors: Mapping[str, Tensor]
    matched: int
    of_model: int
    of_file: int
    """number of tensors, without bookkeeping and quantizers"""
    new: int
    """number of tensors of a new head, which need not match"""

    @property
    def fits(self) -> bool:
        return self.matched > 0 and self.matched + self.new >= _MIN_SHARE * max(self.of_model, self.of_file)

    @property
    def rank(self) -> tuple[bool, int]:
        """Sort key among candidates that fit, the lowest is preferred: raw weights first, then usual names."""
        first = self.part.partition(".")[0]
        return bool(_AVERAGED.search(self.part)), ("", *_RAW, first).index(first)


def _part_of(source: Source, parts: Parts) -> Parts:
    """Select the requested part of a file: everything, one dict, or the tensors with one prefix."""
    if source.part is None:
        return parts
    some = {
        path: {name: t for name, t in tensors.items() if dotted(path, name).startswith(f"{source.part}.")}
        for path, tensors in parts.items()
    }
    some = {path: tensors for path, tensors in some.items() if tensors}
    if not some:
        names = [dotted(path, name) for path, tensors in parts.items() for name in tensors]
        firsts = sorted({shortened(name.partition(".")[0]) for name in names if "." in name})
        has = f"; the parts are {', '.join(firsts[:8])}" if firsts else ""
        raise ConfigError(f"{source}: has no part {source.part}{has}")
    return some


def _candidates(parts: Parts, wanted: Mapping[str, Tensor], head: Collection[str]) -> Iterator[_Candidate]:
    """Yield each dict as it is, and without each prefix whose removal gives names of the model's tensors.

    Args:
        parts: the dicts of a file.
        wanted: state dict of the model.
        head: names of the model's tensors that may keep their initialization.
    """
    wrappers = _WRAPPERS - {component for name in wanted for component in name.split(".")}
    counted = wanted.keys() - _uncounted(wanted)
    head = counted.intersection(head)
    longest = max(name.count(".") + 1 for name in wanted)  # in components
    for path, tensors in parts.items():
        plain = _without_wrappers(tensors, wrappers)
        matched, of_head = Counter({"": 0}), Counter[str]()
        for name, tensor in plain.items():
            for beginning, rest in _splits(name, longest):
                fits = rest in counted and _same_shape(tensor, wanted[rest])
                if fits and not wrappers & set(beginning.split(".")):
                    matched[beginning] += 1
                    of_head[beginning] += rest in head
        best = matched.most_common(1)[0][0]
        for beginning, count in matched.items():
            new = len(head) - of_head[beginning]
            if beginning in ("", best) or count + new >= _MIN_SHARE * len(counted):
                under = {name.removeprefix(beginning): t for name, t in plain.items() if name.startswith(beginning)}
                of_file = len(under) - len(_uncounted(under))
                yield _Candidate(dotted(path, beginning.removesuffix(".")), under, count, len(counted), of_file, new)


def _splits(name: str, longest: int) -> Iterator[tuple[str, str]]:
    """Yield all ways to split a dotted name into a prefix and a rest of at most `longest` components."""
    components = name.split(".")
    for i in range(max(0, len(components) - longest), len(components)):
        yield "".join(f"{component}." for component in components[:i]), ".".join(components[i:])


def _without_wrappers(tensors: Mapping[str, Tensor], wrappers: set[str]) -> dict[str, Tensor]:
    """Remove wrappers of the model, or of parts of it, from the names of tensors; names that would collide are kept."""
    plain = {name: ".".join(part for part in name.split(".") if part not in wrappers) for name in tensors}
    times = Counter(plain.values())
    return {plain[name] if times[plain[name]] == 1 else name: tensor for name, tensor in tensors.items()}


def _choose(candidates: Iterator[_Candidate], source: Source, model_name: str) -> tuple[_Candidate, str]:
    """Choose the candidate for the model, and return it with its part if the part should be reported."""
    every = sorted(candidates, key=lambda c: c.rank)
    fitting = [c for c in every if c.fits]
    if not fitting:
        best = max(every, key=lambda c: c.matched / max(c.of_model, c.of_file, 1))
        where = shortened(best.part) if best.part else "the file"
        raise ConfigError(
            f"{source}: too few tensors match, {best.matched} of the {best.of_model} tensors of {model_name} "
            f"and of the {best.of_file} in {where}; must be a file for {model_name}"
        )
    chosen = fitting[0]
    equals = [shortened(c.part) for c in fitting if c.rank == chosen.rank]
    if len(equals) > 1:
        raise ConfigError(
            f"{source}: {', '.join(equals)} all match {model_name}; set {source.key}_part=NAME to choose one"
        )
    others = ", ".join(shortened(c.part or "names without a prefix") for c in fitting[1:])
    said = shortened(chosen.part or "names without a prefix") + (f" (not {others})" if others else "")
    return chosen, said if others or chosen.rank[0] else ""


def _checked(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Convert tensors to the dtypes of the model; bookkeeping that cannot be used is left out.

    Raises:
        ConfigError: other tensors cannot be used.
    """
    checked: dict[str, Tensor] = {}
    faults: dict[str, str] = {}
    uncounted = _uncounted(wanted)
    for key, tensor in found.items():
        fault = _fault(tensor, wanted[key], any_number=key in uncounted) or _not_finite(tensor, wanted[key])
        if fault is None:
            checked[key] = tensor.detach().to(wanted[key].dtype)
        elif not _is_bookkeeping(key):
            faults[key] = fault
    if faults:
        key, fault = next(iter(faults.items()))
        count = sum(not _is_bookkeeping(key) for key in found)
        raise ConfigError(f"{source}: tensor {key} {fault}; {len(faults)} of {count} tensors cannot be used")
    return checked


def _fault(tensor: Tensor, wanted: Tensor, any_number: bool) -> str | None:
    """Return why a tensor cannot be used, apart from its values, or None if it can.

    Args:
        tensor: a tensor of the file.
        wanted: the tensor of the model.
        any_number: whether floats and integers are both allowed, as for quantizers and counters.
    """
    name = _name(tensor.dtype)
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {shortened(type(tensor).__name__)} of {name}, not a plain tensor"
    if tensor.is_nested or tensor.is_quantized:
        return f"is {'nested' if tensor.is_nested else 'quantized'} ({name}), not a plain tensor"
    if tensor.layout != torch.strided:
        return f"is {_name(tensor.layout)} ({name}), not dense"
    if tensor.is_meta:
        return f"is on the meta device ({name}), without values"
    allowed = _FLOATS if wanted.is_floating_point() and not any_number else (*_FLOATS, *_INTEGERS)
    return None if tensor.dtype in allowed else f"is {name}, not {', '.join(map(_name, allowed))}"


def _not_finite(tensor: Tensor, wanted: Tensor) -> str | None:
    """Return a message if values are NaN or infinite, or become so in the dtype of the model; otherwise None."""
    values = tensor.to(wanted.dtype) if wanted.is_floating_point() else tensor
    bad = values.numel() - int(torch.isfinite(values).sum())
    return f"has {bad} of {values.numel()} elements that are NaN or infinite" if bad else None


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _same_shape(tensor: Tensor, wanted: Tensor) -> bool:
    """Return whether shapes are equal; also true for a nested tensor, which has no shape and is reported later."""
    return tensor.is_nested or tensor.shape == wanted.shape


def _is_bookkeeping(key: str) -> bool:
    return key.rpartition(".")[2] in _BOOKKEEPING


def _quantizer_keys(tensors: Mapping[str, object]) -> set[str]:
    """Return the names of the state of quantizers.

    A network may have other layers with such a name, but these have no grid and clipping scalars.
    """
    names = {key.removesuffix(".grid") for key in tensors if key.endswith("_quantizer.grid")}
    names = {name for name in names if f"{name}.s" in tensors}
    return {key for key in tensors if key.rpartition(".")[0] in names}


def _uncounted(tensors: Mapping[str, object]) -> set[str]:
    """Return the names that are optional and not counted: bookkeeping and the state of quantizers."""
    return {key for key in tensors if _is_bookkeeping(key)} | _quantizer_keys(tensors)


def _fitting_quantizers(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the quantizers in the file that have the same bit-width and granularity in the model."""
    fitting: dict[str, Tensor] = {}
    for name in {key.rpartition(".")[0] for key in _quantizer_keys(found)}:
        state = {key: t for key, t in found.items() if key.rpartition(".")[0] == name}
        same_shapes = all(key in wanted and _same_shape(t, wanted[key]) for key, t in state.items())
        needed = {key for key in wanted if key.rpartition(".")[0] == name and key.rpartition(".")[2] not in ADDED_LATER}
        if not same_shapes or not needed <= state.keys():
            continue
        grid, of_model = (some[f"{name}.grid"] for some in (state, wanted))
        if _fault(grid, of_model, any_number=True) or torch.equal(grid[0].round().to(of_model), of_model[0].round()):
            fitting |= state  # an invalid grid is reported later
    return fitting


def _head_keys(model: nn.Module) -> list[str]:
    """Return the names of the parameters of the classification heads.

    For networks of timm, these are all tensors in the modules of `get_classifier`, of which there may be several. For
    others, they are the parameters of the last linear layer, or of the last convolution if there is no linear layer,
    and of the auxiliary classifiers of torchvision's networks.
    """
    if hasattr(model, "get_classifier"):
        found: Any = model.get_classifier()  # type: ignore[operator]
        heads = found if isinstance(found, tuple) else (found,)
        names = [name for name, module in model.named_modules() if any(module is head for head in heads)]
        return [key for key in model.state_dict() if key.startswith(tuple(f"{name}." for name in names))]
    linear = _names_of(model, nn.Linear)
    last = {name.partition(".")[0]: name for name in linear if name.startswith(("aux", "AuxLogits."))}
    classifiers = dict.fromkeys([*(linear or _names_of(model, nn.Conv2d))[-1:], *last.values()])
    return [f"{name}.{p}" for name in classifiers for p, _ in model.get_submodule(name).named_parameters(recurse=False)]


def _names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]
