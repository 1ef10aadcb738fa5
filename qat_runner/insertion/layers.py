"""Layers that quantize what they multiply: their weight and input, or both factors of a product.

A layer is converted in place by swapping its class, so the module object, its parameters, their names, its hooks and
every reference to it stay what they were. Converting back swaps the class again. The quantizers are submodules,
`weight_quantizer` and `input_quantizer`; for an operand in full precision the submodule is an identity.

A class with a forward of its own, for example one that standardizes its weight first, keeps that forward. While it
runs, a mode (`Taking`) sees its calls of torch functions before PyTorch executes them. The one call that multiplies is
run with quantized factors instead. So the weight that is quantized is the weight that is used.

Everything mixed into other classes has a name that begins with qat, to avoid clashes with their names.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import cached, is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from qat_runner.insertion.calls import Call, Compute, parse_call
from qat_runner.insertion.modes import evaluating
from qat_runner.policy import DEPTHWISE, EMBEDDING, WEIGHT_AND_INPUT
from qat_runner.quant import Quantizer
from qat_runner.quant.recompute import recomputing
from qat_runner.quant.tensors import version_key

ELEMENTS = "elements_seen"
"""Attribute of a quantized layer that was traced: operand -> number of its elements for one sample."""

ROTATION = "qat_rotation"
"""Name of the submodule that rotates the factors of a linear layer."""


class Kind(NamedTuple):
    """A kind of layer with a weight."""

    name: str
    """the name that policies use for it"""
    function: Any
    """the torch function by which it multiplies"""
    channels: int = 0
    """the dimension of the weight that runs over output channels"""


KINDS: dict[type[nn.Module], Kind] = {
    nn.Conv1d: Kind("Conv1d", torch.conv1d),
    nn.Conv2d: Kind("Conv2d", torch.conv2d),
    nn.Conv3d: Kind("Conv3d", torch.conv3d),
    nn.ConvTranspose1d: Kind("ConvTranspose1d", torch.conv_transpose1d, 1),
    nn.ConvTranspose2d: Kind("ConvTranspose2d", torch.conv_transpose2d, 1),
    nn.ConvTranspose3d: Kind("ConvTranspose3d", torch.conv_transpose3d, 1),
    nn.Linear: Kind("Linear", F.linear),
    nn.Embedding: Kind(EMBEDDING, F.embedding),
}
"""Class -> its kind. What a subclass computes is examined separately."""


def kinds() -> dict[type[nn.Module], Kind]:
    """Return KINDS, and the linear layer of transformers whose weight is [C, K], if transformers is in use."""
    module = sys.modules.get("transformers.pytorch_utils")
    return KINDS if module is None else {**KINDS, module.Conv1D: Kind("Linear", torch.addmm, 1)}


def layer_kind(layer: nn.Module | type[nn.Module]) -> Kind | None:
    """Return the kind of a layer with a weight, quantized or not, or of such a class; None for anything else."""
    of = layer if isinstance(layer, type) else type(layer)
    return next((kind for base, kind in kinds().items() if issubclass(of, base)), None)


class Swapped(nn.Module):
    """A module whose class was swapped for one made by `quantized_class`, by which it is also pickled and copied."""

    qat_full: ClassVar[type[nn.Module]]
    """the class it had before"""

    qat_base: ClassVar[Any] = None
    """the class that was requested to be mixed in; None: the one that fits `qat_full`"""

    def qat_added(self) -> Sequence[str]:
        """Return the names of the submodules that it did not have before."""
        return ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)
        return _new, (self.qat_full, self.qat_base), *made[2:]


def _new(full: type[nn.Module], base: type[nn.Module] | None) -> Any:
    made = quantized_class(full, base)
    return made.__new__(made)


def stored(module: Any, name: str) -> nn.Parameter:
    """Return the parameter that a tensor of a module is or is made from; if it is made from several, the largest."""
    own: dict[str, nn.Parameter] = {key: p for key, p in module._parameters.items() if p is not None}
    if name in own:
        return own[name]
    made_of: list[nn.Parameter]
    if is_parametrized(module, name):
        made_of = [*module.parametrizations[name].parameters()]
    else:  # weight_orig of pruning, weight_v of weight normalization; or what a property is computed from
        made_of = [p for key, p in own.items() if key.startswith(f"{name}_")] or [*own.values()]
    return max(made_of, key=torch.numel)


def owner(layer: nn.Module) -> nn.Module:
    """Return the module that owns the parameter of a layer's weight: in most cases the layer itself."""
    of: nn.Module = getattr(layer, "_of", (layer,))[0]
    return of


