"""The contents of a COCO annotation file, checked value by value, and reduced to what is used."""

import collections
import dataclasses
from collections.abc import Iterable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from gcnet_jax.data.coco_masks import segmentation_error
from gcnet_jax.data.image_limits import MAX_PIXELS
from gcnet_jax.errors import DataError, one_line

# By how many pixels a box may reach outside its image before that is reported.
TOLERANCE = 1.0
# Ids, coordinates and areas beyond this are damage: float64 no longer holds them exactly.
MAX_NUMBER = 2**53


@dataclasses.dataclass(frozen=True)
class ImageEntry:
    """One image of an annotation file.

    Attributes:
      id: Its number in the file.
      file_name: Relative to the folder of the images; does not lead out of it.
      size: Height and width in pixels.
    """

    id: int
    file_name: str
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The contents of an annotation file.

    Attributes:
      images: In the order of the file.
      categories: Name of each category by its id, in the order of the file.
      objects: One dictionary for each annotation, as pycocotools takes them: `id`, `image_id`,
        `category_id`, `bbox` (left, top, width and height in pixels), `area` in square pixels,
        `iscrowd`, and `segmentation` where there is one.
      ids: What the file numbers the annotations by; `objects` are numbered anew.
      notes: What is unusual about it, a line each.
    """

    images: tuple[ImageEntry, ...]
    categories: dict[int, str]
    objects: list[dict[str, Any]]
    ids: tuple[int, ...]
    notes: tuple[str, ...]


def check_annotations(contents: Any, file: object) -> Annotations:
    """Checks the contents of an annotation file.

    Annotations are numbered anew, from 1: pycocotools takes one with the id 0 for no annotation.
    A missing `iscrowd` is 0, a missing `area` that of the box. Boxes without area and boxes that
    reach outside their image stay as they are, and are reported.

    Args:
      contents: As JSON gives them.
      file: Its name, for errors.

    Raises:
      DataError: It is no annotation file, or one in which something is missing, contradicts itself
        or could not be evaluated.
    """
    if not isinstance(contents, dict):
        raise DataError(f'{one_line(file)} is no COCO annotation file: it holds no JSON object')
    parts = {}
    for name in ('images', 'annotations', 'categories'):
        parts[name] = contents.get(name)
        if not isinstance(parts[name], list):
            raise DataError(
                f'{one_line(file)} is no COCO annotation file: it has no list {name!r}; the files '
                'named instances_*.json have images, annotations and categories'
            )
    images = _check_images(parts['images'], file)
    categories = _check_categories(parts['categories'], file)
    objects, notes = _check_objects(parts['annotations'], images, categories, file)
    ids = tuple(entry['id'] for entry in parts['annotations'])
    return Annotations(tuple(images.values()), categories, objects, ids, notes)


def _check_images(entries: list[Any], file: object) -> dict[int, ImageEntry]:
    if not entries:
        raise DataError(f'{one_line(file)} lists no images')
    images, files = {}, {}
    for place, entry in enumerate(entries):
        number = _number(entry, 'id', f'images[{place}]', file)
        where = f'image {number}'
        if number in images:
            raise DataError(f'{one_line(file)}: {where} is there twice; ids must be different')
        height, width = (_number(entry, key, where, file) for key in ('height', 'width'))
        if height < 1 or width < 1 or height * width > MAX_PIXELS:
            raise DataError(
                f'{one_line(file)}: {where} has height {height} and width {width}; both are at '
                f'least 1, and an image has at most {MAX_PIXELS:,} pixels'
            )
        name = _file_name(entry, where, file)
        other = files.setdefault(PurePosixPath(name), number)
        if other != number:
            # To each entry the other's objects would be background.
            raise DataError(
                f'{one_line(file)}: {where} has the file_name {one_line(name, 80)!r} of image '
                f'{other}; list a file once, with all of its annotations'
            )
        images[number] = ImageEntry(number, name, (height, width))
    return images


def _file_name(entry: dict[str, Any], where: str, file: object) -> str:
    name = entry.get('file_name')
    if not isinstance(name, str) or not name.strip() or '\0' in name:
        raise DataError(f'{one_line(file)}: {where} has no file_name')
    # By the rules of either system, whichever this one is.
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if '..' in path.parts or path.anchor:
            raise DataError(
                f'{one_line(file)}: {where} has the file_name {one_line(name, 80)!r}, which leads '
                'out of the folder of the images'
            )
    return name


def _check_categories(entries: list[Any], file: object) -> dict[int, str]:
    if not entries:
        raise DataError(f'{one_line(file)} lists no categories')
    categories, names = {}, set()
    for place, entry in enumerate(entries):
        number = _number(entry, 'id', f'categories[{place}]', file)
        name = entry.get('name')
        if not isinstance(name, str) or not name:
            raise DataError(f'{one_line(file)}: category {number} has no name')
        if number in categories:
            raise DataError(
                f'{one_line(file)}: category {number} is there twice; ids must be different'
            )
        if name in names:
            raise DataError(
                f'{one_line(file)}: category {one_line(name, 60)!r} is there twice; categories are '
                'told apart by their names'
            )
        categories[number] = name
        names.add(name)
    return categories


def _check_objects(
    entries: list[Any], images: dict[int, ImageEntry], categories: dict[int, str], file: object
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    objects, seen = [], set()
    unusual = collections.defaultdict(list)
    for place, entry in enumerate(entries):
        where = f'annotations[{place}]'
        number = _number(entry, 'id', where, file)
        where = f'annotation {number}'
        if number in seen:
            raise DataError(f'{one_line(file)}: {where} is there twice; ids must be different')
        seen.add(number)
        image = images.get(_number(entry, 'image_id', where, file))
        if image is None:
            raise DataError(
                f'{one_line(file)}: {where} is of image {entry["image_id"]}, which is not listed'
            )
        category = _number(entry, 'category_id', where, file)
        if category not in categories:
            raise DataError(
                f'{one_line(file)}: {where} is of category {category}, which is not listed'
            )
        objects.append(
            {'id': place + 1, 'image_id': image.id, 'category_id': category}
            | _check_shape(entry, image.size, where, file)
        )
        for kind in _unusual(objects[-1], image.size):
            unusual[kind].append(where)
    notes = tuple(
        f'{one_line(file)}: {kind}: {len(places):,} (first {places[0]})'
        for kind, places in sorted(unusual.items())
    )
    return objects, notes


def _check_shape(
    entry: dict[str, Any], size: tuple[int, int], where: str, file: object
) -> dict[str, Any]:
    """Returns an annotation's box, area, whether it is a crowd, and its segmentation."""
    box = entry.get('bbox')
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise DataError(
            f'{one_line(file)}: {where} has no bbox of four numbers: left, top, width, height'
        )
    area = entry.get('area', max(box[2], 0) * max(box[3], 0))
    if not _is_number(area) or area < 0:
        raise DataError(f'{one_line(file)}: {where} has an area that is no number from 0 on')
    crowd = entry.get('iscrowd', 0)
    if crowd not in (0, 1) or not isinstance(crowd, (int, float)):
        raise DataError(f'{one_line(file)}: {where} has an iscrowd that is neither 0 nor 1')
    shape = {'bbox': box, 'area': area, 'iscrowd': int(crowd)}
    segmentation = entry.get('segmentation')
    if segmentation is None or segmentation == []:
        return shape
    problem = segmentation_error(segmentation, size)
    if problem:
        raise DataError(f'{one_line(file)}: the segmentation of {where} {problem}')
    if isinstance(segmentation, dict):
        segmentation = {'size': list(size), 'counts': segmentation['counts']}
    return shape | {'segmentation': segmentation}


