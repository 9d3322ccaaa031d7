"""Parameters and multiply-adds of any linen model, and what its context blocks cost."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from gcnet_jax.models.placement import BLOCKS
from gcnet_jax.ops.convolution import convolution
from gcnet_jax.ops.primitives import inner_jaxprs


@dataclasses.dataclass(frozen=True)
class Cost:
    """Trained parameters, and multiply-adds for the inputs given."""

    parameters: int
    multiply_adds: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a model costs for one input.

    Attributes:
      total: The whole model.
      context: Each context block, by the path of its parameters.
      parts: Trained parameters of each part at the top of the parameter tree.
    """

    total: Cost
    context: dict[str, Cost]
    parts: dict[str, int]

    @property
    def context_total(self) -> Cost:
        """The sum over all context blocks."""
        costs = self.context.values()
        return Cost(sum(c.parameters for c in costs), sum(c.multiply_adds for c in costs))


def summarize(model: nn.Module, *inputs: Any, **options: Any) -> Summary:
    """Measures a model without running it.

    Args:
      model: Any linen module.
      *inputs: Its inputs; `jax.ShapeDtypeStruct` will do.
      **options: Keyword arguments of its call, such as `train=False`.
    """
    blocks: dict[str, tuple[nn.Module, list[jax.ShapeDtypeStruct]]] = {}

    def watch(call: Callable, args: tuple, keywords: dict, context: nn.module.InterceptorContext):
        module = context.module
        if context.method_name == '__call__' and isinstance(module, tuple(BLOCKS.values())):
            shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in args]
            blocks['/'.join(module.path)] = (module.clone(parent=None, name=None), shapes)
        return call(*args, **keywords)

    with nn.intercept_methods(watch):
        variables = _variable_shapes(model, *inputs, **options)
    return Summary(
        total=_cost(model, variables, *inputs, **options),
        context={
            path: _cost(module, _variable_shapes(module, *shapes), *shapes)
            for path, (module, shapes) in blocks.items()
        },
        parts={name: count_parameters(part) for name, part in variables['params'].items()},
    )


def count_parameters(params: Any) -> int:
    """Number of elements of all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _variable_shapes(model: nn.Module, *inputs: Any, **options: Any) -> Any:
    def init(*values):
        return model.init(jax.random.key(0), *values, **options)

    return jax.eval_shape(init, *inputs)


def _cost(model: nn.Module, variables: Any, *inputs: Any, **options: Any) -> Cost:
    def apply(variables, *values):
        return model.apply(variables, *values, **options)

    closed = jax.make_jaxpr(apply)(variables, *inputs)
    return Cost(count_parameters(variables['params']), _multiply_adds(closed.jaxpr))


def _multiply_adds(jaxpr: Any) -> int:
    """Adds up convolutions and matrix products; everything else is element-wise."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            left, output = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += math.prod(output) * math.prod(left[axis] for axis in contracted)
        elif equation.primitive.name == 'conv_general_dilated':
            kernel = equation.invars[1].aval.shape
            out_axis = equation.params['dimension_numbers'].rhs_spec[0]
            output = equation.outvars[0].aval.shape
            total += math.prod(output) * math.prod(kernel) // kernel[out_axis]
        elif equation.primitive is convolution:
            kernel, output = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            total += math.prod(output) * math.prod(kernel[:3])
        else:
            repeats = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
            total += repeats * sum(map(_multiply_adds, inner_jaxprs(equation.params)))
    return total


def format_summary(name: str, input_shape: tuple[int, ...], summary: Summary) -> str:
    """Lays a summary out as text: parts, total, and the context's share."""
    total, context = summary.total, summary.context_total
    size = ' x '.join(map(str, input_shape[1:]))
    lines = [f'{name}, one image of {size}', '']
    width = max(len('multiply-adds'), *(len(part) for part in summary.parts))
    lines += [f'  {part:<{width}}  {count:>12,}' for part, count in summary.parts.items()]
    lines += [
        '',
        f'  {"parameters":<{width}}  {total.parameters:>12,}',
        f'  {"multiply-adds":<{width}}  {total.multiply_adds / 1e9:>12.3f} G',
        '',
        f'  {len(summary.context)} context blocks',
    ]
    if summary.context:
        plain = total.parameters - context.parameters
        lines += [
            f'  {"parameters":<{width}}  {context.parameters:>12,}'
            f'  (+{context.parameters / plain:.2%} of the network without them)',
            f'  {"multiply-adds":<{width}}  {context.multiply_adds / 1e9:>12.3f} G'
            f'  (+{context.multiply_adds / (total.multiply_adds - context.multiply_adds):.2%})',
        ]
    return '\n'.join(lines)
