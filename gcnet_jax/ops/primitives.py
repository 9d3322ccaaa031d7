"""Operations that are JAX primitives of our own, computed in the form that a device does best.

As primitives they have every rule that JAX's own have: forward and reverse differentiation to any
order, `vmap`, `jit`, `remat`, export for several platforms. A function's text is the same whoever
traces it; which form of an operation is computed is decided where it is lowered, by the platform
that is compiled for.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jaxtyping import Array

# What `standard_primitives` puts in the place of each primitive.
_STANDARD: dict[Primitive, Callable] = {}


def make_primitive(
    name: str,
    plain: Callable,
    cpu: Callable,
    *,
    batched: tuple[int, ...] = (),
    standard: Callable | None = None,
) -> Primitive:
    """Makes a primitive of one output; its derivatives are still to be defined.

    Args:
      name: Its name in a jaxpr.
      plain: The operation in JAX's own primitives: a function of arrays, and of keyword arguments
        that are static. It decides shapes and types, and is computed on every device but a CPU.
      cpu: The same operation as a CPU does it best.
      batched: Which arrays are batches, `[batch, ...]`, of rows that do not meet in the output,
        which is a batch too.
      standard: What `standard_primitives` takes; `plain` if not given.
    """
    primitive = Primitive(name)

    def compute(*arrays: Array, **options: Any) -> Array:
        forms = {'cpu': partial(cpu, **options), 'default': partial(plain, **options)}
        return jax.lax.platform_dependent(*arrays, **forms)

    @cache
    def compiled(**options: Any) -> Callable:
        return jax.jit(partial(compute, **options))

    def output(*inputs: Any, **options: Any) -> Any:
        return jax.make_jaxpr(partial(plain, **options))(*inputs).out_avals[0]

    def mapped(arrays: Sequence[Array], axes: Sequence[int | None], **options: Any):
        size, *_ = (x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
        if any(axis is not None and place not in batched for place, axis in enumerate(axes)):
            return jax.vmap(partial(compute, **options), tuple(axes))(*arrays), 0
        arrays = [
            _join_batch(array, axis, size) if place in batched else array
            for place, (array, axis) in enumerate(zip(arrays, axes, strict=True))
        ]
        joined = primitive.bind(*arrays, **options)
        return joined.reshape(size, joined.shape[0] // size, *joined.shape[1:]), 0

    primitive.def_impl(lambda *arrays, **options: compiled(**options)(*arrays))
    primitive.def_abstract_eval(output)
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))
    batching.primitive_batchers[primitive] = mapped
    _STANDARD[primitive] = standard or plain
    return primitive


def _join_batch(array: Array, axis: int | None, size: int) -> Array:
    """Makes one batch of the batches along an axis; the same one `size` times if that is None."""
    if axis is None:
        array = jnp.broadcast_to(array, (size, *array.shape))
    else:
        array = jnp.moveaxis(array, axis, 0)
    return array.reshape(size * array.shape[1], *array.shape[2:])


def standard_primitives(function: Callable) -> Callable:
    """Returns the same function in JAX's own primitives only, for converters that know no others.

        jax2onnx.to_onnx(standard_primitives(lambda x: model.apply(variables, x, train=False)), ...)

    Args:
      function: Of positional arguments that are trees of arrays.
    """

    def converted(*arguments: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        outputs = jaxpr_as_fun(_convert(closed))(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return converted


def _convert(value: Any) -> Any:
    """Converts jaxprs, alone or in a tuple; returns anything else as it is."""
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=_convert(value.jaxpr))
    if isinstance(value, Jaxpr):
        return value.replace(eqns=[_convert_equation(equation) for equation in value.eqns])
    return tuple(map(_convert, value)) if type(value) is tuple else value


def _convert_equation(equation: JaxprEqn) -> JaxprEqn:
    form = _STANDARD.get(equation.primitive)
    if form is None:
        return equation.replace(params={n: _convert(v) for n, v in equation.params.items()})
    call = jax.jit(partial(form, **equation.params))
    (new,) = jax.make_jaxpr(call)(*(variable.aval for variable in equation.invars)).eqns
    return new.replace(invars=equation.invars, outvars=equation.outvars)


def inner_jaxprs(options: dict[str, Any]) -> list[Any]:
    """Returns the bodies of a call, a loop or a branch, from an equation's parameters."""
    values = [
        item
        for value in options.values()
        for item in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    return [getattr(item, 'jaxpr', item) for item in values if hasattr(item, 'eqns')]
