"""What a task is: the one thing that training, evaluation and checkpoints know of what is learned.

The step, the loop, the metrics and the mesh call these methods. Only the modules of this package
know what a label is, how the loss is computed, and which checkpoint is best.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float

from gcnet_jax.ranges import Range

Batch = Mapping[str, Array]
Sums = dict[str, Float[Array, '']]


@runtime_checkable
class Evaluation(Protocol):
    """Adds up what a network answers on a set of examples; lives on the host."""

    def add(self, results: Mapping[str, np.ndarray]) -> None:
        """Takes in the results of one batch, as `Task.results` returns them."""

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of all examples so far: 'examples', and the task's own."""


@runtime_checkable
class Described(Protocol):
    """What a task reads of a stored network's description, see `gcnet_jax.stored`."""

    name: str
    label_names: tuple[str, ...]
    task: str

    def build(self) -> Any:
        """Builds the network."""


@runtime_checkable
class Examples(Protocol):
    """What a run knows of its data; how one example is read is between the task and its loaders."""

    name: str
    split: str

    @property
    def label_names(self) -> tuple[str, ...]:
        """The name of each class."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class OutputPlan:
    """Which outputs of a network take over which outputs of the checkpoint that it starts from.

    Attributes:
      kept: Pairs of an output here and the one there; None keeps them all in order.
      text: What is done, in one line for the user.
      kept_of: Other pairs than `kept`, by path, of modules that have not one output a class.
    """

    kept: tuple[tuple[int, int], ...] | None
    text: str
    kept_of: Mapping[str, tuple[tuple[int, int], ...]] = dataclasses.field(default_factory=dict)


class Task(abc.ABC):
    """Base of all tasks; a task is a frozen dataclass, made once per run by `build`.

    Attributes:
      name: What `config.task.name` and a stored network's description say.
      best: The metric of an evaluation whose highest value marks the best checkpoint.
      percentages: Metrics that are shown in per cent.
      settings: Every setting of the group `config.task` beside `name`, with its default.
      ranges: What each of them may be, where it is not None by default.
      data_settings: The settings of the group `config.data` that not every task reads, with their
        defaults; a type means: None by default, else a value of that type.
      data_ranges: What each of them may be, where it is not None; and what a setting of every task
        may be, where this one takes other values.
      networks: The task of the registry's rows that it trains.
      backbones: Tasks of the checkpoints that can fill the backbone of such a network.
      output_modules: Paths of the modules, or single parameters, whose last axis is the classes.
      training_method: The network's method that training calls.
      evaluates_by_device: Whether each device evaluates its own images as if it were alone. The
        partitioner is better at networks that it can split.
      fewest_classes: What `config.model.num_classes` may be at least.
      is_multilabel: Whether an image has any number of labels.
    """

    name: ClassVar[str]
    best: ClassVar[str]
    percentages: ClassVar[frozenset[str]]
    settings: ClassVar[Mapping[str, Any]]
    ranges: ClassVar[Mapping[str, Range]]
    data_settings: ClassVar[Mapping[str, Any]]
    data_ranges: ClassVar[Mapping[str, Range]]
    networks: ClassVar[str]
    backbones: ClassVar[frozenset[str]] = frozenset()
    output_modules: ClassVar[tuple[str, ...]]
    training_method: ClassVar[str] = 'outputs'
    evaluates_by_device: ClassVar[bool] = False
    fewest_classes: ClassVar[int] = 2  # A softmax over one class is always 1.
    is_multilabel: ClassVar[bool] = False

    @classmethod
    @abc.abstractmethod
    def build(cls, settings: Mapping[str, Any], source: Any, preprocessing: Any) -> 'Task':
        """Makes the task of a run.

        Args:
          settings: The group `config.task`.
          source: The training examples, as `load_source` returned them.
          preprocessing: What the network expects of its images.

        Raises:
          ConfigError: A setting does not fit the data.
        """

    @classmethod
    def conflict_in(cls, data: Mapping[str, Any]) -> str | None:
        """Returns the error about settings of `config.data` of which one does nothing, or None."""
        return None

    @classmethod
    @abc.abstractmethod
    def preprocessing(cls, data: Mapping[str, Any], base: Any) -> Any:
        """Returns the preprocessing of a run's images.

        Args:
          data: The group `config.data`, whose settings win where they are not None.
          base: That of the checkpoint which the run starts from, or of the network's row.
        """

    @classmethod
    @abc.abstractmethod
    def load_source(
        cls, name: str, split: str | None, data_dir: str | None = None, *, purpose: str
    ) -> Examples:
        """Opens one split of a data set.

        Args:
          name, split, data_dir: As in the group `config.data`.
          purpose: What a split that is None is for, see `gcnet_jax.data.sources.default_split`.

        Raises:
          DataError: It cannot be read, or is not of this task.
        """

    @classmethod
    @abc.abstractmethod
    def read_label_names(cls, name: str, data_dir: str | None = None) -> tuple[str, ...]:
        """Returns the labels of a data set, whose examples need not be here.

        Raises:
          DataError: They are not known.
        """

    def notes(self, source: Any) -> list[str]:
        """Returns what the user should know of the training examples before the run, a line each.

        Args:
          source: As `load_source` returned it.
        """
        return []

    @abc.abstractmethod
    def train_loader(self, data: Mapping[str, Any], preprocessing: Any) -> Callable[..., Any]:
        """Returns the function from a source to its training batches, without end.

        It takes the source and the keywords `global_batch_size`, `seed`, `start_step`,
        `process_index`, `process_count`, `num_threads`, `num_workers` and `skip_damaged`; see
        `gcnet_jax.data.loader.train_batches`.

        Args:
          data: The group `config.data`.
          preprocessing: What the network expects of its images.
        """

    @abc.abstractmethod
    def evaluation_loader(self, data: Mapping[str, Any], preprocessing: Any) -> Callable[..., Any]:
        """Returns the function from a source to batches that hold every example once.

        It takes the keywords of `train_loader` but `seed` and `start_step`.
        """

    @classmethod
    def take_over(
        cls, there: Described, variables: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        """Returns a checkpoint's variables under the names they have in this task's networks.

        Args:
          there: The network of the checkpoint.
          variables: Its {'params', 'batch_stats'}.

        Returns:
          The variables, and the modules that the checkpoint does not have.
        """
        return variables, ()

    @classmethod
    @abc.abstractmethod
    def outputs_of(
        cls, train: Examples, evaluation: Examples, num_classes: int | None
    ) -> tuple[int, tuple[str, ...]]:
        """Returns how many outputs a network needs for the data, and what each stands for.

        Args:
          train, evaluation: The examples of both splits.
          num_classes: `config.model.num_classes`; None takes the number from the data.

        Raises:
          ConfigError: They do not fit each other.
        """

    @classmethod
    @abc.abstractmethod
    def check_continued(cls, place: str, before: Described, now: Described) -> None:
        """Refuses to continue a run whose data now ask something else of the network.

        Args:
          place: Where the run is, as errors name it.
          before: The network of the run.
          now: The network that the config and the data describe.

        Raises:
          CheckpointError: Names what changed.
        """

    @classmethod
    @abc.abstractmethod
    def plan_outputs(
        cls, here: Described, there: Described, new_classifier: bool | None, place: str
    ) -> OutputPlan:
        """Decides which outputs of the checkpoint that a run starts from are kept.

        Args:
          here: The network to be trained.
          there: The checkpoint's.
          new_classifier: `config.training.new_classifier`: True keeps none, False keeps all in
            order, None leaves it to the task.
          place: The checkpoint, as errors name it.

        Raises:
          CheckpointError: They cannot be kept as asked, or the task cannot decide.
        """

    @abc.abstractmethod
    def batch_spec(self) -> dict[str, tuple[str, ...]]:
        """Returns the arrays of a training batch, each with the axes that may be split.

        An axis is 'batch' or 'height', from the first on; what is not named is replicated.
        """

    def evaluation_spec(self) -> dict[str, tuple[str, ...]]:
        """Returns the same of an evaluation batch, which also has a 'mask', False for padding."""
        return {**self.batch_spec(), 'mask': ('batch',)}

    @abc.abstractmethod
    def batch_shapes(
        self, batch_size: int, height: int, width: int
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and types of the arrays of a training batch, as the loader makes it."""

    @abc.abstractmethod
    def prepare(self, batch: Batch, key: Array | None) -> dict[str, Array]:
        """Returns the batch as the network and the loss read it; runs on the device.

        Every array has a name and the axes of `batch_spec` or `evaluation_spec`; one is 'image'.

        Args:
          batch: As the loader made it.
          key: Random key of this step; None leaves out what is random.
        """

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Returns what the network's `training_method` reads of a prepared batch: the images."""
        return (batch['image'],)

    def evaluation_inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Returns what its method `outputs` reads in evaluation: the images."""
        return (batch['image'],)

    @abc.abstractmethod
    def weight(self, batch: Batch) -> Float[Array, '']:
        """Returns the divisor that turns a prepared batch's summed loss into its mean."""

    @abc.abstractmethod
    def loss(self, outputs: Mapping[str, Array], batch: Batch) -> Sums:
        """Returns sums over a part of a prepared batch: 'loss', and whatever else is counted.

        The names of `training.steps.RESERVED_SUMS` are taken.

        Args:
          outputs: Outputs of the network by name.
          batch: As `prepare` returned it, or a part of it.
        """

    @abc.abstractmethod
    def training_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics of training from sums over steps; runs on the host.

        Args:
          sums: Those of `loss`, and 'count' (examples) and 'weight' (as above).
        """

    @abc.abstractmethod
    def results(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """Returns what evaluation needs of each image, as little as possible; runs on the device.

        Args:
          outputs: Outputs of the network in evaluation, by name.
          batch: As the loader made it, with 'mask'.
        """

    @classmethod
    @abc.abstractmethod
    def evaluation(cls, source: Examples) -> Evaluation:
        """Returns an evaluation of a split that has seen nothing yet."""
