"""Features of many images in one file, `.npz` or `.safetensors`, for retrieval and transfer."""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gcnet_jax.errors import ConfigError, DataError, one_line
from gcnet_jax.files import as_path, write_whole

SUFFIXES = ('.npz', '.safetensors')


def check_feature_file(out: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Refuses a file that cannot be written, before anything is computed.

    Raises:
      ConfigError: It has another ending, exists already, or its directory does not.
    """
    out = as_path(out, '--out')
    if out.suffix not in SUFFIXES:
        raise ConfigError(f'--out must end in {" or ".join(SUFFIXES)}, got {out}')
    if out.is_dir() or (out.exists() and not overwrite):
        raise ConfigError(f'{out} exists; name a new file or replace it with --overwrite')
    if not out.parent.is_dir():
        raise ConfigError(f'{out.parent} is not a directory; make it first')
    return out


def write_features(
    out: str | os.PathLike,
    rows: Iterable[tuple[Any, np.ndarray]],
    *,
    layer: str = '',
    source: str = '',
    overwrite: bool = False,
) -> tuple[int, ...]:
    """Writes features as they come; memory does not grow with their number.

    `.npz` holds the arrays `features` (float32 `[image, ...]`), `names`, `layer` and `source`;
    `.safetensors` the tensor `features`, and the rest in its metadata, the names as a JSON list.

    Args:
      out: The file; it appears when it is complete.
      rows: Pairs of a name and the features of that image, all of one shape.
      layer: Which features they are.
      source: Which network they are of.
      overwrite: Replace a file of that name.

    Returns:
      The shape of the features.

    Raises:
      ConfigError: See `check_feature_file`.
      DataError: There is no row, or the file cannot be written.
    """
    out = check_feature_file(out, overwrite=overwrite)
    with write_whole(out, DataError) as partial, _spool_beside(out) as spool:
        names, shape = _spool(spool, rows)
        if not names:
            raise DataError(f'there are no features to write into {out}')
        texts = {'layer': layer, 'source': source}
        with partial.open('wb') as file:
            if out.suffix == '.npz':
                features = np.memmap(spool, '<f4', mode='r', shape=shape)
                np.savez(file, features=features, names=np.array(names), **texts)
            else:
                _write_safetensors(file, spool, shape, {'names': json.dumps(names), **texts})
    return shape


@contextlib.contextmanager
def _spool_beside(out: Path) -> Iterator[Path]:
    path = out.with_name(f'.{out.name}.rows')
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _spool(path: Path, rows: Iterable[tuple[Any, np.ndarray]]) -> tuple[list[str], tuple[int, ...]]:
    """Writes the values one after the other; returns the names and the shape of all of it."""
    names, shape = [], ()
    with path.open('wb') as file:
        for name, row in rows:
            row = np.asarray(row, '<f4')
            if names and row.shape != shape:
                raise DataError(
                    f'{name}: its features are {_words(row.shape)}, those before {_words(shape)}; '
                    'a file holds features of one shape: give images of one size in a file of '
                    "their own, or take the layer 'pooled'"
                )
            names.append(one_line(name, limit=4096))
            shape = row.shape
            file.write(row.tobytes())
    return names, (len(names), *shape)


def _words(shape: tuple[int, ...]) -> str:
    return ' x '.join(map(str, shape)) or 'one number'


def _write_safetensors(
    file: BinaryIO, spool: Path, shape: tuple[int, ...], metadata: dict[str, str]
) -> None:
    """Writes a file of one tensor; the library's own writer wants all of it in memory."""
    tensor = {'dtype': 'F32', 'shape': list(shape), 'data_offsets': [0, spool.stat().st_size]}
    header = json.dumps({'__metadata__': metadata, 'features': tensor}).encode()
    header += b' ' * (-len(header) % 8)
    file.write(struct.pack('<Q', len(header)) + header)
    with spool.open('rb') as values:
        shutil.copyfileobj(values, file)
