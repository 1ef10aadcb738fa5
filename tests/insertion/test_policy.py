"""Tests of rules: which tensors they match, how they override each other, files, and saved networks."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat_runner.insertion import (
    Policy,
    PolicyError,
    Rule,
    load,
    quantize_model,
    quantized_tensors,
    remove_quantizers,
    save,
    summary,
)
from qat_runner.insertion.insert import policy_of, wanted
from qat_runner.policy import exactly
from qat_runner.quant import LearnedQuantizer, Octav, Percentile


class Net(nn.Module):
    """A network of two blocks of two convolutions each, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.block2 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.hidden = nn.Linear(4 * 64, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.block1(self.stem(x).relu()).relu()).relu()
        out: torch.Tensor = self.head(self.hidden(x.flatten(1)).relu())
        return out


X = torch.randn(4, 3, 8, 8)


def bits(model: nn.Module) -> dict[str, int]:
    return {t.name: t.quantizer.format.bits for t in quantized_tensors(model)}


def test_depthwise_layers_are_of_two_kinds() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)
    )
    rules = (
        Rule("*", "Conv2d", bits=6),
        Rule("*.weight", "DepthwiseConv2d", bits=5),
        Rule("*.input", "Depthwise*", bits=3),
    )
    model = quantize_model(layers, 4, rules=rules, example=X)
    widths = {"0": (6, 6), "1": (5, 3), "2": (6, 6), "3": (6, 6)}
    assert bits(model) == {
        f"{n}.{t}": b for n, both in widths.items() for t, b in zip(("weight", "input"), both, strict=True)
    }
    assert [wanted(model, tensor).bits for tensor in quantized_tensors(model)][2:4] == [5, 3]


def test_later_rules_override_earlier_ones() -> None:
    rules = (
        Rule("block2.*", bits=3),
        Rule("block?.0.weight", bits=2, clipping=Percentile(99.0)),
        Rule("*", "Linear", bits=6),
        Rule("hidden.input", bits=32),
    )
    model = quantize_model(Net(), 4, rules=rules, example=X)
    assert bits(model) == {
        "stem.weight": 8,
        "stem.input": 8,
        "block1.0.weight": 2,
        "block1.0.input": 4,
        "block1.2.weight": 4,
        "block1.2.input": 4,
        "block2.0.weight": 2,
        "block2.0.input": 3,
        "block2.2.weight": 3,
        "block2.2.input": 3,
        "hidden.weight": 6,
        "head.weight": 6,
        "head.input": 6,
    }
    methods = {t.name: t.quantizer.method for t in quantized_tensors(model)}
    assert methods["block1.0.weight"] == Percentile(99.0) and methods["block1.0.input"] == Octav()
    model(X).sum().backward()


def test_ends_have_names_and_follow_the_order_of_calls() -> None:
    model = quantize_model(Net(), 4, first_last_bits=None, rules=(Rule("first.input", bits=6), Rule("last", bits=7)))
    changed = {name: n for name, n in bits(model).items() if n != 4}
    assert changed == {"stem.input": 6, "head.weight": 7, "head.input": 7}
    assert [rule.match for rule in policy_of(model).rules[-2:]] == ["stem.input", "head.*"]


class Ends(nn.Module):
    """A network with modules named "first" and "last" that are not its first and last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.last, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.last(self.first(self.stem(x))).mean((2, 3)))
        return out


def test_modules_that_are_called_as_ends_are(tmp_path: Path) -> None:
    widths = {"stem": 8, "first.0": 4, "last": 4, "fc": 8}

    def by_layer(**how: Any) -> dict[str, int]:
        model = quantize_model(Ends(), 4, example=X, **how)
        save(model, tmp_path / "net.pt")
        assert summary(load(tmp_path / "net.pt", Ends())) == summary(model)
        assert all(wanted(model, t).bits == t.quantizer.format.bits for t in quantized_tensors(model))
        return {t.layer: t.quantizer.format.bits for t in quantized_tensors(model)}

    assert by_layer() == widths
    for name in ("first.0", "last"):
        assert by_layer(keep=[name]) == {layer: n for layer, n in widths.items() if layer != name}
        assert by_layer(rules=[Rule(exactly(name), bits=3)]) == widths | {name: 3}
    assert by_layer(rules=[Rule("last", bits=3)]) == widths | {"fc": 3}
    with pytest.raises(PolicyError, match=r"'first.0' .*; to match a module named first, write \[f\]irst$"):
        quantize_model(Ends(), rules=[Rule("first.0", bits=3)], example=X)


def test_short_words_may_be_about_nothing() -> None:
    """Rules that `Policy.of` makes may match no kind or end in some networks, also after they were read from a file."""
    policy = Policy.of(4, activation_granularity="token", quantize_head=False, activation_bits=8)
    for network, x in ((nn.Sequential(nn.Conv2d(3, 4, 3)), X), (Products(), torch.randn(2, 5, 8))):
        once = quantize_model(network, Policy.from_list(policy.as_list()), example=x)
        assert quantized_tensors(once)
        its_own = policy_of(once)
        assert quantized_tensors(quantize_model(remove_quantizers(once), its_own, example=x))


class Products(nn.Module):
    """Attention only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT).softmax(-1) @ x


