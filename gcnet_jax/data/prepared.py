"""Data sets that are prepared from a folder: their names, their classes, and what was made."""

import collections
import dataclasses
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import tensorflow_datasets as tfds

from gcnet_jax.data import digits
from gcnet_jax.data.folder_entries import shown
from gcnet_jax.data.records import VERSION, ImageSet, default_data_dir, write_image_set
from gcnet_jax.errors import ConfigError, DataError
from gcnet_jax.files import as_path


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """What was made of a folder.

    Attributes:
      name: What a source is loaded by.
      path: Directory of the ArrayRecord files.
      label_names: The classes, in the order of the labels.
      split_sizes: Number of images of each split.
      damaged: Files that were left out, each with the reason.
    """

    name: str
    path: Path
    label_names: tuple[str, ...]
    split_sizes: dict[str, int]
    damaged: tuple[str, ...]

    def train_settings(self, batch_size: int | None = None) -> tuple[str, ...]:
        """Returns the settings of a config that train on this set, `data.name=...` and others.

        Args:
          batch_size: That of the config. Where there are fewer training images, a smaller one is
            among the settings: the largest power of two of which an epoch has at least four, but no
            fewer than two images.
        """
        settings, images = [f'data.name={self.name}'], self.split_sizes['train']
        if not {'validation', 'test'} & self.split_sizes.keys():
            settings += ['data.train_split=train[:90%]', 'data.evaluation_split=train[90%:]']
            images = round(0.9 * images)
        if batch_size is not None and images < batch_size:
            fitting = 2 ** max(1, int(math.log2(max(1, images // 4))))
            settings.append(f'training.batch_size={min(fitting, images)}')
        return tuple(settings)


def check_set_name(name: str, data_dir: str | None, overwrite: bool) -> None:
    if not re.fullmatch(r'[a-z][a-z0-9_]*', name):
        raise ConfigError(
            f'{name!r} cannot name a data set; use lower case letters, digits and underscores, '
            'beginning with a letter'
        )
    taken = name == digits.NAME or name in tfds.list_builders(with_community_datasets=False)
    if taken:
        raise ConfigError(f'{name!r} is the name of another data set; choose a name of your own')
    place = as_path(data_dir or default_data_dir(), 'data_dir') / name
    if place.exists() and not overwrite:
        raise ConfigError(
            f'data set {name!r} is already in {shown(place)}; choose another name or overwrite it'
        )
    if place.exists() and not (place / VERSION / 'features.json').exists() and any(place.iterdir()):
        raise ConfigError(f'{shown(place)} holds no prepared folder; it is not overwritten')


def write_prepared(
    name: str,
    make_builder: Callable[[str], ImageSet],
    data_dir: str | None,
    *,
    overwrite: bool,
    progress: bool,
) -> Path:
    """Writes a set whose name `check_set_name` has let pass, and returns its directory.

    Args:
      name: Of the set.
      make_builder, data_dir, overwrite, progress: See `records.write_image_set`.

    Raises:
      ConfigError: Another process has prepared a set of this name in the meantime.
      DataError: The directory cannot be written.
    """
    path, written = write_image_set(make_builder, data_dir, overwrite=overwrite, progress=progress)
    if not written:
        raise ConfigError(f'data set {name!r} was prepared in {shown(path)} in the meantime')
    return path


def check_label_names(names: Iterable[str], what: str = 'class', advice: str = 'rename it') -> None:
    """Refuses names that would shift the labels: they are stored one per line, without margins.

    Args:
      names: Of the classes.
      what: What bears them, for errors; in the plural an `s` or `es` follows.
      advice: What to do about a name, for errors.

    Raises:
      DataError: A name cannot be stored, or two look alike.
    """
    alike = collections.defaultdict(list)
    for name in sorted(names):
        reason = None
        if any(unicodedata.category(letter) == 'Cs' for letter in name):
            reason = 'it is not UTF-8 text'
        elif any(unicodedata.category(letter) in ('Cc', 'Zl', 'Zp') for letter in name):
            reason = 'it contains a line break or another control character'
        elif not _visible(name):
            reason = 'it is blank'
        elif name != name.strip().strip('\ufeff'):
            reason = 'it begins or ends with a blank'
        if reason:
            raise DataError(
                f'the {what} {shown(name)} cannot name a class: {reason}, and labels are '
                f'stored one per line; {advice}'
            )
        alike[_visible(name)].append(name)
    for same in alike.values():
        if len(same) > 1:
            raise DataError(
                f'the {what}{"es" if what.endswith("s") else "s"} '
                f'{" and ".join(map(shown, same))} differ only in blanks or in '
                'how their letters are encoded; rename or merge them'
            )


def _visible(name: str) -> str:
    """Returns a name without blanks and invisible characters, in one form of encoding."""
    return ''.join(
        letter
        for letter in unicodedata.normalize('NFC', name)
        if not letter.isspace() and unicodedata.category(letter) != 'Cf'
    )
