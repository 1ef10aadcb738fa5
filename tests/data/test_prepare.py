from dataclasses import replace
from pathlib import Path

import pytest

from qat_runner.data import DATASETS, prepare, squad
from tests.tiny import tiny_squad


def test_success_and_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Path] = []
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], fetch=asked.append))
    assert prepare.main(["cifar10", str(tmp_path / "new")]) == 0
    assert asked == [tmp_path / "new"]
    assert f"qat-run dataset=cifar10 data_dir={tmp_path / 'new'}" in capsys.readouterr().out
    assert prepare.main(["imagenet", str(tmp_path)]) == 1  # the official files are missing
    assert "imagenet could not be prepared" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        prepare.main(["mnist", str(tmp_path)])


def test_squad_s_files_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_squad(tmp_path / "official")
    monkeypatch.setattr(squad, "URL", f"{(tmp_path / 'official').as_uri()}/")
    assert prepare.main(["squad", str(tmp_path / "new")]) == 1
    assert "train-v1.1.json contains 24 questions; the official file contains 87599" in capsys.readouterr().err
    monkeypatch.setattr(squad, "QUESTIONS", (24, 12))
    assert prepare.main(["squad", str(tmp_path / "new")]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["dev-v1.1.json", "train-v1.1.json"]


def test_a_folder_that_cannot_be_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert prepare.main(["cifar10", str(tmp_path / "file")]) == 1
    assert "cifar10 could not be prepared in " in capsys.readouterr().err