def _unusual(item: dict[str, Any], size: tuple[int, int]) -> Iterable[str]:
    """Yields what is unusual about an annotation."""
    left, top, width, height = item['bbox']
    if width <= 0 or height <= 0:
        yield 'boxes without area, which count as objects that nothing can match'
    elif (
        min(left, top) < -TOLERANCE
        or left + width > size[1] + TOLERANCE
        or top + height > size[0] + TOLERANCE
    ):
        yield 'boxes that reach outside their image, used as they are'
    segmentation = item.get('segmentation')
    if segmentation is None:
        yield 'annotations without segmentation'
    elif isinstance(segmentation, list) and all(_is_outside(p, item['bbox']) for p in segmentation):
        yield 'polygons that lie outside their box'


def _is_outside(polygon: list[float], box: list[float]) -> bool:
    """Returns whether a polygon has all of its corners on one side of a box."""
    sides = zip((polygon[::2], polygon[1::2]), box[:2], box[2:], strict=True)
    return any(max(corners) < low or min(corners) > low + length for corners, low, length in sides)


def _number(entry: Any, key: str, where: str, file: object) -> int:
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not int or abs(value) > MAX_NUMBER:
        raise DataError(f'{one_line(file)}: {where} has no {key}, or one that is no whole number')
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_NUMBER <= value <= MAX_NUMBER
