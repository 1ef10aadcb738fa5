"""Loading weights into a model: from a file (see `tensor_files`), or torchvision's published ones.

The tensors of a file are matched with a model by name. Which dict of the file they lie in, and what wrappers have put
before their names, is found by trying what fits; no tensor is used before it was looked at.
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
from qat_runner.models.tensor_files import Parts, TensorFileError, dotted, find_file, read_file, shown
from qat_runner.models.vision import TORCHVISION_MODELS
from qat_runner.quant.state import LATER

log = logging.getLogger("qat_runner")

_MIN_SHARE = 0.9  # of the model's tensors and of the file's: below, the file belongs to another network
_FIRST = "IMAGENET1K_V1"  # that torchvision published
_WRAPPERS = {
    *("module", "_orig_mod"),  # DistributedDataParallel and AveragedModel; torch.compile
    *("_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),  # Fabric, FSDP, activation checkpoints
}
_RAW = ("state_dict", "model_state_dict", "model", "net", "module")  # keys that training scripts keep weights under
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?)([._]|$)")
_BOOKKEEPING = ("num_batches_tracked", "n_averaged")  # of BatchNorm, which older files lack; of AveragedModel
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Source:
    """Where a config says that weights are."""

    value: str
    """a path, "pretrained" or "torchvision" """
    part: str | None = None
    """the dict of the file, or the beginning of the tensors' names; None: found by what fits"""
    key: str = "weights"
    """the key that says so, for messages"""
    image_size: int = 0
    """pixels a side that published positions are resampled for; 0: as they are"""

    @property
    def published(self) -> bool:
        """Whether they are a library's rather than in a file."""
        return self.value in (PRETRAINED, TORCHVISION)

    @property
    def path(self) -> Path:
        return path_of(self.value)

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


@dataclass(frozen=True)
class Loaded:
    """How a file and a model matched, in tensors."""

    matched: int
    of_model: int
    left_fresh: tuple[str, ...]
    """tensors of the model that the file did not fill"""
    part: str = ""
    """that they were taken from, where the file has others or this one holds averages"""
    converted: str = ""
    """what they were and became, where the model has another dtype"""

    def __str__(self) -> str:
        part = f" from {self.part}" if self.part else ""
        converted = f"; {self.converted}" if self.converted else ""
        rest = f"; left as initialized: {', '.join(self.left_fresh)}" if self.left_fresh else ""
        return f"{self.matched} of {self.of_model} tensors loaded{part}{converted}{rest}"


def find_weights(source: Source, model_name: str) -> None:
    """Refuse, before any work, weights that cannot be there.

    Raises:
        ConfigError: no such file, an unknown suffix, no published weights for the model.
    """
    if source.value == PRETRAINED:
        library, name = _library(source, model_name)
        if not library.has_weights(name):
            raise ConfigError(f"{source}: there are none for {model_name}")
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
        raise ConfigError(f"{source}: there are none for {model_name}, only for {some}")
    from torchvision.models import get_model_weights  # which takes a second to import

    if _FIRST not in get_model_weights(name).__members__:
        raise ConfigError(f"{source}: {model_name} has no {_FIRST}; {source.key}={PRETRAINED} has its best")


def load_weights(model: nn.Module, source: Source, model_name: str, new_head: bool, quantizers: bool = False) -> Loaded:
    """Load weights into a model: what `match_weights` finds."""
    state, loaded = match_weights(model, source, model_name, new_head, quantizers)
    if not source.published and (doubt := _doubt(model, source)):
        log.warning(f"{source}: {doubt}")
    model.load_state_dict(state)
    return loaded


_OF_OTHERS = re.compile(
    r"caffe|keras|tensorflow|tf[_-]?slim|msra|detectron|resnet[_-]?(?:50|101|152)[_-]?v1(?![b-z\d]|[._-]?5)",
    re.IGNORECASE,
)
"""What files are called whose ResNets have the stride of a bottleneck in its first convolution."""


