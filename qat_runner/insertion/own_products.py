"""Attention modules of any make: the two products in a module's own forward are replaced by quantized ones.

The module keeps its code. Its class is swapped for one that runs the same forward while a mode sees its calls of torch
functions, before PyTorch executes them. Matrix products are computed, one after another, by the submodules in PRODUCTS.
`F.scaled_dot_product_attention` is decomposed into both of them. A product with the weight of a linear layer inside,
which bypasses the forward of that layer, is computed by that layer.

PyTorch's own `nn.MultiheadAttention` has its projections in one parameter; here each of them is a layer.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.insertion.calls import ATTENTION, MATRICES, Compute, attention, parse_call
from qat_runner.insertion.layers import (
    InForward,
    QuantLayer,
    QuantMatmul,
    Swapped,
    Taking,
    belong,
    each,
    parametrized_once,
    quantized_class,
    refresh,
    restore,
    stored,
)
from qat_runner.quant import Quantizer

PRODUCTS = {"scores": ("query", "key"), "context": ("probabilities", "value")}
"""Submodule of an attention module -> names of its operands, in the order in which attention computes the products."""

PROJECTIONS = {"query_projection": "q", "key_projection": "k", "value_projection": "v"}
"""Submodule of `nn.MultiheadAttention` -> the letter in the names of its parameters."""


class ProductsOf(InForward):
    """A mode under which the matrix products that are called are those of an attention module, in their order.

    Args:
        module: with the products of PRODUCTS.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.left = [name for name in PRODUCTS if name in module._modules]
        self.layers: list[Any] = [layer for layer in module.children() if getattr(layer, "qat_for_others", False)]
        """linear layers inside; a call with the weight of one, the very same tensor, becomes a call of that layer"""
        self.projections: dict[nn.Module, Tensor] = {
            layer: layer.weight_of(module) for layer in self.layers if isinstance(layer, QuantProjection)
        }
        """the projections, which have no such tensor, each with one"""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _written_out(*args, **{**kwargs, **self._projections()})
        if func is ATTENTION and len(self.left) == len(PRODUCTS):
            return attention(self._next, self._next, *args, **kwargs)
        call = parse_call(func, args, kwargs)
        if call is not None and func in MATRICES and self.left:
            # Autocast keeps probabilities in float32 until the product, which converts them to the dtype of the values.
            return self._next(call.left.to(call.right.dtype), *call[1:])
        if call is not None and func is F.linear:
            for layer in self.layers:
                own = self.projections.get(layer)
                if call.right is (layer.weight if own is None else own):
                    self.check_not_in_checkpoint()
                    return layer(call.left, call.compute)
        return func(*args, **kwargs)

    def _next(self, *call: Any) -> Tensor:
        """Compute the next product from the fields of a `Call`; from two tensors alone, their matrix product."""
        self.check_not_in_checkpoint()
        product: Tensor = self.module.get_submodule(self.left.pop(0))(*call)
        return product

    def _projections(self) -> dict[str, Any]:
        """Return arguments that make `F.multi_head_attention_forward` use the weights of projections one by one."""
        if not self.projections:  # the weights are those of layers, or parameters that are not quantized
            return {}
        own = {f"{layer.letter}_proj_weight": weight for layer, weight in self.projections.items()}
        return {"use_separate_proj_weight": True, **own}


