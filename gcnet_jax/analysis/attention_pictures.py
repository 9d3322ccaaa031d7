"""From a checkpoint and image files to pictures of attention: what the command line calls."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gcnet_jax.analysis.attention_maps import no_attention, padding_share, sown_values
from gcnet_jax.analysis.pictures import (
    QUERIES,
    Picture,
    check_queries,
    draw_attention,
    draw_queries,
    save_figure,
)
from gcnet_jax.analysis.query_distances import SOWN, QueryDistances, distances_of
from gcnet_jax.data.sizes import Size
from gcnet_jax.errors import DataError, one_line
from gcnet_jax.files import make_directory, unique_name
from gcnet_jax.inference.batches import Inputs
from gcnet_jax.inference.classifier import LOGITS, Classifier
from gcnet_jax.inference.detector import Detector
from gcnet_jax.inference.images import LeftOut, find_images
from gcnet_jax.inference.load import load_network
from gcnet_jax.inference.segmenter import Segmenter
from gcnet_jax.inference.stored_network import StoredNetwork
from gcnet_jax.tasks.label_map import format_share
from gcnet_jax.tasks.prediction import Prediction

# Outputs that a title is made of.
ANSWERS = {LOGITS, 'scores', 'labels', 'valid'}
# Objects or labels in a title.
MAX_OBJECTS = 3
# Less of the attention on padding is not worth a word.
MIN_PADDING = 0.01


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn of one image.

    Attributes:
      prediction: The most probable class with its probability, the best objects with their scores,
        or the most frequent labels with their shares; empty without a classifier.
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
    A detector's blocks see the padding of the image, too: it is not drawn, and the title says how
    much of the attention lies there, from 1% on.

    Args:
      checkpoint: A workdir, one of its checkpoints, or a ported directory.
      images: A file, a folder, or several of them.
      out: A directory; made if need be. Pictures of the same name are replaced.
      choose: 'best' or 'newest', where there are several checkpoints.
      size: Pixels of what the network gets: one number, or height and width; for a detector or a
        segmenter the limits of the sides. None for its own; more pixels give finer maps.
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
    network = load_network(checkpoint, choose=choose, size=size, fold=False, devices=one_device)
    observe = _observer(network)
    out, taken = make_directory(out, '--out'), set()
    for path in find_images(images, left_out):
        name = unique_name(path.stem, taken)
        try:
            inputs = network.load_image(path)
        except DataError as error:
            yield path, error
            continue
        outputs, sown = observe(inputs)
        if not sown['attention']:
            raise no_attention(network.model)
        fields = inputs if isinstance(inputs, dict) else {'image': inputs}
        pixels, size = fields['image'], fields.get('size')
        prediction = _TITLES.get(network.description.task, _prediction)(network, outputs)
        title = one_line(path.name) + (f': {prediction}' if prediction else '')
        title += '' if size is None else _padding(sown['attention'].values(), pixels, size)
        drawing = {'title': title, 'shown': None if size is None else tuple(map(int, size))}
        distances = distances_of(sown)
        figures = _figures(pixels, sown, drawing, distances, all_blocks, queries)
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


def _observer(network: StoredNetwork) -> Callable[[Inputs], Any]:
    """Returns a function of one image that gives its answers and what the blocks have sown."""

    def answers(outputs: Mapping[str, Array]) -> dict[str, Array]:
        if isinstance(network, Segmenter):
            labels = jnp.argmax(outputs[LOGITS][0], axis=-1).reshape(-1)
            return {'pixels': jnp.bincount(labels, length=network.model.num_classes)}
        return {name: outputs[name][0] for name in ANSWERS & network.output_shapes.keys()}

    @jax.jit
    def apply(variables: Any, inputs: Inputs) -> Any:
        outputs, state = network.model.apply(
            variables,
            *network.module_inputs(inputs),
            train=False,
            method='outputs',
            mutable=['intermediates'],
        )
        sown = {
            # Most blocks of a detector or a segmenter are in its backbone.
            name: {path.removeprefix('backbone/'): value for path, value in values.items()}
            for name, values in sown_values(state, SOWN).items()
        }
        return answers(outputs), sown

    def observe(inputs: Inputs) -> Any:
        batch = jax.tree.map(lambda array: array[None], inputs)
        return jax.device_get(apply(network.variables, batch))

    return observe


def _figures(
    pixels: Picture,
    sown: Any,
    drawing: Mapping[str, Any],
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
        figures['attention'] = draw_attention(pixels, single, all_blocks=all_blocks, **drawing)
    if many:
        figures['queries'] = draw_queries(pixels, many, queries=queries, notes=distances, **drawing)
    return figures


def _prediction(classifier: Classifier, outputs: Mapping[str, np.ndarray]) -> str:
    """Returns the most probable label with its probability; empty without a classifier."""
    if LOGITS not in outputs:
        return ''
    logits = outputs[LOGITS]
    probabilities = classifier.task.probabilities(logits.astype(np.float64), np)
    return str(Prediction.highest(probabilities, logits, classifier.description.label_names, 1))


def _objects(detector: Detector, outputs: Mapping[str, np.ndarray]) -> str:
    """Returns the labels and scores of the best objects."""
    found = np.flatnonzero(outputs['valid'])[:MAX_OBJECTS]
    return (
        ', '.join(
            f'{detector.label_names[outputs["labels"][index]]} {outputs["scores"][index]:.2f}'
            for index in found
        )
        or 'no objects'
    )


def _labels(segmenter: Segmenter, outputs: Mapping[str, np.ndarray]) -> str:
    """Returns the labels that most pixels have, with their shares."""
    shares = outputs['pixels'] / outputs['pixels'].sum()
    most = np.argsort(-shares, kind='stable')[:MAX_OBJECTS]
    text = ', '.join(
        f'{segmenter.label_names[i]} {format_share(shares[i])}' for i in most if shares[i]
    )
    if segmenter.model.window is None:
        return text
    return f'{text} (from windows; the attention is that over the whole image)'


_TITLES = {'detection': _objects, 'segmentation': _labels}


def _padding(maps: Iterable[np.ndarray], canvas: Picture, size: Float[np.ndarray, '2']) -> str:
    """Returns the end of a title: the largest part of a block's attention that padding gets."""
    whole = canvas.shape[:2]
    share = max(padding_share(attention[0], whole, size) for attention in maps)
    if share <= MIN_PADDING:
        return ''
    area = 1 - np.prod(size) / np.prod(whole)
    return f'; padding, {area:.0%} of the input, gets up to {share:.0%} of the attention'
