"""config -> data, model, policy, trainer -> a run. The only room that knows them all.

`preflight` refuses what can be refused without work, and `run` builds everything before it writes to the run's folder,
so that a request that cannot be carried out leaves nothing behind.
"""

from qat_runner.experiment.building import CALIBRATION_EPOCH, build
from qat_runner.experiment.checks import preflight
from qat_runner.experiment.running import finished, run, run_after_others

__all__ = ["CALIBRATION_EPOCH", "build", "finished", "preflight", "run", "run_after_others"]
