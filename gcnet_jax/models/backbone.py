"""What all networks share: the stages one after the other, and every output by its name."""

from collections.abc import Iterator, Sequence

import flax.linen as nn
from jaxtyping import Array, Float

from gcnet_jax.models.layers import check_images, global_average_pool

Features = Float[Array, 'batch height width channel']
Map = Float[Array, 'batch _ _ _']


class Backbone(nn.Module):
    """A network of stages, with a classifier unless `num_classes` is 0.

    A subclass has the attributes `num_classes`, `dropout_rate` and `dtype`, makes its stages with
    `set_up_stages` in `setup`, and says what comes before and behind them in `_stem` and `_head`.
    """

    @nn.nowrap
    def set_up_stages(self, stages: Sequence[Sequence[nn.Module]]) -> None:
        """Names the blocks `stage1_0`, `stage1_1`, ... and makes the classifier; for `setup`."""
        self.stage_count = len(stages)
        for number, blocks in enumerate(stages, start=1):
            setattr(self, f'stage{number}', list(blocks))
        self.dropout = nn.Dropout(self.dropout_rate)
        if self.num_classes:
            self.classifier = nn.Dense(self.num_classes)

    def _stem(self, images: Features, *, train: bool) -> tuple[Map | None, Map]:
        """Returns the stem's feature map (None if there is no stem), and what stage 1 reads."""
        raise NotImplementedError

    def _head(self, features: Features, *, train: bool) -> Map:
        """Returns what is pooled for the classifier; here the last stage itself."""
        return features

    def outputs(self, images: Features, *, train: bool) -> dict[str, Array]:
        """Returns every output by its name. Under `jax.jit` only those that are used are computed.

        Args:
          images: Normalised, floating point.
          train: Use the batch's statistics and update the running ones (make the collection
            'batch_stats' mutable), and drop with the random stream 'dropout'.

        Returns:
          The feature maps 'stem', 'stage1', 'stage2', ...; 'pooled', the vector before the
          classifier, in float32; and 'logits', in float32, if the network has a classifier.
        """
        check_images(images, type(self).__name__)
        stem, values = self._stem(images.astype(self.dtype), train=train)
        outputs = {} if stem is None else {'stem': stem}
        for number in range(1, self.stage_count + 1):
            for block in getattr(self, f'stage{number}'):
                values = block(values, train=train)
            outputs[f'stage{number}'] = values
        pooled = global_average_pool(self._head(values, train=train))
        outputs['pooled'] = pooled
        if self.num_classes:
            outputs['logits'] = self.classifier(self.dropout(pooled, deterministic=not train))
        return outputs

    def __call__(
        self, images: Features, *, train: bool
    ) -> Float[Array, 'batch classes_or_features']:
        """Returns the logits, or the pooled features where `num_classes` is 0; see `outputs`."""
        outputs = self.outputs(images, train=train)
        return outputs['logits' if self.num_classes else 'pooled']


def stage_strides(
    strides: Sequence[int], stem_stride: int, output_stride: int | None
) -> Iterator[tuple[int, int, int]]:
    """Yields each stage's stride, and the dilation of its first block and of the others.

    A stage that would exceed `output_stride` keeps its size, and dilates its convolutions by what
    it does not stride; its first block still has the dilation before (torchvision's
    `replace_stride_with_dilation`, mmsegmentation's `contract_dilation`).

    Args:
      strides: Of the first block of each stage, without dilation.
      stem_stride: Image size over the size of the map that stage 1 reads.
      output_stride: Image size over the size of the last map; None as the strides make it.
    """
    reached, dilation = stem_stride, 1
    for stride in strides:
        before = dilation
        if output_stride is not None and reached * stride > output_stride:
            dilation, stride = dilation * stride, 1
        reached *= stride
        yield stride, before, dilation