def _doubt(model: nn.Module, source: Source) -> str:
    """What a file's name and description let one fear: weights that load, and are meant for another network."""
    told = _OF_OTHERS.search(f"{source.path.parent.name}/{source.path.name} {_description(source.path)}")
    seconds = [getattr(module, "conv2", None) for module in model.modules() if hasattr(module, "conv3")]
    strided = any(isinstance(conv, nn.Conv2d) and conv.stride == (2, 2) for conv in seconds)
    if told is None or not strided:
        return ""
    return (
        f"{shown(told[0])} says that the first convolution of each bottleneck may have its stride, which loads all the "
        f"same: model.stride_in=1x1 would be right then, and from Keras model.bn_eps=1.001e-5"
    )


def _description(path: Path) -> str:
    """What a safetensors file says of itself."""
    if path.suffix.lower() != ".safetensors":
        return ""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return str(file.metadata() or "")


def match_weights(
    model: nn.Module, source: Source, model_name: str, new_head: bool, quantizers: bool = False
) -> tuple[dict[str, Tensor], Loaded]:
    """Match weights with a model by name, and look at every tensor that matches.

    Args:
        model: the model, with or without quantizers, on any device.
        source: where they are.
        model_name: its name among MODELS.
        new_head: whether the last layer may keep its initialization where the file's has another number of classes, or
            none; and where there are several such, all of them.
        quantizers: whether quantizers become what they were in the file, where it has the same ones; otherwise they
            stay as they are.

    Returns:
        A state dict for the model, and what matched.

    Raises:
        ConfigError: the file is unreadable, holds no tensors, or is another network's, the message counts what matched;
            or it holds tensors that are none to compute with, such as integers, sparse ones, NaN.
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
        raise ConfigError(f"{source}: tensor {key} {why} ({len(wrong)} such); it must be a file for {model_name}{hint}")
    usable = {key: found[key] for key in wanted if key in found and key not in clashing}
    converted = _conversions({key: t for key, t in usable.items() if key not in uncounted}, wanted)
    usable = _checked(usable, wanted, source)
    state = {key: t for key, t in wanted.items() if key not in of_quantizers} | usable
    left = tuple(key for key in [*clashing, *missing] if not _is_bookkeeping(key))
    return state, Loaded(chosen.matched, chosen.of_model, left, part, converted)


def _conversions(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Which dtypes of a file become which of the model, in words."""
    became: dict[str, set[str]] = {}
    for key, t in found.items():
        if t.dtype != wanted[key].dtype:
            became.setdefault(_name(wanted[key].dtype), set()).add(_name(t.dtype))
    return ", ".join(f"{', '.join(sorted(became[name]))} became {name}" for name in sorted(became))


