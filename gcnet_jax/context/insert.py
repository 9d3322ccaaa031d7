"""Puts a block after any submodule of any linen model, without editing that model.

The model runs as it is; a method interceptor hands the output of each submodule that the pattern
names to a block of its own. The block's variables lie among the submodule's, as
`<submodule>/<name>`: there it also works under `nn.remat`, `nn.scan` and `nn.vmap`, which hide a
submodule's parent. The model's own variables keep their names, shapes and initial values.
"""

import dataclasses
import fnmatch
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import errors as flax_errors

from gcnet_jax.errors import ConfigError

Path = tuple[str, ...]

MAX_PATHS_SHOWN = 50

# The block that runs now, so that no other insert looks for submodules inside it.
_running_block: ContextVar[Path] = ContextVar('running_block', default=())


def insert(model: nn.Module, pattern: str, block: nn.Module, *, name: str = 'context') -> nn.Module:
    """Returns `model` with a `block` of its own after every submodule whose path matches `pattern`.

    The result is called as the model is, by any of its methods, and can be inserted into again:
    where two blocks follow one submodule, the one inserted first comes first. A submodule that is
    called several times has one block, with shared parameters. The block gets what the submodule's
    `__call__` returns; under `nn.vmap` and `nn.scan` that is without the lifted axis.

        model = insert(resnet, 'layer[34]/*/conv3', GlobalContext(ratio=1 / 16))

    Args:
      model: Any linen module. It is not changed.
      pattern: Names of submodules from the model downward, joined by `/`, as in the tree of its
        parameters. `*`, `?` and `[..]` match within one name, `**` matches any number of names.
      block: A linen module that is called as `block(features)`, such as `GlobalContext()`.
      name: The block's variables are those of a submodule `name` of the module it follows.

    Raises:
      TypeError: `model` or `block` is not a linen module; or, when the result is called, a
        submodule's output is not a floating-point array `[batch, *spatial, channel]`.
      ConfigError: `pattern` or `name` cannot be one; or, when the result is called, no submodule
        matches, or one that matches has a submodule or a variable called `name`.
    """
    for role, module in (('model', model), ('block', block)):
        if not isinstance(module, nn.Module):
            found = f'the class {module.__name__}' if isinstance(module, type) else repr(module)
            raise TypeError(f'insert: {role} must be an instance of a linen Module, got {found}')
    if not isinstance(pattern, str) or not all(pattern.split('/')):
        raise ConfigError(
            f"insert: pattern must be names joined by '/', such as 'layer4/*/conv3', "
            f'got {pattern!r}'
        )
    if not isinstance(name, str) or not name or '/' in name:
        raise ConfigError(f"insert: name must be a word without '/', got {name!r}")
    return Inserted(_Parts(model, block), pattern, name)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Hides two modules from flax, which would bind them as submodules named after their fields."""

    model: nn.Module
    block: nn.Module


class Inserted(nn.Module):
    """A model and the block to run after some of its submodules; made by `insert`.

    It has the model's scope and forwards the model's methods. Its own are not linen methods
    (`nowrap`), so that neither `tabulate` nor captured intermediates show the model twice.
    """

    parts: _Parts
    pattern: str
    label: str

    def __post_init__(self):
        super().__post_init__()
        if self.scope is None:
            return
        model = self.parts.model
        # A model that was made in a compact method is bound to that method's module already.
        bound = model.scope is not None and model.scope.root is self.scope.root
        scope = model.scope if bound else self.scope
        # nn.jit looks for an earlier trace by the flags: it must not find one without these blocks.
        inserted = (self.pattern, self.label, self.parts.block)
        scope.flags = {**scope.flags, 'inserted': (*scope.flags.get('inserted', ()), inserted)}
        if not bound:
            model = model.copy(parent=scope, name=None)
        object.__setattr__(self, '_model', model)
        object.__setattr__(
            self, '_places', _Places(model.path, self.parts.block, self.pattern, self.label)
        )

    @nn.nowrap
    def __call__(self, *args, **kwargs):
        return self._run('__call__', args, kwargs)

    @nn.nowrap
    def __getattr__(self, name: str):
        if name.startswith('_') or name == 'parts':
            return super().__getattr__(name)
        if not inspect.ismethod(getattr(self.parts.model, name, None)):
            raise AttributeError(
                f'{type(self.parts.model).__name__} with inserted blocks has no method {name!r}; '
                'only methods are forwarded, anything else is to be read from the model itself'
            )

        def forward(inserted, *args, **kwargs):
            return inserted._run(name, args, kwargs)

        return types.MethodType(forward, self)

    @nn.nowrap
    def _call_wrapped_method(self, fun, args, kwargs):
        """Runs a method of the model's class, called on this by `apply(method=Model.encode)`."""
        return self._run(fun.__name__, args, kwargs)

    @nn.nowrap
    def _run(self, method: str, args: tuple, kwargs: Mapping[str, Any]):
        if self.scope is None:
            raise flax_errors.CallCompactUnboundModuleError()
        with nn.intercept_methods(self._places):
            output = getattr(self._model, method)(*args, **kwargs)
        self._places.check_matched(self._model)
        return output


