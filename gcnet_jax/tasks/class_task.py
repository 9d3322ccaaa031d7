"""What the tasks have in common whose networks answer with classes that have names."""

from collections.abc import Mapping
from typing import Any

from gcnet_jax.tasks.label_names import check_same_labels, check_splits, plan_classifier
from gcnet_jax.tasks.task import Described, Examples, OutputPlan, Task


class ClassTask(Task):
    """A task whose outputs are the data set's classes, known by their names."""

    @classmethod
    def outputs_of(
        cls, train: Examples, evaluation: Examples, num_classes: int | None
    ) -> tuple[int, tuple[str, ...]]:
        check_splits(train, evaluation, num_classes)
        return train.num_classes, train.label_names

    @classmethod
    def check_continued(cls, place: str, before: Described, now: Described) -> None:
        check_same_labels(place, before.label_names, now.label_names)

    @classmethod
    def plan_outputs(
        cls, here: Described, there: Described, new_classifier: bool | None, place: str
    ) -> OutputPlan:
        return plan_classifier(here, there, new_classifier, place)


def as_backbone(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a classifier's variables, without its last layer, as those of a backbone."""
    return {
        collection: {
            'backbone': {name: leaf for name, leaf in tree.items() if name != 'classifier'}
        }
        for collection, tree in variables.items()
    }