def test_methods_may_be_mixed() -> None:
    rules = [Rule("block1.*", clipping=Octav(warm_iterations=None), dynamic=False)]
    policy = Policy.of(4, "lsq", rules=rules)
    assert policy.needs_calibration
    model = quantize_model(Net(), policy, example=X)
    learned = {t.layer for t in quantized_tensors(model) if isinstance(t.quantizer, LearnedQuantizer)}
    assert learned == {"stem", "block2.0", "block2.2", "hidden", "head"}
    assert {t.quantizer.mode for t in quantized_tensors(model) if t.layer.startswith("block1")} == {"static"}
    assert all(wanted(model, t).clipping.learned == (t.layer in learned) for t in quantized_tensors(model))
    assert "learned" in summary(model) and "static" in summary(model)
    rows = {tuple(line.split()[:2]): line.split()[7:] for line in summary(model).splitlines()}
    assert rows["layer", "tensor"] == ["clipping", "gradient"]
    assert rows["stem", "weight"] == ["lsq", "own"]
    assert rows["block1.0", "weight"] == ["octav(warm_iterations=None)", "mad"]


def test_the_table_of_tensors_shows_only_what_differs_among_them() -> None:
    def heads(*rules: Rule, **how: str) -> list[str]:
        model = quantize_model(Net(), Policy.of(4, rules=rules, **how), example=X)
        return summary(model).splitlines()[0].split()[7:]

    assert heads() == heads(clipping="pact") == heads(Rule("*", gradient="ste")) == []  # mph and pact: two for two
    assert heads(Rule("block1.*.weight", gradient="ste")) == ["gradient"]
    assert heads(Rule("block1.*.input", eval_mode="running")) == ["eval_mode"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "a", "bits": 1}, "rule 'a': bits=1: must be 2 to 16, or 32 for full precision"),
        ({"match": "a", "bits": "4"}, "rule 'a': bits='4'"),
        ({"match": "a", "bits": True}, "rule 'a': bits=True"),
        ({"match": "a", "width": 4}, "rule 'a': unknown setting 'width', must be one of match, type, bits"),
        ({"bits": 4}, "needs match"),
        ({"match": ""}, "match='': must be a glob"),
        ({"match": "a", "gradient": "best"}, "gradient='best': must be one of ste, pwl, mad, ewgs, trust"),
        ({"match": "a", "gradient": 3}, "rule 'a': gradient=3: must be a name, or a mapping of name and options"),
        ({"match": "a", "gradient": {"name": "mph", "q": 3}}, "gradient 'mph' is a pair of estimators and has no"),
        ({"match": "a", "gradient": {"name": "ewgs", "q": 3}}, "gradient 'ewgs' has no option 'q', only delta"),
        ({"match": "a", "gradient": {"name": "ewgs", "delta": -1}}, "rule 'a': delta=-1: must be 0 or more"),
        ({"match": "a", "format": "int9"}, "format='int9': must be one of int"),
        ({"match": "a", "granularity": "row"}, "granularity='row'"),
        ({"match": "a", "eval_mode": ["last"]}, "eval_mode="),
        ({"match": "a", "dynamic": "no"}, "dynamic='no': must be true or false"),
        ({"match": "a", "clipping": "octva"}, "rule 'a': clipping='octva': must be one of octav"),
        ({"match": "a", "clipping": {"name": "max", "q": 3}}, "rule 'a': clipping 'max' has no option 'q'"),
        ({"match": "a", "clipping": 3}, "rule 'a': clipping=3: must be a name"),
        ("layer4.*", "must be a mapping of match"),
        ({1: 2}, "must be a mapping of match"),
    ],
)
def test_rules_that_are_none(rule: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is checked below
        Policy.from_list([rule])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dynamc": False}, TypeError, "dynamc: is neither an argument nor an option of clipping 'octav' (iter"),
        ({"dynamc": False}, TypeError, "; did you mean dynamic?"),
        ({"exmple": X}, TypeError, "; did you mean example?"),
        ({"itertions": 3}, TypeError, "; did you mean iterations?"),
        ({"q": 99.9}, TypeError, "(iterations, warm_iterations, missing_code, refine)"),
        ({"clipping": "max", "q": 3}, TypeError, "an option of clipping 'max' (which has none)"),
        ({"clipping": Octav(), "dynamc": False}, TypeError, "an option of Octav (iter"),
        ({"clipping": Octav(), "iterations": 3}, TypeError, "iterations: must be set in the clipping method"),
        ({"clipping": "static_octav"}, ValueError, "pact; for static scalars, set clipping='octav' and dynamic=False"),
        ({"clipping": "static_octva", "dynamc": 1}, ValueError, "must be one of octav, max"),
    ],
)
def test_misspelled_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        quantize_model(Net(), 4, **arguments)


