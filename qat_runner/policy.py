"""Policies: rules that set bit-width, format, clipping, gradient and granularity of every tensor (Appendix E.2).

A policy is a list of rules. Each rule selects tensors by globs and sets some of their settings; a later rule overrides
an earlier one. So the first rule usually holds in general, and the others are exceptions:

    - {match: "*", bits: 4, clipping: octav}
    - {match: "*.weight", bits: 3}
    - {match: first, bits: 8}
    - {match: layer4.*, clipping: {name: percentile, q: 99.9}}
    - {match: fc, bits: 32}

`match` is a glob over names of layers (`layer4.*`) and of their operands (`*.weight`, `layer1.0.conv1.input`; in
attention `*.query`, `*.key`, `*.probabilities`, `*.value`), where * matches any characters, including dots. `first` is
the first convolution in the forward pass, `last` the last linear layer, and `first.input` is an operand of the first
convolution, independent of the names of modules; a module that is itself named first is written `[f]irst`. `type` is a
glob over the kind of layer: Conv1d, Conv2d, Conv3d, ConvTranspose1d to 3d, Linear, Experts, Matmul; and Embedding,
whose weight is quantized only if a rule selects it by its type. A convolution with a separate filter for each channel
matches two kinds, DepthwiseConv2d and Conv2d.
"""

from __future__ import annotations  # configs build policies, and must not import PyTorch for that

import glob
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

from qat_runner.quant import (
    BITS,
    EVAL_MODES,
    FORMATS,
    GRADIENTS,
    METHODS,
    ClippingMethod,
    Estimator,
    Octav,
    Range,
    clipping_method,
    gradient_estimator,
)
from qat_runner.wording import meant, one_of

if TYPE_CHECKING:
    from qat_runner.quant import Quantizer

T = TypeVar("T")

FULL_PRECISION = 32
"""The bit-width that means that a tensor is not quantized."""

GRADIENT_PAIRS = {"mph": ("mad", "pwl")}
"""Name -> (estimator of weights, estimator of activations); mph is the paper's hybrid."""

GRANULARITIES = ("channel", "tensor")
"""Granularities of weights."""

ACTIVATION_GRANULARITIES = ("tensor", "token")
"""Granularities of activations."""

ROTATIONS = ("none", "hadamard")
"""Rotations of both factors of a linear layer before they are quantized, see `insertion.rotation`."""

FREEZING = ("averaged", "calibrated", "running")
"""Rules by which clipping scalars are made static, see `freeze`."""

PRICES = ("gradient", "noise", "measured")
"""How tensors are priced at a bit-width, see `allocation.prices`."""

EMBEDDING = "Embedding"
"""The kind of layer that is quantized only if a rule selects it by its type."""

EXPERTS = "Experts"
"""The kind of layer that holds many linear layers, one per expert, in a single weight parameter."""

DEPTHWISE = "Depthwise"
"""Prefix to the kind of a convolution with as many groups as input channels, where the distinction matters."""

WEIGHT_AND_INPUT = ("weight", "input")
"""The operands of a layer that has a weight."""

TOKENS = {"Linear": ("input",), EXPERTS: ("input",), "Matmul": ("query", "key", "probabilities")}
"""Kind of layer -> operands that may have one scalar per token, because their products are summed within a token."""

POOLING = "octav and max"
"""The built-in clipping methods that can solve for a tensor that is spread over several processes."""

FIRST_AND_LAST = ("first", "last")
"""The names of the first convolution and the last linear layer in `match`."""


Place = tuple[str, str, str, Collection[str]]
"""Name and kind of a layer, one of its operands, and whether the layer is the first or the last one: the arguments of
`Rule.matches`."""


def exactly(name: str) -> str:
    """Return the glob that matches exactly one name, even if a module is named `first` or `last`."""
    escaped = glob.escape(name)
    return f"[{escaped[0]}]{escaped[1:]}" if name.partition(".")[0] in FIRST_AND_LAST else escaped


def gradient_names() -> list[str]:
    """Return the allowed values of `gradient`: names of estimators and of pairs of estimators."""
    return [*GRADIENTS, *GRADIENT_PAIRS]


