"""What takes the place of a data set in a plan."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class StandInSource:
    """Takes the place of images in a plan, which needs no more than their labels."""

    name: str
    split: str
    label_names: tuple[str, ...]
    length: int
    is_multilabel: bool = False
    has_masks: bool = True

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def __len__(self) -> int:
        return self.length