def belong(layer: Any, module: nn.Module) -> None:
    """Make a layer use the parameters of a module: replicas of nn.DataParallel share the layer of the original."""
    if layer._of[0] is not module:
        layer._of = (module,)


UNSWAPPABLE = (torch.jit.ScriptModule, torch.fx.GraphModule)
"""Modules whose class was generated for them alone and holds what other classes lack: it cannot be swapped."""


def takes_hooks(module: nn.Module) -> bool:
    """Whether forward hooks can be registered on a module."""
    return not isinstance(module, torch.jit.ScriptModule)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a forward was set on the instance, so that the forward of its class is not called.

    `module.forward = torch.compile(module.forward)` does this, for example.
    """
    return "forward" in vars(module)


def reading_weight(layer: nn.Module) -> AbstractContextManager[None]:
    """Context manager under which reading the weight of a layer changes nothing.

    In training, spectral normalization updates its estimate each time the weight is read.
    """
    return evaluating(owner(layer)) if is_parametrized(owner(layer)) else nullcontext()


_MAKERS = (BasePruningMethod, WeightNorm, SpectralNorm)
"""Hooks that compute a tensor of a module before each call of it, and not when the tensor is read."""


def refresh(module: nn.Module, name: str | None = None) -> None:
    """Recompute a tensor that a hook makes from parameters, which may have changed since, for example by loading.

    Args:
        module: the one that has the tensor.
        name: of the tensor; None: all that hooks make.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _MAKERS) and name in (None, getattr(hook, "_tensor_name", getattr(hook, "name", None))):
            with evaluating(module):
                hook(module, ())


