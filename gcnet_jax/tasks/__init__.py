"""What a network learns and how it is judged: one file per task."""

from gcnet_jax.errors import ConfigError, unknown_name
from gcnet_jax.tasks.classification import Classification
from gcnet_jax.tasks.detection import Detection
from gcnet_jax.tasks.label_task import LabelTask
from gcnet_jax.tasks.multilabel import MultiLabel
from gcnet_jax.tasks.segmentation import Segmentation
from gcnet_jax.tasks.task import Evaluation, Examples, OutputPlan, Task

__all__ = [
    'TASKS',
    'Classification',
    'Detection',
    'Evaluation',
    'Examples',
    'LabelTask',
    'MultiLabel',
    'OutputPlan',
    'Segmentation',
    'Task',
    'find_task',
]

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, MultiLabel, Segmentation, Detection)
}


def find_task(name: object) -> type[Task]:
    """Returns the task of a name.

    Raises:
      ConfigError: There is none; names the nearest.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise ConfigError(unknown_name('task', name, TASKS))
    return TASKS[name]