def _of_other_heads(
    clashing: Collection[str], head: Collection[str], found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> set[str]:
    """All tensors that clash, where the number of classes is all that they differ in: those of several heads.

    Another layer is none of them: what comes after it would differ in its inputs.
    """
    fit = all(found[key].dim() and found[key].shape[1:] == wanted[key].shape[1:] for key in clashing)
    numbers = {(len(found[key]), len(wanted[key])) for key in clashing} if fit else set()
    classes = {len(wanted[key]) for key in head if wanted[key].dim()}
    return set(clashing) if len(numbers) == 1 and classes.issuperset(number for _, number in numbers) else set()


def _with_tied(model: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file that the model has under several names, under all of them: safetensors keep only one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    one = {name: next((other for other in names if other in found), "") for names in names.values() for name in names}
    return {**{name: found[other] for name, other in one.items() if other}, **found}


def read_weights(source: Source, model_name: str) -> Parts:
    """All named tensors of a weights file, on the CPU, as they are in it; or torchvision's published ones.

    Raises:
        ConfigError: the file is unreadable or holds no tensors; the published weights cannot be had.
    """
    if source.published:
        return {"": _published(source, model_name)}
    try:
        return read_file(source.path)
    except TensorFileError as error:
        raise ConfigError(f"{source}: {error}") from error


def _published(source: Source, model_name: str) -> dict[str, Tensor]:
    """The published weights of a model: the best of its library, or the first of torchvision's, which is of the classic
    recipe that the paper's baselines share.
    """
    try:
        if source.value == TORCHVISION:
            from torchvision.models import get_model_weights  # which takes a second to import

            first = get_model_weights(_torchvision_name(model_name))[_FIRST]
            return dict(first.get_state_dict(progress=False, check_hash=True))
        library, name = _library(source, model_name)
        called, state = library.published(name, source.image_size)
    except ConfigError:
        raise
    except Exception as error:  # whatever a download may raise
        reason = shown(" ".join(str(error).split()))
        raise ConfigError(f"{source}: download failed ({type(error).__name__}: {reason})") from error
    log.info(f"{source}: {called} of {library.prefix}")
    return state


def _library(source: Source, model_name: str) -> tuple[Library, str]:
    """That publishes the weights of a model, and its name there.

    Raises:
        ConfigError: there is none.
    """
    if (found := library_of(model_name)) is not None:
        return found
    if model_name not in TORCHVISION_MODELS:
        raise ConfigError(f"{source}: there are none for {model_name}")
    return LIBRARIES["torchvision"], model_name


def _torchvision_name(model_name: str) -> str | None:
    """What torchvision calls a model; None: it has no such."""
    library, name = library_of(model_name) or (LIBRARIES["torchvision"], model_name)
    return name if library.prefix == "torchvision" and library.has_weights(name) else None


def _hint(source: Source, model_name: str) -> str:
    """What may help where published weights do not fit."""
    if not source.published:
        return ""
    if library_of(model_name) is None:
        return "; model.stem=imagenet keeps the published network"
    return "; mode=retrain gives it a new head for another number of classes"


@dataclass(frozen=True)
class _Candidate:
    """Tensors of a file that might be a model's, under the model's names."""

    part: str
    """where they lie in the file, what precedes their names included"""
    tensors: Mapping[str, Tensor]
    matched: int
    of_model: int
    of_file: int
    """tensors, but for bookkeeping and quantizers"""
    new: int
    """tensors of a new head, which have to match nothing"""

    @property
    def fits(self) -> bool:
        return self.matched > 0 and self.matched + self.new >= _MIN_SHARE * max(self.of_model, self.of_file)

    @property
    def rank(self) -> tuple[bool, int]:
        """What is preferred of several that fit, the least first: raw weights, and names that they usually have."""
        first = self.part.partition(".")[0]
        return bool(_AVERAGED.search(self.part)), ("", *_RAW, first).index(first)


def _part_of(source: Source, parts: Parts) -> Parts:
    """What a file has under the part that is asked for: all, or a dict, or those names that begin so."""
    if source.part is None:
        return parts
    some = {
        path: {name: t for name, t in tensors.items() if dotted(path, name).startswith(f"{source.part}.")}
        for path, tensors in parts.items()
    }
    some = {path: tensors for path, tensors in some.items() if tensors}
    if not some:
        names = [dotted(path, name) for path, tensors in parts.items() for name in tensors]
        firsts = sorted({shown(name.partition(".")[0]) for name in names if "." in name})
        has = f"; there are {', '.join(firsts[:8])}" if firsts else ""
        raise ConfigError(f"{source}: has no part {source.part}{has}")
    return some


def _candidates(parts: Parts, wanted: Mapping[str, Tensor], head: Collection[str]) -> Iterator[_Candidate]:
    """Each dict as it is, and as it is without any beginning of its names that leaves tensors of the model.

    Args:
        parts: of a file.
        wanted: the model's state.
        head: its tensors that may stay as they are.
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
    """All ways to cut a dotted name before a component, none of them leaving more than so many components."""
    components = name.split(".")
    for i in range(max(0, len(components) - longest), len(components)):
        yield "".join(f"{component}." for component in components[:i]), ".".join(components[i:])


def _without_wrappers(tensors: Mapping[str, Tensor], wrappers: set[str]) -> dict[str, Tensor]:
    """Tensors by their names before a model was wrapped, whole or in parts; names that would meet stay as they are."""
    plain = {name: ".".join(part for part in name.split(".") if part not in wrappers) for name in tensors}
    times = Counter(plain.values())
    return {plain[name] if times[plain[name]] == 1 else name: tensor for name, tensor in tensors.items()}


def _choose(candidates: Iterator[_Candidate], source: Source, model_name: str) -> tuple[_Candidate, str]:
    """The candidate that is the model's, and its part if that has to be said."""
    every = sorted(candidates, key=lambda c: c.rank)
    fitting = [c for c in every if c.fits]
    if not fitting:
        best = max(every, key=lambda c: c.matched / max(c.of_model, c.of_file, 1))
        where = shown(best.part) if best.part else "the file"
        raise ConfigError(
            f"{source}: little matches, {best.matched} of the {best.of_model} tensors of {model_name} "
            f"and of the {best.of_file} in {where}; it must be a file for {model_name}"
        )
    chosen = fitting[0]
    equals = [shown(c.part) for c in fitting if c.rank == chosen.rank]
    if len(equals) > 1:
        raise ConfigError(f"{source}: {', '.join(equals)} all hold {model_name}; {source.key}_part=NAME chooses one")
    others = ", ".join(shown(c.part or "names without a beginning") for c in fitting[1:])
    said = shown(chosen.part or "names without a beginning") + (f" (not {others})" if others else "")
    return chosen, said if others or chosen.rank[0] else ""


def _checked(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Source) -> dict[str, Tensor]:
    """Tensors in the dtypes of the model.

    Raises:
        ConfigError: some are none to compute with; bookkeeping that is none is left out.
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
    """What, apart from its values, makes a tensor none to compute with; quantizers and counters take any number."""
    name = _name(tensor.dtype)
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {shown(type(tensor).__name__)} of {name}, not a plain tensor"
    if tensor.is_nested or tensor.is_quantized:
        return f"is {'nested' if tensor.is_nested else 'quantized'} ({name}), not a plain tensor"
    if tensor.layout != torch.strided:
        return f"is {_name(tensor.layout)} ({name}), not dense"
    if tensor.is_meta:
        return f"is on the meta device ({name}), without values"
    allowed = _FLOATS if wanted.is_floating_point() and not any_number else (*_FLOATS, *_INTEGERS)
    return None if tensor.dtype in allowed else f"is {name}, not {', '.join(map(_name, allowed))}"


def _not_finite(tensor: Tensor, wanted: Tensor) -> str | None:
    """Whether values are NaN or infinite, or become so in the dtype of the model."""
    values = tensor.to(wanted.dtype) if wanted.is_floating_point() else tensor
    bad = values.numel() - int(torch.isfinite(values).sum())
    return f"has {bad} of {values.numel()} elements that are NaN or infinite" if bad else None


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _same_shape(tensor: Tensor, wanted: Tensor) -> bool:
    """One that is nested has no shape, and is told of later."""
    return tensor.is_nested or tensor.shape == wanted.shape


def _is_bookkeeping(key: str) -> bool:
    return key.rpartition(".")[2] in _BOOKKEEPING


def _quantizer_keys(tensors: Mapping[str, object]) -> set[str]:
    """The names that are of quantizers. A network may call a layer of its own so: that one has no grid and scalars."""
    names = {key.removesuffix(".grid") for key in tensors if key.endswith("_quantizer.grid")}
    names = {name for name in names if f"{name}.s" in tensors}
    return {key for key in tensors if key.rpartition(".")[0] in names}


def _uncounted(tensors: Mapping[str, object]) -> set[str]:
    """The names that are welcome, but never missed, and never counted."""
    return {key for key in tensors if _is_bookkeeping(key)} | _quantizer_keys(tensors)


def _fitting_quantizers(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of those quantizers in the file that have the same bits and granularity in the model."""
    fitting: dict[str, Tensor] = {}
    for name in {key.rpartition(".")[0] for key in _quantizer_keys(found)}:
        state = {key: t for key, t in found.items() if key.rpartition(".")[0] == name}
        same_shapes = all(key in wanted and _same_shape(t, wanted[key]) for key, t in state.items())
        needed = {key for key in wanted if key.rpartition(".")[0] == name and key.rpartition(".")[2] not in LATER}
        if not same_shapes or not needed <= state.keys():
            continue
        grid, of_model = (some[f"{name}.grid"] for some in (state, wanted))
        if _fault(grid, of_model, any_number=True) or torch.equal(grid[0].round().to(of_model), of_model[0].round()):
            fitting |= state  # an odd grid is told of later
    return fitting


def _head_keys(model: nn.Module) -> list[str]:
    """Names of the parameters of the last linear layer (of none, convolution), or of all that lies in what timm calls
    the classifier, which may be several; of torchvision's networks those of auxiliary classifiers as well."""
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