_written_out = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""`F.multi_head_attention_forward` without its override check: a mode sees the calls it consists of, not itself."""


class QuantAttention(Swapped):
    """An attention module whose own forward runs with quantized products."""

    qat_as_before = False
    """Whether it runs without them, as it did before."""

    def qat_added(self) -> Sequence[str]:
        return [name for name in (*PRODUCTS, *PROJECTIONS) if name in self._modules]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.qat_as_before:
            return super().forward(*args, **kwargs)
        return parametrized_once([self, *self.children()], self._qat_taken, *args, **kwargs)

    def _qat_taken(self, *args: Any, **kwargs: Any) -> Any:
        """Run its own forward, and take over its products."""
        with ProductsOf(self):
            return super().forward(*args, **kwargs)


class QuantProjection(QuantLayer):
    """A linear layer whose weight is a parameter of the `nn.MultiheadAttention` around it, or a third of one.

    Args:
        of: that module.
        letter: q, k or v.
    """

    qat_kind_name = "Linear"
    qat_for_others = True

    def __init__(self, of: nn.MultiheadAttention, letter: str) -> None:
        super().__init__()
        self._of, self.letter = (of,), letter  # in a tuple, so that it does not become a submodule
        self.weight_quantizer, self.input_quantizer = nn.Identity(), nn.Identity()

    @property
    def weight(self) -> Tensor:
        """[K, C]"""
        whole: Tensor = getattr(self._of[0], self._name)
        return whole.chunk(3)["qkv".index(self.letter)] if self._packed else whole

    def weight_of(self, module: nn.Module) -> Tensor:
        """Return the weight in the module that is running."""
        belong(self, module)
        return self.weight

    def qat_used_weight(self) -> Tensor:
        refresh(self._of[0], self._name)
        return self.weight

    @property
    def _packed(self) -> bool:
        return bool(self._of[0]._qkv_same_embed_dim)

    @property
    def _name(self) -> str:
        return "in_proj_weight" if self._packed else f"{self.letter}_proj_weight"

    def qat_stored_weight(self) -> nn.Parameter:
        return stored(self._of[0], self._name)

    def qat_stored_part(self) -> int:
        return "qkv".index(self.letter)

    def forward(self, input: Tensor, compute: Compute) -> Tensor:
        """Return what `compute` makes of the quantized input and weight of this layer."""
        return self.qat_multiply(input, self.weight, compute)


def attention_in(tensors: Collection[str], modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Return the attention modules to which names of quantized tensors belong.

    Args:
        tensors: such as "encoder.0.scores.query". Networks may use the same names for layers of their own, which have
            other operands.
        modules: of the network, by name.
    """
    named = [(*layer.rpartition(".")[::2], operand) for layer, _, operand in (t.rpartition(".") for t in tensors)]
    products = {name for name, kind, operand in named if operand in PRODUCTS.get(kind, ())}
    projections = {name for name, kind, _ in named if kind in PROJECTIONS}
    return [m for name, m in modules.items() if name in products or (name in projections and is_multihead(m))]


def _names(module: nn.Module) -> list[str]:
    """Return the names of the submodules that an attention module is given."""
    return [*PRODUCTS, *(PROJECTIONS if is_multihead(module) else ())]


def names_are_free(module: nn.Module) -> bool:
    """Whether an attention module has no attributes with the names of the submodules that it is to be given."""
    return not any(hasattr(module, name) for name in _names(module))


def is_multihead(module: nn.Module) -> bool:
    """Whether a module is PyTorch's own attention, or has the same forward."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def quantize_own_products(module: nn.Module) -> None:
    """Give an attention module its products, and PyTorch's own its projections, without quantizers, in place.

    `restore` undoes it.

    Args:
        module: whose own forward computes two matrix products or one `F.scaled_dot_product_attention`.

    Raises:
        ValueError: the module already has an attribute with the name of a product or projection.
    """
    if not names_are_free(module):
        names = " or ".join(name for name in _names(module) if hasattr(module, name))
        raise ValueError(
            f"{type(module).__name__} already uses {names} as an attribute name: it cannot be quantized as attention"
        )
    for name, operands in PRODUCTS.items():
        module.add_module(name, QuantMatmul(operands).train(module.training))
    if is_multihead(module):
        for name, letter in PROJECTIONS.items():
            module.add_module(name, QuantProjection(module, letter).train(module.training))  # type: ignore[arg-type]
    module.__class__ = quantized_class(type(module), QuantAttention)


def release_own_products(module: nn.Module) -> None:
    """Undo the conversion of whatever is not quantized in an attention module, once quantizers were added."""
    if not any(isinstance(inner, Quantizer) for name in PRODUCTS for inner in module.get_submodule(name).modules()):
        for name in PRODUCTS:
            delattr(module, name)
    if not any(isinstance(inner, Quantizer) for inner in module.modules()):
        restore(module)


class WithoutFastPath(Swapped):
    """PyTorch's encoder, or a layer of it, without its fast path, which in eval() reads weights past their layers.

    PyTorch does not take the fast path while a mode is open.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.training else Taking(self, _nothing):
            return super().forward(*args, **kwargs)


def _nothing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return NotImplemented


def has_fast_path(module: nn.Module) -> bool:
    """Whether a module is PyTorch's encoder, or a layer of it."""
    return isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer)


def keep_off_fast_path(module: nn.Module) -> None:
    """Swap the class of a module that has a fast path, in place; `restore` undoes it.

    A module whose class was swapped before opens a mode anyway, so it does not take the fast path.
    """
    if has_fast_path(module) and not isinstance(module, Swapped):
        module.__class__ = quantized_class(type(module), WithoutFastPath)


@contextmanager
def products_as_before(model: nn.Module) -> Iterator[None]:
    """Context manager under which modules of `quantize_own_products` compute as they did before it."""
    modules = [module for _, module in each(model, lambda m: isinstance(m, QuantAttention))]
    try:
        for module in modules:
            module.qat_as_before = True  # type: ignore[assignment]
        yield
    finally:
        for module in modules:
            del module.qat_as_before
