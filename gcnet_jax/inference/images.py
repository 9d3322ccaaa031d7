"""Images from wherever they come, as the uint8 arrays that a network takes; folders of any size.

Decoding, resizing and cropping are those of evaluation (`gcnet_jax.data.preprocess`). Everything
that can be wrong with an image becomes a DataError that names it.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gcnet_jax import files
from gcnet_jax.data import decode, keep_ratio, preprocess
from gcnet_jax.data.image_limits import (
    DECODING_MEMORY,
    MAX_FILE_BYTES,
    PREFIX_BYTES,
    check_size,
    image_file,
    image_format,
)
from gcnet_jax.data.preprocessing import KeepRatio, Preprocessing
from gcnet_jax.errors import ConfigError, DataError, one_line

# Taken from a folder whatever is in them, so that damaged ones are reported. Other files are taken
# if they begin as an image does. A file that is named itself may be anything.
SUFFIXES = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.gif', '.bmp', '.webp', '.tif', '.tiff'),
    *('.ppm', '.pgm', '.pbm', '.pnm', '.avif', '.heic', '.heif'),
)
MAX_THREADS = 16
ARRAY_SHAPES = '[height, width], [height, width, 1, 3 or 4], or [batch, height, width, 1, 3 or 4]'


@dataclasses.dataclass
class LeftOut:
    """Counts what `find_images` leaves out because it is no image.

    Attributes:
      count: Number of files.
      first: The first of them, in the order of their names.
    """

    count: int = 0
    first: Path | None = None

    def add(self, path: Path) -> None:
        """Counts one more file."""
        self.first = self.first or path
        self.count += 1

    def __str__(self) -> str:
        files = 'file that is' if self.count == 1 else 'files that are'
        return f'left out {self.count:,} {files} no image (first: {one_line(self.first)})'


def find_images(source: Any, left_out: LeftOut | None = None) -> Iterator[Path]:
    """Yields the image files of a folder and the folders in it, in the order of their names.

    Only a folder's names are held in memory, not its images. What is an image is decided by the
    first bytes of each file, or by one of `SUFFIXES`. Hidden files and folders are passed over.
    Links are followed; each folder is visited once, however many links lead to it.

    Args:
      source: A file, a folder, or several of them. What is no folder, and a folder without an
        image, is yielded as it is, so that `load_image` says what is wrong with it.
      left_out: Counts the files of folders that are no images.
    """
    sources = (source,) if isinstance(source, (str, os.PathLike)) else source
    left_out = LeftOut() if left_out is None else left_out
    for path in map(Path, sources):
        if not path.is_dir():
            yield path
            continue
        empty = True
        for found in _walk(path, left_out):
            empty = False
            yield found
        if empty:
            yield path


def _walk(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    # A list of what is still to do instead of recursion: folders can be nested deeper than Python's
    # stack is.
    waiting, visited = [folder], set()
    while waiting:
        path = waiting.pop()
        try:
            if not path.is_dir():
                if _looks_like_image(path):
                    yield path
                else:
                    left_out.add(path)
                continue
            status = path.stat()
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            names = sorted(os.listdir(path), reverse=True)
        except OSError:
            yield path  # Loading it says why.
            continue
        waiting += [path / name for name in names if not name.startswith('.')]


def _looks_like_image(path: Path) -> bool:
    if path.suffix.lower() in SUFFIXES:
        return True
    if not path.is_file():  # A pipe, which would never end, or a link to nowhere.
        return False
    with path.open('rb') as file:
        return image_format(file.read(PREFIX_BYTES)) is not None


def list_images(images: Any) -> tuple[list[Any], bool]:
    """Takes apart what a caller may give.

    Returns:
      The single images, each a path, bytes, a binary file, a Pillow image or an array, and whether
      one image was given and no sequence.

    Raises:
      ConfigError: It is nothing of that.
    """
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return [images], True
    if _is_file(images):
        return [images], True
    if _is_array(images):
        array = np.asarray(images)
        return (list(array), False) if array.ndim == 4 else ([array], True)
    if isinstance(images, Iterable) and not isinstance(images, (dict, set)):
        return list(images), False
    raise ConfigError(
        f'images must be paths, bytes, binary files, Pillow images or arrays, one or several; got '
        f'{type(images).__name__}'
    )


def load_image(image: Any, preprocessing: Preprocessing, name: object = None) -> decode.RGB:
    """Reads one image as evaluation does, in uint8 and the network's size.

    Args:
      image: A path, encoded bytes, a file opened for reading bytes (read from where it stands), a
        Pillow image, or an array: uint8, or floating point from 0 to 1 (which is rounded to
        255ths), `[height, width]` or `[height, width, 1, 3 or 4]`. Alpha is dropped.
      preprocessing: What the network expects.
      name: What to call the image in errors, where it is no path.

    Raises:
      DataError: It cannot be read; in one line, which begins with its name.
    """
    options = (
        preprocessing.test_size,
        preprocessing.crop_fraction,
        preprocessing.interpolation,
    )
    with _errors_named(image, name), _encoded(image) as data:
        if data is not None:
            return preprocess.decode_and_crop(data, *options)
        return preprocess.resize_and_crop(_pixels(image), *options)


def load_keeping_ratio(
    image: Any, preprocessing: KeepRatio, name: object = None
) -> tuple[decode.RGB, tuple[int, int]]:
    """Reads one image as a detector does: whole, upright, resized in its own ratio, not padded.

    Args:
      image, name: See `load_image`.
      preprocessing: Of the network.

    Returns:
      The resized image, and height and width of the original.

    Raises:
      DataError: It cannot be read or is too elongated; in one line, which begins with its name.
    """
    pixels = load_upright(image, name)
    with _errors_named(image, name):
        size = keep_ratio.resized_shape(*pixels.shape[:2], preprocessing)
        return keep_ratio.resize(pixels, size), pixels.shape[:2]


def load_upright(image: Any, name: object = None) -> decode.RGB:
    """Reads one image as `load_keeping_ratio` does, in its own size."""
    with _errors_named(image, name), _encoded(image) as data:
        return _pixels(image, upright=True) if data is None else decode.decode_upright(data)


@contextlib.contextmanager
def _errors_named(image: Any, name: object) -> Iterator[None]:
    """Makes a DataError that begins with an image's name of what is wrong with it."""
    if isinstance(image, (str, os.PathLike)):
        name = image
    try:
        yield
        return
    except DataError as error:
        reason = str(error)
    except MemoryError:
        reason = 'there is not enough memory to decode it'
    except (OSError, ValueError) as error:  # A ValueError: a name with a NUL byte, a closed file.
        reason = f'cannot be read ({files.reason(error)})'
    raise DataError(f'{one_line(name)}: {one_line(reason)}')