def parametrized_once(modules: Iterable[nn.Module], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function while everything that is parametrized in the modules is computed once, beforehand.

    Otherwise each use would compute it again, and a mode that the call opens would mistake the products of that
    computation for products of the modules. (This is not a context manager because compilers, on some versions of
    Python, cannot return from inside two of them.)
    """
    parametrized: list[Any] = [module for module in modules if is_parametrized(module)]
    if not parametrized:
        return call(*args, **kwargs)
    with cached():
        for module in parametrized:
            for name in module.parametrizations:
                getattr(module, name)
        return call(*args, **kwargs)


class QuantLayer(nn.Module):
    """A layer that multiplies its quantized input by a quantized weight; its bias is unchanged."""

    qat_operands: ClassVar[tuple[str, ...]] = WEIGHT_AND_INPUT
    """names of what is multiplied"""
    qat_kind_name: str | None = None
    """the name that policies use for its kind, if its class does not determine it"""
    weight: Any
    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    def qat_scalar_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of the weight's clipping scalars by granularity: [K, 1, ...], [1, K, ...], or [] for one.

        If there is a single channel, in another dimension than 0, the shape is []: [1, 1, ...] would not show which
        dimension has the channels.
        """
        with reading_weight(self):
            channels, sizes = _channel_dim(self), self.weight.shape
        single = channels > 0 and sizes[channels] == 1
        channel = () if single else tuple(n if d == channels else 1 for d, n in enumerate(sizes))
        return {"tensor": (), "channel": channel}

    def qat_used_weight(self) -> Tensor:
        """Return the weight as it is multiplied and quantized."""
        refresh(self, "weight")
        weight: Tensor = self.weight
        return weight

    def qat_added(self) -> Sequence[str]:
        return [f"{name}_quantizer" for name in self.qat_operands]

    def qat_stored_weight(self) -> nn.Parameter:
        """Return the parameter that the weight is or is made from."""
        return stored(self, "weight")

    def qat_stored_part(self) -> int:
        """Return which part of that parameter the weight is, if several layers share the parameter."""
        return 0

    def qat_used_parameter(self) -> nn.Parameter | None:
        """Return the weight if it is the same parameter in each call; None: it is recomputed for each call."""
        return self._parameters.get("weight")

    def qat_multiply(self, input: Tensor, weight: Tensor, compute: Compute) -> Tensor:
        """Compute a product of an input and a weight, with both quantized."""
        x, w = self.input_quantizer(input), self.weight_quantizer(weight)
        with recomputing((x, input, self.input_quantizer), (w, weight, self.weight_quantizer)):
            # A view, not the weight itself: a module around this layer might take the call for one that bypasses it.
            return compute(x, w.view_as(w) if w is weight else w)


def _channel_dim(layer: QuantLayer) -> int:
    """Return the dimension of the weight that runs over output channels.

    In a transposed convolution these are the output channels of one group. For a transposed depthwise convolution it is
    the dimension of the inputs, each of which has its own output.
    """
    kind, groups = layer_kind(layer), getattr(layer, "groups", 1)
    depthwise = groups > 1 and groups == getattr(layer, "in_channels", None)
    return 0 if kind is None or (depthwise and layer.weight.shape[kind.channels] == 1) else kind.channels


class QuantLinear(QuantLayer, Swapped, nn.Linear):
    """nn.Linear of a quantized input [..., C] with a quantized weight [K, C]; bias unchanged."""

    qat_full = nn.Linear
    qat_for_others = True
    """Whether the module around it may use its weight directly; the layer then computes what that module asks for."""

    @property
    def qat_rotation(self) -> nn.Module | None:
        """The module that rotates both factors before they are quantized, if any; their product stays the same."""
        return self._modules.get(ROTATION)

    def qat_rotate_by(self, rotation: nn.Module) -> None:
        """Rotate both factors, by an orthogonal map of their last dimension, before they are quantized."""
        self._modules[ROTATION] = rotation

    def qat_added(self) -> Sequence[str]:
        return [*super().qat_added(), *([ROTATION] if self.qat_rotation is not None else [])]

    def qat_used_weight(self) -> Tensor:
        return self._qat_rotated(super().qat_used_weight())

    def qat_used_parameter(self) -> nn.Parameter | None:
        return super().qat_used_parameter() if self.qat_rotation is None else None

    def qat_multiply(self, input: Tensor, weight: Tensor, compute: Compute) -> Tensor:
        return super().qat_multiply(self._qat_rotated(input), self._qat_rotated(weight), compute)

    def _qat_rotated(self, x: Tensor) -> Tensor:
        rotated: Tensor = x if self.qat_rotation is None else self.qat_rotation(x)
        return rotated

    def forward(self, input: Tensor, compute: Compute | None = None) -> Tensor:
        """As nn.Linear; or what `compute` makes of the quantized input and weight of this layer."""
        return self.qat_multiply(input, self.weight, compute or self._qat_product)

    def _qat_product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class QuantConv(QuantLayer, Swapped):
    """nn.Conv1d, 2d or 3d of a quantized input [N, C, ...] with a quantized weight [K, C / groups, ...]."""

    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self.qat_multiply(input, self.weight, self._qat_product)

    def _qat_product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


class QuantConv1d(QuantConv, nn.Conv1d):
    """nn.Conv1d of a quantized input [N, C, L] with a quantized weight [K, C / groups, R]; bias unchanged."""

    qat_full = nn.Conv1d


class QuantConv2d(QuantConv, nn.Conv2d):
    """nn.Conv2d of a quantized input [N, C, H, W] with a quantized weight [K, C / groups, R, S]; bias unchanged."""

    qat_full = nn.Conv2d


class QuantConv3d(QuantConv, nn.Conv3d):
    """nn.Conv3d of a quantized input [N, C, D, H, W] with a quantized weight [K, C / groups, Q, R, S]."""

    qat_full = nn.Conv3d


class Saving(NamedTuple):
    """How tensors are saved for the backward pass."""

    wanted: bool
    """whether they are saved"""
    by: Any
    """the hook that packs them, if any"""
    known: bool = True
    """whether `by` is known; it is not while compiling"""

    @classmethod
    def now(cls) -> Self:
        """Return how they are saved now."""
        if torch.compiler.is_compiling():
            return cls(torch.is_grad_enabled(), None, False)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return cls(torch.is_grad_enabled(), None if hooks is None else hooks[0])


class InForward(TorchFunctionMode):
    """A mode that is open while a module runs its own forward, to take calls of torch functions over.

    Args:
        module: the one that runs.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.saving = Saving.now()

    def check_not_in_checkpoint(self) -> None:
        """Raise an error if a call would be taken over inside a checkpoint that the forward itself has begun.

        The backward pass would recompute the call without the module around it, hence without this mode.

        Raises:
            RuntimeError: the call is inside such a checkpoint.
        """
        if torch.compiler.is_compiling() or not self.saving.wanted:  # compilers handle recomputation themselves
            return
        before, now = self.saving, Saving.now()
        if now.wanted:
            other = before.known and now.by is not before.by
            inside = other and getattr(now.by, "__module__", None) == "torch.utils.checkpoint"
        else:
            inside = _in_reentrant_checkpoint()
        if inside:
            raise RuntimeError(
                f"{full_precision_name(self.module)} checkpoints a part of its own forward, which the backward pass "
                f"would recompute in full precision: checkpoint the module as a whole"
            )


def _in_reentrant_checkpoint() -> bool:
    """Whether the forward of an autograd function (of any library) is running that reruns code in its backward."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "forward" and hasattr(frame.f_locals.get("ctx"), "run_function"):
            return True
    return False


def in_own_function() -> bool:
    """Whether a module is running an autograd function of its own, which has saved what its backward multiplies by.

    A function that reruns other code in its backward, as checkpoints do, saves nothing of the kind and does not count.
    """
    codes = {getattr(function.forward, "__code__", None) for function in _kinds_of(torch.autograd.Function)}
    frame = sys._getframe().f_back
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        if frame.f_code in codes:
            return not _in_reentrant_checkpoint()
        frame = frame.f_back
    return False


def _kinds_of(base: type[Any]) -> Iterator[type[Any]]:
    """Yield all direct and indirect subclasses of a class."""
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds_of(kind)


class Taking(InForward):
    """A mode that passes calls of torch functions to `take`, which may take them over.

    Args:
        module: whose forward runs.
        take: called with the function, its positional and its named arguments; if it returns NotImplemented, the call
            is executed as it is.
    """

    def __init__(self, module: nn.Module, take: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]) -> None:
        super().__init__(module)
        self.take = take

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self.take(func, args, kwargs)
        if out is NotImplemented:
            return func(*args, **kwargs)
        self.check_not_in_checkpoint()
        return out