class _Places:
    """The interceptor of one bound model: finds its places, and holds the block of each."""

    def __init__(self, root: Path, block: nn.Module, pattern: str, label: str):
        self.root = root
        self.block = block
        self.pattern = tuple(pattern.split('/'))
        self.label = label
        self.called: dict[Path, None] = {}  # An ordered set.
        self.running: set[Path] = set()

    def __call__(self, method: Callable, args: tuple, kwargs: Mapping[str, Any], context):
        path = self._path(context.module)
        if not path or context.method_name != '__call__':
            return method(*args, **kwargs)
        self.called[path] = None
        # super().__call__ comes by a second time, under the same path.
        if path in self.running or not _matches(path, self.pattern):
            return method(*args, **kwargs)
        self.running.add(path)
        try:
            output = method(*args, **kwargs)
        finally:
            self.running.remove(path)
        return self._run_block(context.module, path, output)

    def _path(self, module: nn.Module) -> Path | None:
        """Returns the path from the model's root, None for what is not the model's own."""
        depth = len(self.root)
        if module.scope is None or module.path[:depth] != self.root:
            return None
        if len(_running_block.get()) > depth:  # An inserted block, ours or another's, is running.
            return None
        return module.path[depth:]

    def _run_block(self, module: nn.Module, path: Path, output: Any):
        dtype = getattr(output, 'dtype', None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or output.ndim < 3:
            found = f'{type(output).__name__}' if dtype is None else f'{dtype}{list(output.shape)}'
            raise TypeError(
                f'insert: the output of {"/".join(path)!r} must be a floating-point array '
                f'[batch, *spatial, channel], got {found}; choose a pattern that leaves it out'
            )
        block = self._block(module, path)
        token = _running_block.set(block.path)
        try:
            return block(output)
        finally:
            _running_block.reset(token)

    def _block(self, module: nn.Module, path: Path) -> nn.Module:
        """Returns the block of `module`, bound in its scope; the same one at every call."""
        blocks = vars(module).setdefault('_inserted_blocks', {})
        if self not in blocks:
            if module.scope.name_reserved(self.label):
                raise ConfigError(
                    f'insert: {"/".join(path)!r} already has {self.label!r}, from the model or an '
                    f'earlier insert; give this insert another name than {self.label!r}'
                )
            blocks[self] = self.block.copy(parent=module.scope.push(self.label), name=None)
        return blocks[self]

    def check_matched(self, model: nn.Module) -> None:
        """Raises ConfigError if no submodule matches, be it one that was not called this time."""
        if any(_matches(path, self.pattern) for path in self.called):
            return
        for path in _paths(model.variables):
            if path[-1] == self.label and _matches(path[:-1], self.pattern):
                return
            if not model.is_initializing() and _matches(path, self.pattern):
                return
        raise ConfigError(
            f'insert: no submodule that was called matches {"/".join(self.pattern)!r}; '
            f'there are: {_listing(self.called)}'
        )


def _matches(path: Path, pattern: Path) -> bool:
    if not pattern:
        return not path
    if pattern[0] == '**':
        return any(_matches(path[skip:], pattern[1:]) for skip in range(len(path) + 1))
    return (
        bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
    )


def _paths(variables: Mapping[str, Any]) -> Iterator[Path]:
    """The paths of all modules that hold variables."""

    def walk(tree: Any, path: Path) -> Iterator[Path]:
        if path:
            yield path
        for name, child in tree.items():
            if isinstance(child, Mapping):
                yield from walk(child, (*path, name))

    for collection in variables.values():
        yield from walk(collection, ())


def _listing(paths: Iterable[Path]) -> str:
    names = ['/'.join(path) for path in paths]
    shown = ', '.join(names[:MAX_PATHS_SHOWN]) or 'none'
    return f'{shown}, ... ({len(names)} in all)' if len(names) > MAX_PATHS_SHOWN else shown
