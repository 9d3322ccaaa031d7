"""Writing image sets in TFDS's own form, as ArrayRecord files and without TensorFlow."""

import contextlib
import io
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from gcnet_jax.data.sorting import sorted_in_files
from gcnet_jax.errors import DataError, one_line
from gcnet_jax.files import as_path

try:
    import fcntl
except ImportError:  # Windows; what a killed process leaves there stays.
    fcntl = None

VERSION = '1.0.0'
# Directory in which a set is prepared, and the file in it that its process holds locked.
ASIDE_PREFIX = '.preparing-'
ASIDE_LOCK = '.lock'
# A directory younger than this may not have its lock yet.
ASIDE_GRACE_SECONDS = 60
# Locks may not reach across hosts, so the directories of others are left alone for longer.
ASIDE_GRACE_SECONDS_ELSEWHERE = 7 * 24 * 3600

Example = tuple[str, dict[str, object]]


def default_data_dir() -> str:
    """Returns TFDS's directory for data sets: $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return os.path.expanduser(tfds.core.constants.DATA_DIR)


class ImageSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder for images that are already encoded, which is what keeps TensorFlow out.

    Args:
      name: Name of the data set.
      label_names: Name of each class, in the order of the labels.
      splits: For each split a function that makes its examples: pairs of a unique key and
        `{'image': encoded bytes, 'label': class name, 'file_name': str}`. No split may be empty.
      data_dir: Directory that holds `<name>/<version>/` when prepared.
      description: One line for `dataset_info.json`.
      label_maps: Whether 'label' is a label map, encoded as PNG, instead of a class name.
    """

    RELEASE_NOTES = None

    def __init__(
        self,
        name: str,
        *,
        label_names: tuple[str, ...],
        splits: Mapping[str, Callable[[], Iterable[Example]]],
        data_dir: str,
        description: str,
        label_maps: bool = False,
    ) -> None:
        self.name = name
        self._label_maps = label_maps
        self.VERSION = tfds.core.Version(VERSION)
        self._label_names = label_names
        self._splits = splits
        self._description = description
        super().__init__(data_dir=data_dir, version=VERSION, file_format='array_record')

    def _info(self) -> tfds.core.DatasetInfo:
        names = self._label_names
        label = (
            tfds.features.LabeledImage(labels=list(names), encoding_format='png')
            if self._label_maps
            else tfds.features.ClassLabel(names=names)
        )
        return self._make_info({'label': label}, supervised_keys=('image', 'label'))

    def _make_info(
        self, features: Mapping[str, tfds.features.FeatureConnector], **options: Any
    ) -> tfds.core.DatasetInfo:
        """Describes a set of images and their file names with more features."""
        shared = {'image': tfds.features.Image(), 'file_name': tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._description,
            features=tfds.features.FeaturesDict(shared | features),
            **options,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterable[Example]]:
        return {split: examples() for split, examples in self._splits.items()}

    def _generate_examples(self) -> None:
        raise NotImplementedError  # TFDS wants it defined; the splits bring their own examples.


def write_image_set(
    make_builder: Callable[[str], ImageSet],
    data_dir: str | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[Path, bool]:
    """Prepares a set in a directory aside and renames it, so that no reader ever sees half of one.

    Args:
      make_builder: Makes the builder for a data directory.
      data_dir: Where the set goes; TFDS's directory if None. It is created if it is absent.
      overwrite: Replace a set that is there.
      progress: Show TFDS's progress bars on stderr.

    Returns:
      The directory of the prepared set, and whether this call wrote it: False if another process
      was first.

    Raises:
      DataError: If the directory cannot be written.
    """
    root = as_path(data_dir or default_data_dir(), 'data_dir')
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        with _directory_aside(root) as aside:
            builder = make_builder(aside)
            with _quiet(progress), sorted_in_files():
                builder.download_and_prepare(
                    # Otherwise TFDS looks in Google's storage for a set of this name.
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
            target = root / builder.name / VERSION
            if overwrite and target.exists():
                target.rename(Path(aside) / 'replaced')
            target.parent.mkdir(exist_ok=True)
            return target, _rename(Path(aside) / builder.name / VERSION, target)
    except (OSError, RuntimeError) as error:  # A full disk is a RuntimeError of ArrayRecord's.
        full = 'No space left' in str(error)
        reason = 'no space left' if full else getattr(error, 'strerror', None) or error
        raise DataError(
            f"cannot write a data set into '{one_line(root)}' ({one_line(reason)}); "
            f'give a directory that {"has room" if full else "can be written"} as data_dir'
        ) from error


@contextlib.contextmanager
def _directory_aside(root: Path) -> Iterator[str]:
    """Gives a directory of its own, which no other user can enter, and removes it at the end."""
    aside = tempfile.TemporaryDirectory(prefix=_own_prefix(), dir=root, ignore_cleanup_errors=True)
    with aside as path, open(Path(path) / ASIDE_LOCK, 'wb') as lock:
        if fcntl:
            # The system frees the lock when this process ends, however it ends.
            with contextlib.suppress(OSError):  # A file system without locks.
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def _own_prefix() -> str:
    return f'{ASIDE_PREFIX}{re.sub("[^A-Za-z0-9]", "_", socket.gethostname())}-'


def _remove_leftovers(root: Path) -> None:
    """Removes the directories of processes that were killed while they prepared a set."""
    for place in root.glob(f'{ASIDE_PREFIX}*'):
        with contextlib.suppress(OSError):  # Another process may do the same.
            status = place.lstat()
            here = place.name.startswith(_own_prefix())
            grace = ASIDE_GRACE_SECONDS if here else ASIDE_GRACE_SECONDS_ELSEWHERE
            ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if fcntl and ours and time.time() - status.st_mtime > grace:
                with open(place / ASIDE_LOCK, 'ab', opener=_open_no_link) as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Fails while it is in use.
                    shutil.rmtree(place)


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _rename(source: Path, target: Path) -> bool:
    try:
        source.rename(target)
    except OSError:
        if (target / 'features.json').exists():
            return False
        raise
    return True


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    if not progress:
        tfds.display_progress_bar(False)
    try:
        # TFDS prints a size that it does not know and a path that is about to be renamed.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