def estimator_of(name: str, **options: Any) -> str | Estimator:
    """Return the estimator with a name and options, or just the name if there are no options.

    Raises:
        ValueError: the gradient does not exist, or an option is out of range.
        TypeError: an option does not exist, or a plugin is not an estimator.
    """
    _check_name("gradient", name, gradient_names())
    if name in GRADIENT_PAIRS:
        for option in options:
            raise TypeError(f"gradient {name!r} is a pair of estimators and has no option {option!r}")
        return name
    estimator = gradient_estimator(name, **options)
    return estimator if options else name


class PolicyError(ValueError):
    """A policy does not fit a network."""


@dataclass(frozen=True)
class TensorPolicy:
    """The quantization settings of one tensor."""

    bits: int = 4
    """bit-width, 2 to 16, or 32 for full precision"""
    format: str = "int"
    """number format, a name in FORMATS"""
    range: str = "twos_complement"
    """codes of plain integers: twos_complement, full or oriented"""
    clipping: ClippingMethod = field(default_factory=Octav)
    """how clipping scalars are found"""
    gradient: str | Estimator = "mph"
    """gradient estimator: a name in GRADIENTS, or mph (mad for weights, pwl for activations), or an estimator with
    options; learned methods have their own"""
    granularity: str = "tensor"
    """granularity of clipping scalars. Weights: one per output channel ("channel"), or one in all ("tensor"), which
    means one per expert for experts; pact always has one in all. Activations: one per token ("token"), always dynamic,
    or one in all ("tensor")"""
    dynamic: bool = True
    """whether to solve for scalars on each call; otherwise they are static and must be calibrated"""
    eval_mode: str = "dynamic"
    """scalars of activations in eval(): dynamic, running or last; those of weights are always solved"""
    synchronize: bool = False
    """whether to solve for scalars of activations in training on the batch of all processes together"""
    rotation: str = "none"
    """rotation of linear layers, which is the same for weight and input: none or hadamard"""

    @property
    def full_precision(self) -> bool:
        """Whether the tensor is not quantized."""
        return self.bits == FULL_PRECISION

    def quantizer(self, operand: str, shapes: Mapping[str, Sequence[int]]) -> Quantizer | None:
        """Create the quantizer of an operand of a layer; None for full precision.

        Args:
            operand: "weight", "input", ...
            shapes: granularity -> shape of the clipping scalars of the layer's weight, if it has one.

        Raises:
            ValueError: the clipping method does not work with the format, or the format does not have the range.
        """
        if self.full_precision:
            return None
        weight = operand == "weight"
        pair = None if isinstance(self.gradient, Estimator) else GRADIENT_PAIRS.get(self.gradient)
        gradient = self.gradient if pair is None else pair[0 if weight else 1]
        format = FORMATS[self.format](self.bits).with_range(Range(self.range))
        if self.granularity == "token":
            if not self.dynamic or self.eval_mode != "dynamic":
                raise ValueError("granularity=token: requires dynamic=true and eval_mode=dynamic")
            return self.clipping.token_quantizer(format, gradient=gradient, sign_known=False)
        return self.clipping.quantizer(
            format,
            weight=weight,
            shape=shapes[self.granularity] if weight else (),
            gradient=gradient,
            sign_known=weight,
            dynamic=self.dynamic,
            eval_mode="dynamic" if weight else self.eval_mode,
            synchronize=self.synchronize and not weight,
        )


SETTINGS = tuple(f.name for f in fields(TensorPolicy))
"""The settings that a rule may set."""