def test_a_policy_that_does_not_go_with_the_network() -> None:
    model = Net()
    rules = {
        Rule("block3.*", bits=2): "'block3.*'",
        Rule("head.bias", bits=2): "'head.bias'",
        Rule("first.wieght", bits=2): "'first.wieght'",
        Rule("*", "conv2d", bits=2): "'*' of type 'conv2d'",
        Rule("stem", "Linear", bits=2): "'stem' of type 'Linear'",
        Rule("*", "Experts", bits=2): "'*' of type 'Experts'",
    }
    for rule, text in rules.items():
        message = rf"rule {re.escape(text)} matches no layer or tensor that can be quantized \(such as stem"
        with pytest.raises(PolicyError, match=message):
            quantize_model(model, 4, rules=[rule], example=X)
    with pytest.raises(PolicyError, match="leaves all of Net in full precision"):
        quantize_model(model, Policy((Rule("*", bits=4), Rule("*", bits=32))), example=X)
    with pytest.raises(TypeError, match="example is the only argument allowed"):
        quantize_model(model, Policy.of(4), gradient="ste")
    with pytest.raises(ValueError, match="a policy must be a list of rules, not str"):
        Policy.from_list("*")
    assert not quantized_tensors(model) and policy_of(model) == Policy()
    quantize_model(model, 4)  # it can still be quantized afterwards


def test_plain_values_say_it_all() -> None:
    policy = Policy.of(
        *(5, "percentile", "pwl"),
        q=99.0,
        weight_bits=3,
        activation_bits=32,
        keep=["a[0]"],
        quantize_head=False,
        rules=[Rule("layer4.*", clipping=Octav(iterations=3), eval_mode="last")],
    )
    assert Policy.from_list(policy.as_list()) == policy
    assert {"match": "*", "bits": 32} in [{k: rule[k] for k in ("match", "bits")} for rule in policy.as_list()[:1]]
    assert Policy.of(32).full_precision and not policy.full_precision
    assert not Policy.of(32, rules=[Rule("fc", bits=4)]).full_precision and not Policy().full_precision
    assert Policy.of(rules=[{"match": "fc", "bits": 8}]) == Policy.of(rules=[Rule("fc", bits=8)])
    with pytest.raises(ValueError, match="rule 'fc': unknown setting 'bit'"):
        Policy.of(rules=[{"match": "fc", "bit": 8}])
    assert not Policy((Rule("fc", bits=32),)).full_precision
    assert not Policy((Rule("*", gradient="ste"), Rule("fc", bits=32))).full_precision  # without bits, 4 is the default


@pytest.mark.parametrize("clipping", ["octav", "lsq", "pact"])
def test_a_saved_network_is_made_again_in_one_call(clipping: str, tmp_path: Path) -> None:
    class Backwards(Net):  # registers its modules in a different order than it calls them
        def __init__(self) -> None:
            super().__init__()
            modules = dict(self._modules)
            for name in reversed(modules):
                del self._modules[name]
                self._modules[name] = modules[name]

    model = quantize_model(
        Backwards(), 4, clipping, rules=[Rule("block2.*.weight", bits=2)], keep=["block1.2"], example=X
    )
    for t in quantized_tensors(model):
        if not t.quantizer.ready or t.quantizer.dynamic:
            t.quantizer.assign(torch.tensor(1.5))
    model(X).sum().backward()
    expected = model.eval()(X)
    save(model, tmp_path / "net.pt")
    again = load(tmp_path / "net.pt", Backwards()).eval()
    assert torch.equal(again(X), expected)
    assert summary(again) == summary(model) and policy_of(again) == policy_of(model)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]
    save(again, tmp_path / "net.pt")
    assert torch.equal(load(tmp_path / "net.pt", Backwards()).eval()(X), expected)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    with pytest.raises(ValueError, match="Net has no quantizers"):
        save(Net(), path)
    with pytest.raises(FileNotFoundError):
        load(path, Net())
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/no_folder'"):
        save(quantize_model(Net(), 4, example=X), tmp_path / "no_folder" / "net.pt")
    path.write_bytes(b"no file of torch")
    with pytest.raises(ValueError, match=r"net\.pt: is not a network saved by qat_runner"):
        load(path, Net())
    torch.save(Net().state_dict(), path)
    with pytest.raises(ValueError, match=r"net\.pt: is not a network saved by qat_runner"):
        load(path, Net())
    torch.save({"format": "qat_runner.network.1", "policy": "all of it"}, path)
    with pytest.raises(ValueError, match=r"net\.pt: policy must be a list"):
        load(path, Net())
    save(quantize_model(Net(), 4, example=X), path)
    small = Net()
    small.head = nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"net\.pt: does not fit Net \(.*head\.weight"):
        load(path, small)
    assert not quantized_tensors(small)
    with pytest.raises(ValueError, match=r"net\.pt: does not fit Sequential \(it has none of .*: block1\.0, b"):
        load(path, nn.Sequential(nn.Linear(8, 3)))
    with pytest.raises(ValueError, match="the model already has quantizers"):
        load(path, quantize_model(Net(), 4, example=X))