class TakenLayer(QuantLayer, Swapped):
    """A layer with a forward of its own, in which the one call that multiplies gets quantized factors.

    Each call in its forward is checked for being the function by which layers of its kind multiply.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return parametrized_once([self], self._qat_taken, *args, **kwargs)

    def qat_used_weight(self) -> Tensor:
        if self.qat_full in kinds():
            return super().qat_used_weight()
        return weight_used(self, self.qat_full)

    @torch.no_grad()
    def qat_used_parameter(self) -> nn.Parameter | None:
        parameter = super().qat_used_parameter()
        if parameter is None:
            return None
        before = version_key(parameter)
        return parameter if parameter is self.qat_used_weight() and before == version_key(parameter) else None

    def _qat_taken(self, *args: Any, **kwargs: Any) -> Any:
        """Run its own forward, and take over the call that multiplies."""
        with Taking(self, self._qat_quantized):
            return super().forward(*args, **kwargs)

    def _qat_quantized(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        call = own_call(self.qat_full, func, args, kwargs)
        return NotImplemented if call is None else self.qat_multiply(*call[:3])


class _Used(Exception):  # noqa: N818  # a result, not an error
    """Ends a forward pass that was run to find a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight


def weight_used(layer: nn.Module, full: type[nn.Module]) -> Tensor:
    """Return the weight by which a layer multiplies an input of the smallest size, in its own forward.

    Args:
        layer: quantized or not.
        full: its class before quantization.

    Raises:
        RuntimeError: it multiplies by no weight. Any other error of its forward with such an input is passed on.
    """

    def only_the_weight(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        call = own_call(full, func, args, kwargs)
        if call is not None:
            raise _Used(call.right)
        return NotImplemented

    def run() -> None:
        refresh(layer, "weight")
        with Taking(layer, only_the_weight):
            full.forward(layer, _smallest_input(layer))

    try:
        parametrized_once([layer], run)
    except _Used as used:
        return used.weight
    raise RuntimeError(f"{full_precision_name(layer)} does not multiply by a weight")


def _smallest_input(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    if isinstance(layer, nn.Embedding):
        return torch.zeros(1, dtype=torch.int64, device=weight.device)
    if isinstance(layer, nn.modules.conv._ConvNd):
        return weight.new_zeros(1, layer.in_channels, *layer.kernel_size)
    kind = layer_kind(layer)
    return weight.new_zeros(1, weight.shape[1 if kind is None else 1 - kind.channels])


def own_call(full: type[nn.Module], func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """Return a call, taken apart, if layers of a class multiply by it: the input, and the weight in its own shape."""
    kind = layer_kind(full)
    call = parse_call(func, args, kwargs) if is_own(full, func) else None
    return call if call is None or kind is None or func is kind.function else _of_the_transpose(call)


def is_own(full: type[nn.Module], func: Any) -> bool:
    """Whether a function is one by which layers of a class multiply."""
    kind = layer_kind(full)
    return kind is not None and (func is kind.function or (kind.function is F.linear and func in PLAIN))


def weight_shape(full: type[nn.Module], func: Any, factor: torch.Size) -> torch.Size:
    """Return the shape of a layer's weight, given that of the second factor of a function for which `is_own` holds."""
    kind = layer_kind(full)
    return factor if kind is None or func is kind.function else torch.Size(reversed(factor))


PLAIN = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
"""Products [..., C] [C, K], which a linear layer calls with the transpose of its weight."""


def _of_the_transpose(call: Call) -> Call:
    return Call(call.left, call.right.mT, lambda x, weight: call.compute(x, weight.mT), (-1, -1))


class QuantEmbedding(TakenLayer):
    """nn.Embedding with a quantized weight [V, C]."""

    qat_operands = ("weight",)

    def qat_multiply(self, input: Tensor, weight: Tensor, compute: Compute) -> Tensor:
        """Look up rows of the quantized weight."""
        return compute(input, self.weight_quantizer(weight))


class QuantMatmul(nn.Module):
    """The matrix product of two quantized tensors, [..., L, C] and [..., C, K] -> [..., L, K].

    Args:
        operands: names of the two; their quantizers are submodules named `NAME_quantizer`.
    """

    def __init__(self, operands: tuple[str, str]) -> None:
        super().__init__()
        self.operands = operands
        for name in operands:
            self.add_module(f"{name}_quantizer", nn.Identity())

    def forward(
        self,
        left: Tensor,
        right: Tensor,
        compute: Compute = torch.matmul,
        summed: tuple[int, int] | None = (-1, -2),
    ) -> Tensor:
        """Return that product, or what `compute` makes of the two quantized tensors; `summed` is as in `Call`."""
        by = [self.get_submodule(f"{name}_quantizer") for name in self.operands]
        dims = [token_dim(quantizer, dim) for quantizer, dim in zip(by, summed or (None, None), strict=True)]
        left, right = (moved(x, dim, -1) for x, dim in zip((left, right), dims, strict=True))
        a, b = by[0](left), by[1](right)
        with recomputing((a, left, by[0]), (b, right, by[1])):
            return compute(moved(a, -1, dims[0]), moved(b, -1, dims[1]))


WRITTEN: dict[type[nn.Module], type[Swapped]] = {
    quantized.qat_full: quantized for quantized in (QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear)
}
"""Full-precision class -> quantized class, for classes whose forward is known."""


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module] | None], Any] = {}
"""Cache of `quantized_class`: one class each, so that modules of one class stay modules of one class."""