@dataclass(frozen=True)
class Rule:
    """Settings of the tensors that a rule matches; None leaves a setting as earlier rules have it.

    Raises:
        ValueError: a setting is out of range; the message gives the rule, the setting and what is allowed.
    """

    match: str = "*"
    """a glob over names of layers (`layer4.*`) or of their operands (`*.weight`), or `first` or `last`: see the
    docstring of the module"""
    type: str = "*"
    """a glob over kinds of layers"""
    bits: int | None = None
    format: str | None = None
    range: str | None = None
    clipping: ClippingMethod | None = None
    gradient: str | Estimator | None = None
    granularity: str | None = None
    dynamic: bool | None = None
    eval_mode: str | None = None
    synchronize: bool | None = None
    rotation: str | None = None

    def __post_init__(self) -> None:
        for name in ("match", "type"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"rule {self.match!r}: {name}={getattr(self, name)!r}: must be a glob")
        if self.bits is not None:
            _check_bits(f"{self._place}bits", self.bits)
        names: dict[str, Collection[str]] = {
            "format": FORMATS,
            "range": tuple(Range),
            "gradient": gradient_names(),
            "granularity": (*GRANULARITIES, "token"),
            "eval_mode": EVAL_MODES,
            "rotation": ROTATIONS,
        }
        for name, allowed in names.items():
            if (value := getattr(self, name)) is not None and not isinstance(value, Estimator):
                _check_name(self._place + name, value, allowed)
        for name in ("dynamic", "synchronize"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"{self._place}{name}={getattr(self, name)!r}: must be true or false")
        if not isinstance(self.clipping, ClippingMethod | None):
            raise ValueError(f"{self._place}clipping={self.clipping!r}: must be a clipping method")

    @property
    def everything(self) -> bool:
        """Whether the rule matches all tensors."""
        return self.match == self.type == "*"

    @property
    def _place(self) -> str:
        return "" if self.match == "*" else f"rule {self.match!r}: "

    @property
    def end(self) -> bool:
        """Whether the rule selects the first or the last layer."""
        return self.match.partition(".")[0] in FIRST_AND_LAST

    @property
    def usual(self) -> bool:
        """Whether the rule selects the same tensors as some rule of `Policy.of`. A network need not have such
        tensors."""
        return (self.match, self.type) in _usual_places()

    @property
    def without_effect(self) -> bool:
        """Whether the rule changes nothing. Without settings, it can still switch on quantization of embeddings."""
        return not self.settings() and not self.names_kind(EMBEDDING)

    def settings(self) -> dict[str, Any]:
        """Return the settings that the rule sets."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}

    def matches(self, layer: str, kind: str, operand: str, ends: Collection[str] = ()) -> bool:
        """Return whether the rule matches an operand of a layer.

        Args:
            layer: name of the layer in the model.
            kind: kind of the layer: Conv2d, DepthwiseConv2d (which is also a Conv2d), Linear, Matmul, ...
            operand: "weight", "input", ...
            ends: whether the layer is the first or the last one.
        """
        if not any(fnmatchcase(name, self.type) for name in (kind, kind.removeprefix(DEPTHWISE))):
            return False
        if self.end:
            end, _, of_operand = self.match.partition(".")
            return end in ends and fnmatchcase(operand, of_operand or "*")
        return fnmatchcase(layer, self.match) or fnmatchcase(f"{layer}.{operand}", self.match)

    def names_kind(self, kind: str) -> bool:
        """Return whether the rule selects layers of a kind by its `type`."""
        return self.type != "*" and fnmatchcase(kind, self.type)

    def as_dict(self) -> dict[str, Any]:
        """Convert the rule to plain values, as in a YAML file."""
        found: dict[str, Any] = {"match": self.match}
        if self.type != "*":
            found["type"] = self.type
        found |= self.settings()
        if self.range is not None:
            found["range"] = str(self.range)  # instead of an enum
        if self.clipping is not None:
            found["clipping"] = {"name": self.clipping.name, **self.clipping.options}
        if isinstance(self.gradient, Estimator):
            found["gradient"] = {"name": self.gradient.name, **self.gradient.options}
        return found

    @classmethod
    def from_dict(cls, content: object) -> Rule:
        """Create a rule from plain values.

        Raises:
            ValueError: the values are not a valid rule; the message is one sentence.
        """
        known = tuple(f.name for f in fields(cls))
        if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
            raise ValueError(f"rule {content!r}: must be a mapping of {', '.join(known)}")
        said = dict(content)
        name = said.get("match", "*")
        if unknown := [key for key in said if key not in known]:
            raise ValueError(f"rule {name!r}: unknown setting {unknown[0]!r}, {one_of(unknown[0], known)}")
        if "match" not in said:
            raise ValueError(f"rule {said!r}: needs match, a glob over names of layers or operands")
        if said.get("clipping") is not None:
            said["clipping"] = _made(clipping_method, name, "clipping", said["clipping"])
        if said.get("gradient") is not None:
            said["gradient"] = _made(estimator_of, name, "gradient", said["gradient"])
        return cls(**said)


def _check_bits(place: str, bits: object) -> None:
    if type(bits) is not int or bits not in (*BITS, FULL_PRECISION):
        allowed = f"{BITS.start} to {BITS.stop - 1}, or {FULL_PRECISION} for full precision"
        raise ValueError(f"{place}={bits!r}: must be {allowed}")


def _check_name(place: str, value: object, allowed: Collection[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{place}={value!r}: {one_of(value, allowed)}")


def _check_arguments(of: Callable[..., Any], clipping: str | ClippingMethod, options: Iterable[str]) -> None:
    """Raise an error if further arguments of a function are not options of the clipping method.

    Raises:
        TypeError: one is not. The message suggests the closest argument or option.
    """
    named = isinstance(clipping, str)
    if named and clipping not in METHODS:
        return  # which another message says
    kind = METHODS[clipping] if isinstance(clipping, str) else type(clipping)
    known: list[str] = [option.name for option in fields(kind)] if is_dataclass(kind) else []
    for option in options:
        if option not in known:
            arguments = [*list(signature(of).parameters)[:-1], "example"]  # which only `quantize_model` has
            method = f"clipping {clipping!r}" if named else kind.__name__
            raise TypeError(
                f"{option}: is neither an argument nor an option of {method} ({', '.join(known) or 'which has none'})"
                f"{meant(option, [*arguments, *known])}"
            )
        if not named:
            raise TypeError(f"{option}: must be set in the clipping method that is passed")


def _made(make: Callable[..., T], rule: object, setting: str, said: object) -> T:
    """Create the clipping method or gradient estimator of a rule from its name, or from a mapping of name and
    options."""
    options = {"name": said} if isinstance(said, str) else said
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise ValueError(f"rule {rule!r}: {setting}={said!r}: must be a name, or a mapping of name and options")
    options = {str(key): value for key, value in options.items()}
    try:
        return make(options.pop("name"), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rule {rule!r}: {error}") from error


@dataclass(frozen=True)
class Policy:
    """The quantization settings of all tensors of a network. `Policy.of` creates the usual policy from a few arguments.

    Raises:
        ValueError: a rule is out of range.
    """

    rules: tuple[Rule, ...] = ()
    """later rules override earlier ones; settings that no rule sets have the defaults of `TensorPolicy`"""

    def __post_init__(self) -> None:
        general: dict[str, Any] = {}
        for rule in self.rules:
            if rule.everything:
                general |= rule.settings()
        usual = TensorPolicy(**general)
        if usual.synchronize and not (usual.clipping.pools or usual.clipping.learned):
            raise ValueError(
                f"clipping {usual.clipping.name!r} cannot be synchronized over processes, only {POOLING} can"
            )

    @classmethod
    def of(
        cls,
        bits: int = 4,
        clipping: str | ClippingMethod = "octav",
        gradient: str | Estimator = "mph",
        *,
        format: str = "int",
        weight_format: str | None = None,
        activation_format: str | None = None,
        range: str = "twos_complement",
        weight_range: str | None = None,
        activation_range: str | None = None,
        weight_bits: int | None = None,
        activation_bits: int | None = None,
        first_last_bits: int | None = 8,
        dynamic: bool = True,
        eval_mode: str = "dynamic",
        conv_granularity: str = "channel",
        linear_granularity: str = "tensor",
        activation_granularity: str = "tensor",
        quantize_head: bool = True,
        keep: Sequence[str] = (),
        synchronize: bool = False,
        rules: Sequence[Rule | Mapping[str, Any]] = (),
        **clipping_options: Any,
    ) -> Policy:
        """Create the usual policy: one bit-width for all tensors, and another one for the first and the last layer.

        Args:
            bits: bit-width of weights and activations, 2 to 16, or 32 for full precision.
            clipping: a clipping method or its name: octav, max, percentile, mse_sweep, lsq, pact, or a registered one.
            gradient: ste, pwl, mad, ewgs, trust, mph (mad for weights, pwl for activations) or a registered one; or an
                estimator with options. lsq and pact have their own.
            format: number format of weights and activations: int, int_affine, or a registered one.
            weight_format, activation_format: override `format`.
            range: codes of plain integers, of weights and activations: twos_complement, full or oriented.
            weight_range, activation_range: override `range`.
            weight_bits, activation_bits: override `bits`.
            first_last_bits: bit-width of the first convolution and the last linear layer, for weights and inputs if
                these are quantized in the other layers; None: no exception.
            dynamic: solve for the clipping scalars on each call; otherwise `calibrate` must be called before the first
                forward pass.
            eval_mode: scalars of activations in eval(): dynamic, running or last.
            conv_granularity, linear_granularity: "channel" (one scalar per output channel) or "tensor", for weights;
                experts are linear layers. pact always has one scalar per tensor, as published.
            activation_granularity: "tensor", or "token": one scalar per token of the operands in TOKENS, always
                dynamic; other activations, those of convolutions and values of attention, still have one per tensor.
            quantize_head: whether the last linear layer is quantized.
            keep: names of layers that are left in full precision.
            synchronize: solve for scalars of activations in training on the batch of all processes of
                torch.distributed together (dynamic octav and max); those of weights are the same in all processes.
            rules: exceptions, which override all other arguments; a mapping is converted by `Rule.from_dict`.
            **clipping_options: options of the clipping method if it is given by name: q=99.9, warm_iterations=None.

        Raises:
            ValueError: an argument is out of range; the message gives the argument and what is allowed.
            TypeError: there is no such argument, and no such option of the clipping method.
        """
        _check_arguments(cls.of, clipping, clipping_options)
        method = clipping_method(clipping, **clipping_options) if isinstance(clipping, str) else clipping
        width = {
            "weight_bits": bits if weight_bits is None else weight_bits,
            "activation_bits": bits if activation_bits is None else activation_bits,
        }
        for name, value in (width | {"first_last_bits": first_last_bits}).items():
            if value is not None:
                _check_bits(name, value)
        for name, granularity in (("conv_granularity", conv_granularity), ("linear_granularity", linear_granularity)):
            _check_name(name, granularity, GRANULARITIES)
        _check_name("activation_granularity", activation_granularity, ACTIVATION_GRANULARITIES)
        per_token = activation_granularity == "token"
        if per_token and (method.learned or not dynamic or eval_mode != "dynamic"):
            raise ValueError(
                "activation_granularity=token: its scalars are always dynamic, so clipping must be neither static nor "
                "learned, and eval_mode must be dynamic"
            )
        general = Rule(
            bits=width["activation_bits"],
            format=format if activation_format is None else activation_format,
            range=range if activation_range is None else activation_range,
            clipping=method,
            gradient=gradient,
            dynamic=dynamic,
            eval_mode=eval_mode,
            synchronize=synchronize,
        )
        return cls(
            (
                general,
                Rule(
                    "*.weight",
                    bits=width["weight_bits"],
                    format=format if weight_format is None else weight_format,
                    range=range if weight_range is None else weight_range,
                ),
                Rule("*.weight", "Conv*", granularity=conv_granularity),
                *(Rule("*.weight", kind, granularity=linear_granularity) for kind in ("Linear", EXPERTS)),
                *(_rules_of_tokens() if per_token else ()),
                *_rules_of_first_and_last(list(width.values()), first_last_bits),
                *(() if quantize_head else (Rule("last", "Linear", bits=FULL_PRECISION),)),
                *(Rule(exactly(name), bits=FULL_PRECISION) for name in keep),
                *(rule if isinstance(rule, Rule) else Rule.from_dict(rule) for rule in rules),
            )
        )

    @property
    def full_precision(self) -> bool:
        """Whether nothing is quantized in any network."""
        first = self.rules[0] if self.rules else Rule()
        return (
            first.everything
            and first.bits == FULL_PRECISION
            and {rule.bits for rule in self.rules} <= {FULL_PRECISION, None}
        )

    def names_kind(self, kind: str) -> bool:
        """Return whether some rule selects layers of a kind by its `type`."""
        return any(rule.names_kind(kind) for rule in self.rules)

    @property
    def has_static(self) -> bool:
        """Whether some tensors have static scalars, which are calibrated and then neither solved nor learned."""
        return not self.full_precision and any(
            rule.dynamic is False and not (rule.clipping is not None and rule.clipping.learned) for rule in self.rules
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether the scalars of some tensors must be calibrated on batches before the first use."""
        methods = [rule.clipping for rule in self.rules if rule.clipping is not None]
        return any(method.learned for method in methods) or any(rule.dynamic is False for rule in self.rules)

    def tensor(self, layer: str, kind: str, operand: str, ends: Collection[str] = ()) -> TensorPolicy:
        """Return the settings of an operand of a layer. The arguments are those of `Rule.matches`."""
        rules = [rule for rule in self.rules if rule.matches(layer, kind, operand, ends)]
        if kind == EMBEDDING and not any(rule.names_kind(kind) for rule in rules):
            return TensorPolicy(bits=FULL_PRECISION)
        settings: dict[str, Any] = {}
        for rule in rules:
            settings |= rule.settings()
        if settings.get("granularity") == "token" and operand not in TOKENS.get(kind, ()):
            of = "; ".join(f"{' and '.join(operands)} of {kind}" for kind, operands in TOKENS.items())
            raise PolicyError(
                f"{layer}.{operand}: granularity=token applies only to {of}, whose products are summed within a token"
            )
        return TensorPolicy(**settings)

    def resolved_for(self, places: Sequence[Place]) -> Policy:
        """Return this policy for one network: rules about the first or last layer are replaced by rules that name
        the layers, or dropped if they match none.

        Args:
            places: all operands of its layers.
        """
        rules: list[Rule] = []
        for rule in self.rules:
            if not rule.end:
                rules.append(rule)
                continue
            operand = rule.match.partition(".")[2]
            for layer in dict.fromkeys(place[0] for place in places if rule.matches(*place)):
                rules.append(replace(rule, match=f"{exactly(layer)}.{operand or '*'}"))
        return Policy(tuple(rules))

    def as_list(self) -> list[dict[str, Any]]:
        """Convert the rules to plain values, as in a YAML file."""
        return [rule.as_dict() for rule in self.rules]

    @classmethod
    def from_list(cls, content: object) -> Policy:
        """Create a policy from plain values: a list of mappings.

        Raises:
            ValueError: the values are not a valid policy; the message is one sentence.
        """
        if not isinstance(content, Sequence) or isinstance(content, str | bytes):
            raise ValueError(f"a policy must be a list of rules, not {type(content).__name__}")
        return cls(tuple(map(Rule.from_dict, content)))


