"""From a checkpoint and image files to pictures of attention: what the command line calls."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gcnet_jax.analysis.attention_maps import no_attention, sown_values
from gcnet_jax.analysis.pictures import (
    QUERIES,
    Picture,
    check_queries,
    draw_attention,
    draw_queries,
    save_figure,
)
from gcnet_jax.analysis.query_distances import SOWN, QueryDistances, distances_of
from gcnet_jax.data.on_device import normalize
from gcnet_jax.data.sizes import Size
from gcnet_jax.errors import DataError, one_line
from gcnet_jax.files import make_directory, unique_name
from gcnet_jax.inference.images import LeftOut, find_images
from gcnet_jax.inference.stored_network import StoredNetwork
from gcnet_jax.stored import ModelDescription
from gcnet_jax.tasks import find_task
from gcnet_jax.tasks.prediction import Prediction


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn of one image.

    Attributes:
      prediction: The most probable class with its probability; empty without a classifier.
      files: The pictures.
      distances: Distances of each NonLocal block, by its path.
    """

    prediction: str
    files: tuple[Path, ...]
    distances: dict[str, QueryDistances]


def write_pictures(
    checkpoint: str | os.PathLike,
    images: Any,
    out: str | os.PathLike,
    *,
    choose: str = 'best',
    size: Size | None = None,
    all_blocks: bool = False,
    queries: Sequence[tuple[float, float]] = QUERIES,
    left_out: LeftOut | None = None,
) -> Iterator[tuple[Path, Drawn | DataError]]:
    """Draws what a stored network's context blocks attend to, image by image.

    Writes `NAME_attention.png` for blocks with one map an image, `NAME_queries.png` for NonLocal.

    Args:
      checkpoint: A workdir, one of its checkpoints, or a ported directory.
      images: A file, a folder, or several of them.
      out: A directory; made if need be. Pictures of the same name are replaced.
      choose: 'best' or 'newest', where there are several checkpoints.
      size: Size of what the network gets, in pixels, one number for a square or height and width;
        None for its own. More pixels give finer maps.
      all_blocks, queries: See `draw_attention` and `draw_queries`.
      left_out: Counts the files of folders that are no images.

    Yields:
      Each image with what was drawn, or with the error that says why it was not.

    Raises:
      CheckpointError: It cannot be read.
      ConfigError: An option that cannot be.
      UserError: The network holds no block that attends, or the directory cannot be written.
    """
    check_queries(queries)
    one_device = jax.local_devices()[:1]
    network = StoredNetwork.load(
        checkpoint, choose=choose, size=size, fold=False, devices=one_device
    )
    observe = _observer(network)
    out, taken = make_directory(out, '--out'), set()
    for path in find_images(images, left_out):
        name = unique_name(path.stem, taken)
        try:
            pixels = network.load_image(path)
        except DataError as error:
            yield path, error
            continue
        logits, sown = observe(pixels)
        if not sown['attention']:
            raise no_attention(network.model)
        prediction = _prediction(network.description, logits)
        title = one_line(path.name) + (f': {prediction}' if prediction else '')
        distances = distances_of(sown)
        figures = _figures(pixels, sown, title, distances, all_blocks, queries)
        files = [save_figure(figure, out / f'{name}_{end}.png') for end, figure in figures.items()]
        yield path, Drawn(prediction, tuple(files), distances)


def mean_distances(all_distances: Iterable[dict[str, QueryDistances]]) -> dict[str, QueryDistances]:
    """Averages the distances of several images, by block."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for distances in all_distances:
        for path, values in distances.items():
            rows.setdefault(path, []).append(dataclasses.astuple(values))
    return {
        path: QueryDistances(*np.mean(values, axis=0).tolist()) for path, values in rows.items()
    }


def _observer(network: StoredNetwork) -> Any:
    """Returns a function of one image that gives its logits and what the blocks have sown."""
    preprocessing = network.description.preprocessing

    @jax.jit
    def apply(variables: Any, images: jax.Array) -> Any:
        images = normalize(images, preprocessing.mean, preprocessing.std)
        output, state = network.model.apply(
            variables, images, train=False, mutable=['intermediates']
        )
        return output[0], sown_values(state, SOWN)

    def observe(pixels: Picture) -> Any:
        return jax.device_get(apply(network.variables, pixels[None]))

    return observe


def _figures(
    pixels: Picture,
    sown: Any,
    title: str,
    distances: dict[str, QueryDistances],
    all_blocks: bool,
    queries: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """Draws the blocks with one map per image, and those with a map per query, by file ending."""
    maps = {block: attention[0] for block, attention in sown['attention'].items()}
    single = {block: values for block, values in maps.items() if values.ndim == 2}
    many = {block: values for block, values in maps.items() if values.ndim != 2}
    figures = {}
    if single:
        figures['attention'] = draw_attention(pixels, single, title=title, all_blocks=all_blocks)
    if many:
        figures['queries'] = draw_queries(
            pixels, many, queries=queries, notes=distances, title=title
        )
    return figures


def _prediction(description: ModelDescription, logits: np.ndarray) -> str:
    """Returns the most probable label with its probability; empty without a classifier."""
    if description.options.get('num_classes') == 0:
        return ''
    probabilities = find_task(description.task).probabilities(logits.astype(np.float64), np)
    return str(Prediction.highest(probabilities, logits, description.label_names, 1))