def quantized_class(full: type[nn.Module], base: type[nn.Module] | None = None) -> Any:
    """Return the class that a module of a class gets when it is quantized.

    Args:
        full: the class of the module.
        base: a subclass of Swapped that is mixed in before it; None: for a layer of one of KINDS, the one that fits.
    """
    if base is None and full in WRITTEN:
        return WRITTEN[full]
    if (full, base) not in _CLASSES:
        about: dict[str, Any] = {"qat_full": full, "qat_base": base}
        if _is_of_parametrized(full):
            # When PyTorch removes a parametrization, it deletes the property from the class that the module has then,
            # and gives the module the first base of that class.
            bases: tuple[Any, ...] = (quantized_class(full.__bases__[0], base),)
            about |= {name: value for name, value in vars(full).items() if name not in _OF_EVERY_CLASS}
        else:
            bases = (base or _written(full) or (QuantEmbedding if issubclass(full, nn.Embedding) else TakenLayer), full)
        _CLASSES[full, base] = type(f"Quant{full.__name__}", bases, {**about, "__doc__": bases[0].__doc__})
    return _CLASSES[full, base]


_OF_EVERY_CLASS = ("__dict__", "__weakref__", "__module__", "__doc__")


def _is_of_parametrized(full: type[nn.Module]) -> bool:
    """Whether PyTorch made a class for a module with parametrizations, out of the class that the module had."""
    return getattr(vars(full).get("__getstate__"), "__module__", None) == "torch.nn.utils.parametrize"


