"""Rules from the command line and from a file: what is run, recorded, part of the name, and rejected."""

from pathlib import Path

import pytest
import yaml

from qat_runner.cli.run import main
from qat_runner.config import load_config, read_config, run_name
from qat_runner.config.composing import command, quoted

SMALL = ("model=resnet8", "dataset=digits", "device=cpu", "epochs=1", "limit_train_batches=1", "limit_val_batches=1")
FILE = """
rules:
  - {match: layer3.*, bits: 3}
  - {match: "*.weight", clipping: {name: percentile, q: 99.9}}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_and_a_rule_on_top_of_it(place: Path) -> None:
    (place / "mixed.yaml").write_text(FILE)
    asked = (*SMALL, "policy=mixed.yaml", "rules=[{match: last, bits: 32}, {match: layer3.0.conv1.input, bits: 5}]")
    assert main(asked) == 0
    (folder,) = (place / "runs").iterdir()
    assert folder.name.startswith("resnet8_digits_scratch_4bit-mixed_octav_mph_seed0_")
    table = (folder / "quantizers.txt").read_text().splitlines()
    bits = {tuple(line.split()[:2]): line.split()[2] for line in table if len(line.split()) == 7}
    assert bits["layer3.0.conv1", "weight"] == "3" and bits["layer3.0.conv1", "input"] == "5"
    assert bits["layer2.0.conv1", "weight"] == "4" and bits["conv1", "weight"] == "8"
    assert ("linear", "weight") not in bits and "Linear linear" in table[-1]

    (place / "mixed.yaml").unlink()  # the record no longer needs it
    config = load_config(folder)
    assert config is not None and config.policy is None and len(config.rules) == 4
    assert run_name(config) == folder.name
    assert yaml.safe_load((folder / "config.yaml").read_text())["rules"][0] == {"match": "layer3.*", "bits": 3}
    again = command(config)
    assert again is not None and "rules=" in again
    assert main([*asked[:-2], f"rules={quoted(config.rules)}"]) == 0  # the same run
    assert len([*folder.parent.iterdir()]) == 1


def test_without_rules_names_are_as_before_rules_existed(place: Path) -> None:
    assert main([*SMALL, "run_dir=run"]) == 0
    saved = yaml.safe_load((place / "run" / "config.yaml").read_text())
    for key in ("rules", "policy", "format"):
        del saved[key]
    del saved["clipping"]["options"]
    (place / "old.yaml").write_text(yaml.safe_dump(saved))
    new, old = read_config(place / "run" / "config.yaml"), read_config(place / "old.yaml")
    assert run_name(new) == run_name(old) and "mixed" not in run_name(new)


@pytest.mark.parametrize(
    ("content", "words", "text"),
    [
        (None, ["policy=nowhere.yaml"], "policy=nowhere.yaml: there is no such file"),
        ("rules: [{match: *.weight, bits: 3}]", ["policy=p.yaml"], "a glob that begins with * must be in quotes"),
        ("- {match: a, bits: 3}", ["policy=p.yaml"], "policy=p.yaml: cannot be read"),
        ("bits: 3\nrules: []", ["policy=p.yaml"], "policy=p.yaml: must hold the single key rules with a list of rules"),
        ("rules: {match: a}", ["policy=p.yaml"], "policy=p.yaml: must hold the single key rules with a list of rules"),
        ("rules: [{match: a, bits: 1}]", ["policy=p.yaml"], "rules: rule 'a': bits=1: must be 2 to 16, or 32"),
        (None, ["rules=[{match: a, bit: 3}]"], "rules: rule 'a': unknown setting 'bit', must be one of match"),
        (None, ["rules=[{match: a, bits: 3.0}]"], "rules: rule 'a': bits=3.0: must be 2 to 16, or 32"),
        (None, ["rules=[{match: layer3.*}]"], "rules: rule 'layer3.*': sets nothing; it needs a setting, such as bits"),
        (
            "rules: [{match: a, type: Linear}]",
            ["policy=p.yaml", "rules=[{match: b, bits: 3}]"],
            "rule 'a': sets nothing",
        ),
        (None, ["rules=[layer3]"], "rules: rule 'layer3': must be a mapping"),
        (None, ["rules=3"], "rules"),
        (None, ["rules=[{match: layer9.*, bits: 3}]"], "rule 'layer9.*' matches no layer or tensor"),
        (None, ["rules=[{match: layer3.*, clipping: {name: max, q: 3}}]"], "clipping 'max' has no option 'q'"),
        (None, ["format=int9"], "format=int9: must be one of int"),
        (None, ["clipping=max", "clipping.warm_iterations=3"], "clipping 'max' has no option 'warm_iterations'"),
    ],
)
def test_invalid_rules_are_rejected(
    content: str | None, words: list[str], text: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (place / "p.yaml").write_text(content)
    assert main([*SMALL, *words]) == 2
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err
    assert not (place / "runs").exists()
