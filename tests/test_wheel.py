"""The wheel, installed in another place and used outside the checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]


def test_qat_run_from_the_installed_wheel(tmp_path: Path) -> None:
    def call(*command: str, **environment: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    templates = {path.name for path in (ROOT / "qat_runner" / "report" / "templates").iterdir()}
    names = ZipFile(wheel).namelist()
    assert templates | {"LICENSE"} <= {Path(name).name for name in names}
    bundle = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qat_runner" / "report" / "plotly").iterdir()}
    assert {"qat_runner/py.typed", *bundle} <= {*names}
    site = tmp_path / "site"
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel))
    where = "import qat_runner.cli.run as r; print(r.__file__); print(r.config_dir())"
    module, configs = call(sys.executable, "-c", where, PYTHONPATH=str(site)).split()
    assert Path(module).is_relative_to(site)
    assert Path(configs) == site / "qat_runner" / "configs"
    small = [
        "model=resnet20",
        "backend=eager",
        "epochs=1",
        "limit_train_batches=1",
        "limit_val_batches=1",
        "run_dir=run",
    ]
    assert "top1 %" in call(str(site / "bin" / "qat-run"), *small, PYTHONPATH=str(site))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["dataset"] == "digits"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["git"] is None
