"""Carrying out a run: config -> data, model, policy, trainer -> results. The only package that imports all of these.

`preflight` rejects whatever can be rejected without any work, and `run` builds everything before it writes to the run
folder, so that a request that cannot be carried out leaves nothing behind.
"""

from qat_runner.experiment.building import CALIBRATION_EPOCH, build
from qat_runner.experiment.checks import preflight
from qat_runner.experiment.running import finished, run, run_after_others

__all__ = ["CALIBRATION_EPOCH", "build", "finished", "preflight", "run", "run_after_others"]