def _rules_of_tokens() -> list[Rule]:
    """Return rules that set one scalar per token for all operands that can have it."""
    return [Rule(f"*.{name}", kind, granularity="token") for kind, operands in TOKENS.items() for name in operands]


@cache
def _usual_places() -> frozenset[tuple[str, str]]:
    """Return `match` and `type` of all rules that `Policy.of` can create from its arguments other than `keep` and
    `rules`."""
    widths = (4, 4), (FULL_PRECISION, 4), (4, FULL_PRECISION)
    policies = [
        Policy.of(weight_bits=w, activation_bits=a, activation_granularity="token", quantize_head=False)
        for w, a in widths
    ]
    return frozenset((rule.match, rule.type) for policy in policies for rule in policy.rules)


def _rules_of_first_and_last(widths: Sequence[int], bits: int | None) -> list[Rule]:
    """Return rules for the bit-width of the first and the last layer. Weights, or inputs, that are in full precision
    elsewhere stay so in these layers."""
    if bits is None:
        return []
    quantized = [f".{operand}" for operand, n in zip(WEIGHT_AND_INPUT, widths, strict=True) if n != FULL_PRECISION]
    return [
        Rule(f"{end}{operand}", bits=bits)
        for operand in (quantized if len(quantized) < 2 else [""])
        for end in FIRST_AND_LAST
    ]
