from pathlib import Path

import pytest

from qat_runner.data import prepare


def test_success_and_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setitem(prepare.PREPARE, "cifar10", asked.append)
    assert prepare.main(["cifar10", str(tmp_path / "new")]) == 0
    assert asked == [str(tmp_path / "new")]
    assert f"qat-run dataset=cifar10 data_dir={tmp_path / 'new'}" in capsys.readouterr().out
    assert prepare.main(["imagenet", str(tmp_path)]) == 1  # the official files are not there
    assert "imagenet could not be prepared" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        prepare.main(["mnist", str(tmp_path)])
