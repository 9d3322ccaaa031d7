"""Finds prepared data sets, and says how to prepare those that are not."""

import difflib
import os
import shlex

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from gcnet_jax.data import digits
from gcnet_jax.data.records import default_data_dir
from gcnet_jax.errors import DataError, one_line, unknown_name
from gcnet_jax.files import reason


def open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    place = os.path.expanduser(data_dir or default_data_dir())
    if name == digits.NAME:
        return read_only_builder.builder_from_directory(digits.prepare_digits(place))
    return find_builder(name, place, given=data_dir is not None)


def find_builder(name: str, place: str, given: bool) -> tfds.core.DatasetBuilder:
    """Finds the files of a prepared set, whoever wrote them; its code is not needed."""
    if name.startswith(('.', '/', '~')):
        raise DataError(
            f'data set {name!r} is a path, and a data set goes by its name; a folder of images '
            f'becomes one by `python -m gcnet_jax prepare {_quoted(name)} --name NAME`, then give '
            'that NAME'
        )
    if '://' not in place:
        if given and not os.path.isdir(place):
            raise DataError(
                f'data_dir {place!r} is not a directory; give the one that holds {name!r}'
            )
        if os.path.isdir(place) and not os.access(place, os.R_OK | os.X_OK):
            raise DataError(f'data_dir {place!r} cannot be read; check its permissions')
    try:
        return read_only_builder.builder_from_files(name, data_dir=place)
    except tfds.core.DatasetNotFoundError:
        raise DataError(_not_found(name, place)) from None
    except Exception as error:  # A malformed name, unreadable or damaged descriptions.
        raise DataError(
            f'data set {name!r} cannot be opened in {place!r}: {reason(error)}'
        ) from error


def _quoted(path: str) -> str:
    """Returns a path as a shell takes it; a leading `~` still stands for the home directory."""
    home = '~/' if path.startswith('~/') else ''
    return home + shlex.quote(path.removeprefix(home))


def _not_found(name: str, place: str) -> str:
    base = name.split('/')[0].split(':')[0]
    known = set(tfds.list_builders(with_community_datasets=False))
    if base in known:
        command = (
            'import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', file_format='array_record', data_dir='{place}')"
            '.download_and_prepare()'
        )
        return (
            f'data set {name!r} is not prepared in {place!r}; {_by_hand(base, place)}prepare it '
            'once (TFDS needs TensorFlow for that): pip install tensorflow-cpu && '
            f'python -c "{command}"'
        )
    known.add(digits.NAME)
    if os.path.isdir(place) and os.access(place, os.R_OK | os.X_OK):
        known.update(entry for entry in os.listdir(place) if not entry.startswith('.'))
    advice = (
        f'looked in {place!r}; a folder of images becomes a data set by '
        '`python -m gcnet_jax prepare FOLDER --name NAME`, with --task segmentation or detection '
        'for label maps or objects'
    )
    if difflib.get_close_matches(base, known, n=1, cutoff=0.5):
        return f'{unknown_name("data set", name, known)} ({advice})'
    return f'unknown data set {name!r}: neither TFDS nor the directory has it; {advice}'


def _by_hand(base: str, place: str) -> str:
    """Says what to download first where TFDS cannot, as for ImageNet; empty where it can."""
    try:
        instructions = tfds.builder_cls(base).MANUAL_DOWNLOAD_INSTRUCTIONS
    except Exception:  # The module of a data set may need packages that are not here.
        instructions = None
    if not instructions:
        return ''
    told = one_line(' '.join(instructions.split()).rstrip('.'), 400)
    return (
        f'its files must be downloaded by hand into {os.path.join(place, "downloads", "manual")!r} '
        f'first (which TFDS calls manual_dir: {told}); then '
    )


def check_format(builder: tfds.core.DatasetBuilder, name: str) -> None:
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if 'array_record' not in formats:
        raise DataError(
            f'data set {name!r} is stored as {" and ".join(sorted(formats))} in '
            f'{str(builder.data_dir)!r}, and array_record is needed; {convert_advice(builder)}'
        )


def convert_advice(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the command that writes ArrayRecord files beside a set's files."""
    return (
        'convert it once: pip install tensorflow-cpu apache-beam mlcroissant && tfds '
        f'convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record'
    )
