"""Keeps what a detector computes of each image by itself on the device that holds the image."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from gcnet_jax.models.mask_rcnn import PER_IMAGE, MaskRCNN


def split_by_image(mesh: Mesh) -> Callable:
    """Returns a method interceptor under which every device computes its own images' boxes.

    Choosing boxes and sampling features at them are sorts, gathers and loops, which the partitioner
    does not split: left alone, it sends all feature maps to all devices, and each device computes
    the boxes of the whole batch. The results are the same.

    Args:
      mesh: The batch is split over its axes `data` and `fsdp`.
    """
    rows = PartitionSpec(('data', 'fsdp'))

    def intercept(method, arguments, keywords, context):
        is_split = mesh.shape['data'] * mesh.shape['fsdp'] > 1
        of_detector = isinstance(context.module, MaskRCNN)
        if not (is_split and of_detector and context.method_name in PER_IMAGE):
            return method(*arguments, **keywords)

        def compute(*arguments):
            return method(*arguments, **keywords)

        split = jax.shard_map(compute, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        return split(*arguments)

    return intercept
