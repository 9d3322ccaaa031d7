"""What the file of a family holds: its table of names, and what tells its checkpoints from others.

A table is a function of two prefixes: of the paths here, such as 'backbone/', and of the names in
the file, such as 'backbone.'. Tables of parts therefore add up to the table of a larger network.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn

Shapes = Mapping[str, tuple[int, ...]]
NOTHING = '(?!)'
BOOKKEEPING = {
    r'(.*\.)?num_batches_tracked': 'counters that BatchNorm does not need at a fixed momentum',
    r'n_averaged': 'the length of an average of weights',
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A module here and in the file.

    Numbers are in braces and may be shifted: `stage{stage}_{block}/conv1` here is
    `stages.{stage-1}.{block}.conv1_1x1` there.

    Attributes:
      ours: The module's path here, with '/' between its parts.
      theirs: Its name in the file.
      kind: What the module is, a key of `porting.names.KINDS`; it decides the arrays and layouts.
      beside: A module that must be in the same block here for the rule to apply; with a '/' in
        front, anywhere in the network, by its whole path.
    """

    ours: str
    theirs: str
    kind: str
    beside: str = ''


Rules = tuple[Rule, ...]


def under(ours: str, theirs: str, rows: Iterable[tuple[str, ...]]) -> Rules:
    """Returns the rules of `rows` (path here, name there, kind and, optionally, beside).

    Args:
      ours: Prefix of the paths here: empty, or with a '/' at its end.
      theirs: Prefix of the names in the file: empty, or with a '.' at its end.
      rows: The fields of each `Rule`, without the prefixes.
    """
    return tuple(Rule(f'{ours}{path}', f'{theirs}{name}', *rest) for path, name, *rest in rows)


@dataclasses.dataclass(frozen=True)
class Family:
    """The names that one library gives to networks of one kind.

    Attributes:
      library: Its name for users.
      module: The kind of network here that the table can name.
      rules: The table: a function of the prefix here and the prefix in the file.
      recognise: Patterns. A file is of this family if each of them matches one of its names.
      network: Returns the registered network that a file holds, from the names (without `prefix`)
        and shapes of its tensors, and the options that the file tells; None for a single block.
      told: Returns the options that a file determines for any network it is loaded into, from the
        same; None for none.
      num_classes: Returns the number of classes from the same; None counts the classifier's rows.
      classifier: Pattern of the names of what depends on the classes.
      context: Pattern of the part of a name that stands for a context block.
      prefix: What precedes the names where the network is part of something larger.
      left: Patterns of names that do not belong to the network, and what they are.
      may_be_new: Pattern of the paths here that are newly initialised if the file lacks them.
      may_be_lost: Pattern of the paths here that the library cannot hold, and that are left out.
      unsupported: Patterns of names that no network here can hold, and the explanation.
    """

    library: str
    module: type[nn.Module]
    rules: Callable[[str, str], Rules]
    recognise: tuple[str, ...]
    network: Callable[[Shapes], tuple[str, dict[str, Any]]] | None
    told: Callable[[Shapes], dict[str, Any]] | None = None
    num_classes: Callable[[Shapes], int] | None = None
    classifier: str = NOTHING
    context: str = NOTHING
    prefix: str = ''
    left: Mapping[str, str] = dataclasses.field(default_factory=lambda: BOOKKEEPING)
    may_be_new: str = NOTHING
    may_be_lost: str = NOTHING
    unsupported: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def is_classifier(self, name: str) -> bool:
        """Whether a name, without `prefix`, is that of a tensor that depends on the classes."""
        return re.fullmatch(rf'({self.classifier})\.(weight|bias)', name) is not None