@contextlib.contextmanager
def _encoded(image: Any) -> Iterator[bytes | None]:
    """Gives the encoded bytes of an image that has some, None for pixels."""
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if path.is_dir():
            _refuse_folder(path)
        with image_file(path) as data:
            yield data
    elif isinstance(image, (bytes, bytearray, memoryview)):
        yield bytes(image)
    elif _is_file(image):
        data = image.read(MAX_FILE_BYTES + 1)
        if not isinstance(data, bytes):
            raise DataError("a file of text; open it with mode 'rb'")
        yield data
    else:
        yield None


def _pixels(image: Any, upright: bool = False) -> decode.RGB:
    if isinstance(image, Image.Image):
        return _from_pillow(image, upright)
    if _is_array(image):
        return _from_array(np.asarray(image))
    raise DataError(
        'an image is a path, bytes, a binary file, a Pillow image or an array, not '
        f'{type(image).__name__}'
    )


def _refuse_folder(path: Path) -> None:
    os.listdir(path)  # Raises where that is what is wrong.
    if any(found.is_file() for found in find_images(path)):
        raise DataError('a folder, not an image; stream() goes through the images of a folder')
    raise DataError(f'a folder that holds no image itself (files ending in {SUFFIXES[0]}, ...)')


def _from_pillow(image: Image.Image, upright: bool) -> decode.RGB:
    check_size(*image.size)
    # Its copy (up to 4 bytes a pixel), the pixels in RGB (4), and their array (3).
    with DECODING_MEMORY.hold(11 * image.width * image.height):
        try:
            copied = image.copy()  # The conversion must not change the caller's.
        except MemoryError:
            raise
        except Exception as error:  # Not decoded before: damage makes errors of any kind.
            raise DataError(f'damaged image: {error}') from error
        pixels = decode.to_rgb(copied)
        return decode.to_array(decode.upright(pixels, image) if upright else pixels)


def _is_file(value: Any) -> bool:
    return callable(getattr(value, 'read', None))


def _is_array(value: Any) -> bool:
    return hasattr(value, '__array__') and hasattr(value, 'dtype')


def _from_array(array: np.ndarray) -> decode.RGB:
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
