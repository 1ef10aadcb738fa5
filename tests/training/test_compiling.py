"""compile=true: what it refuses, and that it trains as without."""

from pathlib import Path

import pytest
import torch

from qat_runner.config import from_hydra
from qat_runner.config.composing import compose_config
from qat_runner.data import Batch
from qat_runner.errors import ConfigError
from qat_runner.experiment import build, preflight
from qat_runner.quant.kernels import compiled
from qat_runner.runs.record import NullRecord
from qat_runner.training.loop import Trainer


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("accumulate=2", "compile=true: cannot be combined with accumulate=2, "),
        ("log_excess_mse=true", "compile=true: cannot be combined with log_excess_mse=true, "),
        ("clipping.sync=true", "compile=true: cannot be combined with clipping.sync=true, "),
        ("sync_batchnorm=true", "compile=true: cannot be combined with sync_batchnorm=true, "),
    ],
)
def test_what_looks_into_the_network_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_hydra(compose_config(["compile=true", override]))


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "available", lambda: False)
    with pytest.raises(ConfigError, match="compile=true: needs a C"):
        preflight(from_hydra(compose_config(["compile=true", "device=cpu", "dataset=digits"])))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_steps_but_the_first_are_one_graph_and_the_same_but_for_rounding(tmp_path: Path) -> None:
    losses = []
    for asked in ("true", "false"):
        torch.compiler.reset()
        small = ("model=resnet20", "model.width=0.25", "dataset=digits", "batch_size=32", "device=cpu", "bits=8")
        config = from_hydra(compose_config([*small, f"compile={asked}"]))
        model, data = build(config, None)
        trainer = Trainer(config, model.train().double(), data, NullRecord(tmp_path))
        batches = [Batch((b.inputs[0].double(),), b.targets) for b in data.train_batches(32, 0, 4, 0)]
        torch._dynamo.utils.counters.clear()
        losses.append(torch.stack([trainer._step(batch) for batch in batches]))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (asked == "true")
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)