def _written(full: type[nn.Module]) -> type[nn.Module] | None:
    """Return the quantized class that computes what layers of a class compute; None if they override the forward."""
    for base, quantized in WRITTEN.items():
        own = [name for name in ("forward", "_conv_forward") if getattr(full, name, 0) is not getattr(base, name, 0)]
        if issubclass(full, base) and not own:
            return quantized
    return None


def is_plain(full: type[nn.Module]) -> bool:
    """Whether it is known what layers of a class compute, without running them."""
    return full in kinds() or _written(full) is not None


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of this file's layers, or of a class that a wrapper has made from one."""
    return isinstance(module, QuantLayer | QuantMatmul)


def kind_of(layer: nn.Module) -> str:
    """Return the kind of a layer, quantized or not: Conv2d, Linear, Matmul, ..."""
    if isinstance(layer, QuantLayer) and layer.qat_kind_name is not None:
        return layer.qat_kind_name
    kind = layer_kind(layer)
    return "Matmul" if kind is None else kind.name


def narrow_kind(layer: nn.Module) -> str:
    """Return the kind as policies distinguish it: `kind_of`, or DepthwiseConv2d if each channel has its own filter."""
    depthwise = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.in_channels > 1
    return f"{DEPTHWISE if depthwise else ''}{kind_of(layer)}"


