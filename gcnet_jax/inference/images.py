"""Images from wherever they come, as the uint8 squares that a network takes; folders of any size.

Decoding, resizing and cropping are those of evaluation (`gcnet_jax.data.preprocess`). Everything
that can be wrong with an image becomes a DataError that names it.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gcnet_jax.data import preprocess
from gcnet_jax.errors import ConfigError, DataError, one_line
from gcnet_jax.models.registry import Preprocessing

# What is taken from a folder. A file that is named itself may end in anything.
SUFFIXES = (
    *('.jpg', '.jpeg', '.png', '.gif', '.bmp', '.webp', '.tif', '.tiff'),
    *('.ppm', '.pgm', '.pbm', '.pnm'),
)
# An uncompressed image of the most pixels that are read, in 16 bits with alpha.
MAX_FILE_BYTES = 8 * preprocess.MAX_PIXELS
MAX_THREADS = 16
ARRAY_SHAPES = '[height, width], [height, width, 1, 3 or 4], or [batch, height, width, 1, 3 or 4]'


def find_images(source: Any) -> Iterator[Path]:
    """Yields the image files of a folder and the folders in it, in the order of their names.

    Only a folder's names are held in memory, not its images. Hidden files are left out, as are
    files that do not end in one of `SUFFIXES`; links to folders are not followed.

    Args:
      source: A file, a folder, or several of them. What is no folder, and a folder without an
        image, is yielded as it is, so that `load_image` says what is wrong with it.
    """
    sources = (source,) if isinstance(source, (str, os.PathLike)) else source
    for path in map(Path, sources):
        if not path.is_dir():
            yield path
            continue
        empty = True
        for found in _walk(path):
            empty = False
            yield found
        if empty:
            yield path


def _walk(folder: Path) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        yield folder
        return
    for name in names:
        path = folder / name
        if name.startswith('.'):
            continue
        if path.is_dir():
            if not path.is_symlink():
                yield from _walk(path)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def list_images(images: Any) -> tuple[list[Any], bool]:
    """Takes apart what a caller may give.

    Returns:
      The single images, each a path, bytes, a Pillow image or an array, and whether one image was
      given and no sequence.

    Raises:
      ConfigError: It is nothing of that.
    """
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return [images], True
    if _is_array(images):
        array = np.asarray(images)
        return (list(array), False) if array.ndim == 4 else ([array], True)
    if isinstance(images, Iterable) and not isinstance(images, (dict, set)):
        return list(images), False
    raise ConfigError(
        f'images must be paths, bytes, Pillow images or arrays, one or several of them; got '
        f'{type(images).__name__}'
    )


def load_image(image: Any, preprocessing: Preprocessing, name: object = None) -> preprocess.RGB:
    """Reads one image as evaluation does, `[size, size, 3]` in uint8.

    Args:
      image: A path, encoded bytes, a Pillow image, or an array: uint8, or floating point from 0 to
        1 (which is rounded to 255ths), `[height, width]` or `[height, width, 1, 3 or 4]`. Alpha is
        dropped.
      preprocessing: Of the network.
      name: What to call the image in errors, where it is no path.

    Raises:
      DataError: It cannot be read; in one line, which begins with its name.
    """
    if isinstance(image, (str, os.PathLike)):
        name = image
    try:
        return preprocess.resize_and_crop(
            _decode(image),
            preprocessing.test_size,
            preprocessing.crop_fraction,
            preprocessing.interpolation,
        )
    except DataError as error:
        reason = str(error)
    except MemoryError:
        reason = 'there is not enough memory to decode it'
    except OSError as error:
        reason = f'cannot be read ({error.strerror or error})'
    raise DataError(f'{one_line(name)}: {one_line(reason)}')


def _decode(image: Any) -> preprocess.RGB:
    if isinstance(image, (str, os.PathLike)):
        return preprocess.decode(_read(Path(image)))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return preprocess.decode(bytes(image))
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if _is_array(image):
        return _from_array(np.asarray(image))
    raise DataError(
        f'an image is a path, bytes, a Pillow image or an array, not {type(image).__name__}'
    )


def _read(path: Path) -> bytes:
    if path.is_dir():
        os.listdir(path)  # Raises where that is what is wrong.
        raise DataError(f'a folder that holds no image itself (files ending in {SUFFIXES[0]}, ...)')
    if not path.exists():
        raise DataError('no such file')
    if not path.is_file():  # A pipe or a device, which may never end.
        raise DataError('not a file')
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise DataError(f'{size:,} bytes are more than any image of a size that is read')
    return path.read_bytes()


def _from_pillow(image: Image.Image) -> preprocess.RGB:
    if image.width * image.height > preprocess.MAX_PIXELS:
        raise DataError(
            f'image of {image.width}x{image.height} pixels, more than '
            f'{preprocess.MAX_PIXELS:,} are not read'
        )
    try:
        image = image.copy()  # The conversion must not change the caller's.
    except MemoryError:
        raise
    except Exception as error:  # Opened and not decoded before: damage makes errors of any kind.
        raise DataError(f'damaged image: {error}') from error
    return np.asarray(preprocess.to_rgb(image))


def _is_array(value: Any) -> bool:
    return hasattr(value, '__array__') and hasattr(value, 'dtype')


def _from_array(array: np.ndarray) -> preprocess.RGB:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise DataError(f'array of shape {array.shape}; images are {ARRAY_SHAPES}')
    array = array[..., :3]
    if np.issubdtype(array.dtype, np.floating) or array.dtype.name == 'bfloat16':
        array = array.astype(np.float32)
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # Also where it is not a number.
            raise DataError(
                f'floating-point array from {low:g} to {high:g}; it must be in 0..1, neither '
                'normalised nor scaled to 255: divide by 255, or give uint8'
            )
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise DataError(f'array of {array.dtype}; images are uint8, or floating point in 0..1')
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def load_ahead(
    load: Callable[[Any], Any], items: Iterable[Any], num_threads: int | None, ahead: int
) -> Iterator[tuple[Any, Any]]:
    """Yields `(item, load(item))` in order, loaded by threads.

    At most `ahead` results are held, so that the memory it takes does not depend on how many items
    there are. Closing the generator ends the threads.

    Args:
      load: Called in the threads.
      items: Taken one by one, in the caller's thread.
      num_threads: None for one a processor, at most 16.
      ahead: Items that are under way or waiting, 1 or more.
    """
    threads = num_threads or min(os.cpu_count() or 1, MAX_THREADS)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(load, item)))
                if len(waiting) >= ahead:
                    item, future = waiting.popleft()
                    yield item, future.result()
            while waiting:
                item, future = waiting.popleft()
                yield item, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
