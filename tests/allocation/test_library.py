"""Tests of bit allocation for your own network."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import qat_runner as qat
from qat_runner.allocation import COSTS, Network, latency_ms, rules_of
from qat_runner.allocation import network as operations_of
from qat_runner.insertion import quantized_tensors
from qat_runner.insertion.size import size_mb


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    )


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(8, 3, 10, 10) for _ in range(2)]


def mean_bits(model: nn.Module, weights: bool, ends: bool = False) -> float:
    found = [t for t in quantized_tensors(model) if (t.tensor == "weight") == weights and (ends or t.layer in "24")]
    return sum(t.quantizer.format.bits * (t.elements or 0) for t in found) / sum(t.elements or 0 for t in found)


def test_a_budget_is_kept_and_used(batches: list[Tensor]) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    policy = qat.allocate(model, batches, 4.0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not quantized_tensors(model)
    qat.quantize(model, policy, example=batches[0])
    for weights in (True, False):
        assert 3.0 < mean_bits(model, weights) <= 4.0
    ends = {t.quantizer.format.bits for t in quantized_tensors(model) if t.layer in "06"}
    assert ends == {8}  # set by first_last_bits


def test_the_policy_goes_on_as_any_other(batches: list[Tensor]) -> None:
    policy = qat.allocate(network(), iter(batches), 5.0, policy=qat.Policy.of(clipping="lsq", first_last_bits=None))
    assert qat.Policy.from_list(policy.as_list()) == policy
    model = qat.quantize(network(), policy, example=batches[0])
    qat.calibrate(model, batches)
    assert mean_bits(model, weights=True, ends=True) <= 5.0


def test_memory_is_a_limit_of_its_own(batches: list[Tensor]) -> None:
    wide = qat.quantize(network(), qat.allocate(network(), batches, 8.0), example=batches[0])
    most = size_mb(wide)[0] - 0.0003
    small = qat.quantize(network(), qat.allocate(network(), batches, size_mb=most), example=batches[0])
    assert most - 0.0001 < size_mb(small)[0] <= most
    inputs = [t.quantizer.format.bits for t in quantized_tensors(small) if t.tensor == "input"]
    assert inputs == [8, 8, 8, 8]  # inputs are not stored


def test_operands_may_be_asked_to_have_the_same_bits(batches: list[Tensor]) -> None:
    policy = qat.allocate(network(), batches, bitops=0.0015, same=True, widths=(2, 4, 8))
    model = qat.quantize(network(), policy, example=batches[0])
    for layer in ("2", "4"):
        assert len({t.quantizer.format.bits for t in quantized_tensors(model) if t.layer == layer}) == 1


def test_requests_that_make_no_sense_are_refused(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="needs a limit: budget, size_mb, bitops, traffic_mb or latency_ms"):
        qat.allocate(network(), batches)
    with pytest.raises(ValueError, match="no batch"):
        qat.allocate(network(), [], 4.0)
    with pytest.raises(ValueError, match=r"1 is too low a limit of mean bits of weights: the least possible is 2"):
        qat.allocate(network(), batches, 1.0)
    with pytest.raises(ValueError, match="rules set the bit-widths of all tensors"):
        qat.allocate(network(), batches, 4.0, policy=qat.Policy.of(rules=[qat.Rule("*.*", bits=4)]))
    two = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    with pytest.raises(ValueError, match=r"first_last_bits \(8 by default\) for the first and the last layer, set"):
        qat.allocate(two, [torch.randn(4, 3, 8, 8)], 4.0)
    free = qat.Policy.of(first_last_bits=None)
    assert set(bits_of(qat.allocate(two, [torch.randn(4, 3, 8, 8)], 4.0, policy=free))) >= {"0.weight", "2.weight"}
    with pytest.raises(ValueError, match="latencies: has no entry for 0"):
        qat.allocate(network(), batches, latency_ms=1.0)


def test_a_loss_of_ones_own_takes_targets(batches: list[Tensor]) -> None:
    def squared(out: Tensor, target: Tensor) -> Tensor:
        return (out - target).square().mean()

    pairs = [(x, torch.randn(8, 5)) for x in batches]
    found = [
        qat.allocate(network(), pairs, 4.0, loss=squared, kind=kind).as_list() for kind in ("gradient", "measured")
    ]
    assert all(len(rules) == len(qat.Policy.of().rules) + 4 for rules in found)


class ReturningFields(nn.Module):
    """A network with named arguments and results."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.body = name, network()

    def forward(self, images: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {self.name: self.body(images) * scale}


def test_batches_and_logits_may_have_names_and_networks_wrappers(batches: list[Tensor]) -> None:
    by_name = [{"images": x, "scale": 1.0} for x in batches]
    plain = bits_of(qat.allocate(network(), batches, 4.0))
    named = bits_of(qat.allocate(nn.DataParallel(ReturningFields("logits")), by_name, 4.0))
    chosen = [name for name in plain if name.endswith((".weight", ".input")) and "*" not in name]
    assert chosen and all(named[f"body.{name}"] == plain[name] for name in chosen)
    with pytest.raises(ValueError, match="the network returns dict, not logits: pass a loss that takes it"):
        qat.allocate(ReturningFields("boxes"), by_name, 4.0)


class Stacking(nn.Module):
    """A network that takes a factor and a list of images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, scale: Tensor, images: list[Tensor]) -> Tensor:
        out: Tensor = self.body(torch.stack(images)) * scale
        return out


@pytest.mark.parametrize("scale", [torch.tensor(1.0), torch.ones(1)])
def test_costs_are_those_of_one_sample(scale: Tensor, batches: list[Tensor]) -> None:
    plain = qat.allocate(network(), batches, bitops=0.0015).as_list()
    found = qat.allocate(Stacking(), [(scale, [*x]) for x in batches], bitops=0.0015).as_list()
    assert [rule.get("bits") for rule in found] == [rule.get("bits") for rule in plain]


def test_a_forward_of_an_instance_that_would_run_the_original(batches: list[Tensor]) -> None:
    model = network()
    model.forward = (lambda forward: lambda x: forward(x))(model.forward)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"would still run the original through a forward that was set on the instance of Seq"
    ):
        qat.allocate(model, batches, 4.0)


class WithAuxiliary(nn.Module):
    """A network with a head that is used only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.head = network(), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        out: Tensor = self.head(hidden) + (self.aux(hidden) if self.training else 0)
        return out


@pytest.mark.filterwarnings("ignore:aux is called in training only")
def test_what_works_in_training_alone_keeps_its_bits(batches: list[Tensor]) -> None:
    policy = qat.allocate(WithAuxiliary(), batches, 3.0, policy=qat.Policy.of(bits=5, first_last_bits=None))
    model = qat.quantize(WithAuxiliary(), policy, example=batches[0])
    bits = {t.layer: t.quantizer.format.bits for t in quantized_tensors(model) if t.tensor == "weight"}
    assert bits["aux"] == 5 and bits["head"] != 5


FREE = qat.Policy.of(first_last_bits=None)


@pytest.mark.filterwarnings("ignore:aux is called in training only")
def test_what_works_in_training_alone_costs_inference_nothing() -> None:
    x = torch.randn(2, 3, 10, 10)
    full = qat.quantize(WithAuxiliary(), qat.Policy.of(keep=["head"]), example=x)
    (least,) = COSTS["traffic_mb"](known_of(full))
    bits = {t.name: 8 for t in quantized_tensors(full)}
    layers = {
        "0": (216, 300),
        "2": (576, 512),
        "4": (288, 288),
        "6": (320, 64),
    }  # elements of the weight, and of the input of one sample
    elements = sum(map(sum, layers.values()))
    assert least.total(known_of(full), bits) == pytest.approx((8 * elements + 32 * (25 + 5)) / 8e6)
    names = [f"body.{name}" for name in layers]
    table = {name: dict.fromkeys(itertools.product((2, 8), repeat=2), 1.0) for name in names}
    with pytest.raises(ValueError, match="latencies: has no entry for head"):
        latency_ms(known_of(full), table)
    (ms,) = latency_ms(known_of(full), {**table, "head": {(32, 32): 0.25}})
    assert ms.total(known_of(full), bits) == 4.25


def known_of(model: nn.Module) -> Network:
    return operations_of(model, (2, 8), 2)


class Experts(nn.Module):
    """Each input uses one of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.e[int(x[0, 0])](x))
        return out


@pytest.mark.filterwarnings("ignore:e.\\* is not called")
def test_what_the_example_does_not_come_by_is_no_choice() -> None:
    batches = [torch.cat([torch.full((4, 1), float(i)), torch.randn(4, 5)], 1) for i in range(3)]
    with pytest.raises(ValueError, match=r"e.1.weight, e.1.input, e.2.weight, e.2.input: not reached by the example"):
        qat.allocate(Experts(), batches, 8.0, policy=FREE)
    said = qat.Policy.of(first_last_bits=None, rules=[qat.Rule("e.[12]", bits=8)])
    found = bits_of(qat.allocate(Experts(), batches, 8.0, policy=said))
    assert {name: bits for name, bits in found.items() if name[0] in "eh"} == dict.fromkeys(
        ("e.[12]", "e.0.weight", "e.0.input", "head.weight", "head.input"), 8
    )


def test_an_embedding_that_is_quantized_has_a_choice() -> None:
    """It is stored and looked up, but not multiplied."""

    def embedding() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(12, 8), nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 5))

    tokens = torch.randint(0, 12, (4, 3))
    policy = qat.Policy.of(first_last_bits=None, rules=[{"match": "*", "type": "Embedding", "clipping": "max"}])
    for kind in ("gradient", "measured"):
        found = qat.allocate(embedding(), [tokens], 6.0, kind=kind, policy=policy, widths=(2, 6))
        model = qat.quantize(embedding(), found, example=tokens)
        assert {t.name: t.quantizer.format.bits for t in quantized_tensors(model)}["0.weight"] == 6
    known = known_of(qat.quantize(embedding(), policy, example=tokens))
    bits = {operand.name: 6 for operand in known.free}
    again = qat.quantize(embedding(), qat.Policy.of(rules=rules_of(known, bits, all=True)), example=tokens)
    assert {t.name: t.quantizer.format.bits for t in quantized_tensors(again)} == bits
    (read,), (stored,) = COSTS["traffic_mb"](known), COSTS["size_mb"](known)
    assert read.total(known, bits) * 8e6 == pytest.approx(6 * (24 * 8 + 24 + 8 * 5 + 8))
    assert (stored.total(known, bits) - stored.rest) * 8e6 == pytest.approx(6 * (12 * 8 + 24 * 8 + 8 * 5))


def bits_of(policy: qat.Policy) -> dict[str, int]:
    return {rule.match: rule.bits for rule in policy.rules if rule.bits is not None}


@pytest.mark.parametrize("match", ["*.weight", "*.weigh?"])
def test_what_a_rule_says_of_all_weights_stays(batches: list[Tensor], match: str) -> None:
    found = bits_of(qat.allocate(network(), batches, 4.0, policy=qat.Policy.of(rules=[qat.Rule(match, bits=8)])))
    assert not any(name.endswith(".weight") for name in found if "*" not in name) and "2.input" in found


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network(), nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.body(x)
        out: Tensor = self.head(hidden)
        return out


def test_a_tensor_that_no_gradient_reaches_is_named(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"body.2.weight, body.2.input, .*: without a price"):
        qat.allocate(Frozen(), batches, 4.0)
    assert "body.2.weight" in bits_of(qat.allocate(Frozen(), batches, 4.0, kind="measured"))


class Tied(nn.Module):
    def __init__(self, embedding: bool) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(12, 8) if embedding else nn.Linear(8, 12, bias=False), nn.Linear(8, 12)
        self.middle = nn.Linear(8, 8)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x) if isinstance(self.one, nn.Embedding) else self.one(x)[..., :8]
        out: Tensor = self.other(self.middle(hidden))
        return out


def test_what_layers_share_is_stored_once() -> None:
    tokens, x = torch.arange(6).view(2, 3), torch.randn(2, 3, 8)
    shared, middle, biases = 12 * 8, 8 * 8, 32 * (8 + 12)
    model = qat.quantize(Tied(embedding=True), 4, example=tokens)
    scalars = 32 * sum(t.quantizer.s.numel() for t in quantized_tensors(model))
    of_middle = {t.layer: t.quantizer.format.bits for t in quantized_tensors(model)}["middle"]
    assert size_mb(model)[0] * 8e6 == pytest.approx(32 * shared + of_middle * middle + biases + scalars)
    rules = [qat.Rule("one.weight", bits=3), qat.Rule("other.weight", bits=5)]
    model = qat.quantize(Tied(embedding=False), 4, example=x, rules=rules)
    scalars = 32 * sum(t.quantizer.s.numel() for t in quantized_tensors(model))
    assert size_mb(model)[0] * 8e6 == pytest.approx(5 * shared + 4 * middle + biases + scalars)


def test_bits_of_what_layers_share_are_no_choice() -> None:
    inputs = [torch.randn(2, 3, 8)]
    policy = qat.Policy.of(first_last_bits=None)
    with pytest.raises(ValueError, match=r"one.weight, other.weight: shared with other layers"):
        qat.allocate(Tied(embedding=False), inputs, 4.0, policy=policy)
    rules = [qat.Rule("one.weight", bits=8), qat.Rule("other.weight", bits=8)]
    policy = qat.Policy.of(first_last_bits=None, rules=rules)
    found = qat.quantize(Tied(embedding=False), qat.allocate(Tied(embedding=False), inputs, 4.0, policy=policy))
    assert {t.name: t.quantizer.format.bits for t in quantized_tensors(found)}["one.weight"] == 8
    small = qat.allocate(Tied(embedding=False), inputs, size_mb=0.0006, policy=policy)
    assert size_mb(qat.quantize(Tied(embedding=False), small, example=inputs[0]))[0] <= 0.0006


def test_widths_need_not_have_that_of_the_ends(batches: list[Tensor]) -> None:
    found = bits_of(qat.allocate(network(), batches, 4.0, widths=(3, 4, 5)))
    assert {bits for name, bits in found.items() if name[0] in "24"} <= {3, 4, 5}


def test_fewer_than_two_widths_are_no_choice(batches: list[Tensor]) -> None:
    for widths in ([4], [4, 4]):
        with pytest.raises(ValueError, match="must be two or more"):
            qat.allocate(network(), batches, 4.0, widths=widths)
    with pytest.raises(ValueError, match=r"widths=\[4, 8, 32\]: must be 2 to 16"):
        qat.allocate(network(), batches, 4.0, widths=[4, 8, 32])