def operands(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of what a layer multiplies, quantized or not."""
    if isinstance(layer, QuantMatmul):
        return layer.operands
    if isinstance(layer, QuantLayer):
        return layer.qat_operands
    return QuantEmbedding.qat_operands if isinstance(layer, nn.Embedding) else WEIGHT_AND_INPUT


def quantizer_of(layer: nn.Module, operand: str) -> nn.Module:
    """Return the quantizer of an operand of a quantized layer, or an identity."""
    return layer.get_submodule(f"{operand}_quantizer")


def is_per_token(quantizer: nn.Module) -> bool:
    """Whether a quantizer has one scalar per token; false for an identity."""
    return isinstance(quantizer, Quantizer) and quantizer.per_token


def token_dim(quantizer: nn.Module, summed: int | None) -> int:
    """Return the dimension of an operand that holds the values of a token: the one that its products sum over.

    Args:
        quantizer: of the operand. If it has no scalars per token, the dimension does not matter and is -1.
        summed: that dimension; None: it is several, or not known.

    Raises:
        ValueError: the quantizer has one scalar per token, and the dimension is not known.
    """
    if not is_per_token(quantizer):
        return -1
    if summed is None:
        raise ValueError(f"{quantizer.name}: granularity=token needs products that sum over one of its dimensions")
    return summed


def moved(x: Tensor, source: int, destination: int) -> Tensor:
    """Return a tensor with a dimension moved to another place; the tensor itself if the dimension stays."""
    return x if source == destination else x.movedim(source, destination)


def elements_of(layer: nn.Module, operand: str) -> int | None:
    """Return the number of elements of an operand of a quantized layer.

    For the weight it is that of the whole tensor, for others that of one sample; None if none was seen yet.
    """
    if operand == "weight":
        with reading_weight(layer):
            weight: Any = layer.weight
            return int(weight.numel())
    seen: dict[str, int] = getattr(layer, ELEMENTS, {})
    return seen.get(operand)


def was_seen(layer: nn.Module) -> bool:
    """Whether a quantized layer was traced."""
    return ELEMENTS in vars(layer)


def convert(layer: nn.Module) -> None:
    """Turn a layer of one of KINDS into its quantized class, in place, without quantizers yet."""
    layer.__class__ = quantized_class(type(layer))
    give_quantizers(layer, dict.fromkeys(operands(layer)))


def give_quantizers(layer: nn.Module, quantizers: Mapping[str, nn.Module | None]) -> None:
    """Add quantizers for the operands of a quantized layer; None for full precision."""
    for name, quantizer in quantizers.items():
        layer.add_module(f"{name}_quantizer", quantizer if quantizer is not None else nn.Identity())
    layer.train(layer.training)


def full_precision_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before its class was swapped.

    Raises:
        ValueError: something else has changed its class since, as fully_shard and parametrizations do.
    """
    full: type[nn.Module] | None = vars(type(layer)).get("qat_full")
    if full is None:
        raise ValueError(f"the class of a quantized layer was changed to {type(layer).__name__}: undo that first")
    return full


def full_precision_name(module: nn.Module) -> str:
    """Return the name of the class that a module has, or had before its class was swapped."""
    return str(getattr(module, "qat_full", type(module)).__name__)


def restore(module: nn.Module) -> None:
    """Give a module the class back that it had before, in place; raises the errors of `full_precision_class`."""
    assert isinstance(module, Swapped)
    added: Sequence[str] = module.qat_added()
    module.__class__ = full_precision_class(module)  # type: ignore[assignment]
    for name in added:
        delattr(module, name)


def each(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the wanted modules, in order of registration, each once, under its first name."""
    return [(name, module) for name, module in model.named_modules() if wanted(module)]


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules, under each of their names."""
    return dict(model.named_modules(remove_duplicate=False))
