"""The tasks that networks are trained for, one file each. No other package refers to a specific task by name."""

from typing import Any

from qat_runner.config import Config
from qat_runner.config.tasks import FACTS
from qat_runner.plugins import Registry
from qat_runner.tasks.classification import Classification
from qat_runner.tasks.language_modelling import LanguageModelling
from qat_runner.tasks.question_answering import QuestionAnswering
from qat_runner.tasks.task import Task, fields_of, joined, separate
from qat_runner.tasks.totals import Totals

__all__ = ["TASKS", "Task", "Totals", "fields_of", "joined", "register", "separate", "task_of"]

TASKS: Registry[Task[Any]] = Registry(
    "task",
    "qat_runner.tasks",
    {task.name: task for task in (Classification(), QuestionAnswering(), LanguageModelling())},
    valid=lambda task: isinstance(task, Task),
)
"""The tasks by name."""


def register(task: Task[Any]) -> None:
    """Register a task for data sets: afterwards, `dataset.task` can be set to its name."""
    TASKS.register(task.name, task)
    FACTS.register(task.name, task.facts)


def task_of(config: Config) -> Task[Any]:
    """Return the task of the data set of a resolved config."""
    return TASKS[config.dataset.task]
