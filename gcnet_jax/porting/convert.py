"""Converts weights between PyTorch and here: everything has its place, or nothing is done."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gcnet_jax.errors import CheckpointError
from gcnet_jax.porting.families import is_classifier, is_context, why_unsupported
from gcnet_jax.porting.families.rules import Family
from gcnet_jax.porting.files import LazyTensors
from gcnet_jax.porting.names import Pairing, pair_names

SHOWN = 6
COUNTER = 'num_batches_tracked'
COLLECTIONS = ('params', 'batch_stats')


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every tensor.

    Attributes:
      family: The library whose names were read or written.
      ported: Number of tensors that were converted.
      values: Number of values in them.
      left: Names that were left where they were, by the reason why.
      initialised: Paths here that are newly initialised, not ported.
      warnings: What the user should know; empty where all is well.
      wrapper: The key of the file under which the tensors lay, such as 'state_dict_ema'.
    """

    family: str
    ported: int
    values: int
    left: Mapping[str, tuple[str, ...]]
    initialised: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    wrapper: str = ''

    def lines(self) -> list[str]:
        """The report as text, a line a fact."""
        place = f' of {self.wrapper}' if self.wrapper else ''
        lines = [f'{self.family}: {self.ported} tensors{place}, {self.values:,} values, ported']
        for reason, names in self.left.items():
            lines.append(f'left {len(names)}: {reason} ({_shown(names, 2)})')
        if self.initialised:
            modules = sorted(
                {path.split('/', 1)[1].rpartition('/')[0] for path in self.initialised}
            )
            lines.append(f'newly initialised {len(self.initialised)}: {_shown(modules, SHOWN)}')
        return lines + [f'warning: {warning}' for warning in self.warnings]


def variable_shapes(model: nn.Module, channels: int = 3) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of every leaf by its path, such as 'params/stem_conv/kernel'.

    Nothing is computed. `channels` is the width of a context block's input; a network reads 3.
    """
    return jax.eval_shape(_initialiser(model, channels), jax.random.key(0))


def _initialiser(model: nn.Module, channels: int) -> Callable[[jax.Array], dict[str, jax.Array]]:
    options = {'train': False} if hasattr(model, 'outputs') else {}

    def initialise(key):
        variables = model.init(key, jnp.zeros((1, 64, 64, channels)), **options)
        kept = {name: variables[name] for name in COLLECTIONS if name in variables}
        return flax.traverse_util.flatten_dict(kept, sep='/')

    return initialise


def from_torch(
    tensors: LazyTensors,
    family: Family,
    model: nn.Module,
    *,
    drop_classifier: bool = False,
    allow_nonfinite: bool = False,
    seed: int = 0,
    channels: int = 3,
) -> tuple[dict[str, Any], Report]:
    """Converts the tensors of a file to the variables of a network.

    Args:
      tensors: The file's.
      family: Whose names they have.
      model: The network.
      drop_classifier: Leave the file's classifier and initialise one of the network's size.
      allow_nonfinite: Report weights that no network can use, instead of refusing them.
      seed: For what is newly initialised.
      channels: Width of the input where `model` is a context block.

    Returns:
      `{'params': ..., 'batch_stats': ...}` of numpy arrays, and the report.

    Raises:
      CheckpointError: A tensor without a place, a place without a tensor, or a shape that does not
        fit. Lists all of them, with the likeliest reason.
    """
    targets = variable_shapes(model, channels)
    wanted, new, left = _plan(tensors.shapes, family, targets, drop_classifier)
    flat, damaged = {}, {}
    for name, pairing in wanted.items():
        flat[pairing.ours] = _converted(tensors[name], pairing.leaf.to_ours)
        values = flat[pairing.ours]
        bad = ~np.isfinite(values)
        if pairing.leaf.theirs == 'running_var':
            bad |= values < 0
        if bad.any():
            damaged[name] = int(np.count_nonzero(bad))
    if damaged and not allow_nonfinite:
        raise CheckpointError(
            f'{_warnings(damaged)[0]}; a network would answer nonsense without a sign of it. Take '
            'another file, or port this one all the same with --allow-nonfinite'
        )
    report = Report(
        family.library,
        ported=len(flat),
        values=sum(array.size for array in flat.values()),
        left=left,
        initialised=tuple(sorted(new)),
        warnings=_warnings(damaged),
    )
    flat |= _new_values(model, new, seed, channels)
    return flax.traverse_util.unflatten_dict(
        {path: flat[path] for path in targets}, sep='/'
    ), report


def _plan(
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    drop_classifier: bool,
) -> tuple[dict[str, Pairing], list[str], dict[str, tuple[str, ...]]]:
    """Decides about every tensor and every leaf.

    Returns:
      The pairings by the names of the file, the leaves that are newly initialised, and the names
      that are left by the reason why.
    """
    prefix = family.prefix if any(name.startswith(family.prefix) for name in shapes) else ''
    pairings, nameless = pair_names(family, targets, prefix)
    wanted = {pairing.theirs: pairing for pairing in pairings}
    if len(wanted) < len(pairings):
        raise CheckpointError(
            f'{family.library} has one name for two context blocks of this network; '
            'it can hold one in each residual block'
        )
    new = [path for path in nameless if re.fullmatch(family.may_be_new, path)]
    nameless = [path for path in nameless if path not in new]
    dropped = []
    for name, pairing in list(wanted.items()):
        is_dropped = drop_classifier and family.is_classifier(name.removeprefix(prefix))
        if is_dropped or (name not in shapes and re.fullmatch(family.may_be_new, pairing.ours)):
            del wanted[name]
            new.append(pairing.ours)
            dropped += [name] if is_dropped and name in shapes else []
    if drop_classifier and not any(family.is_classifier(p.theirs) for p in pairings):
        dropped += [name for name in shapes if family.is_classifier(name)]
    left = _left(family, [name for name in shapes if name not in wanted], dropped)
    known = {name for names in left.values() for name in names}
    expected = {name: _their_shape(pair, targets[pair.ours].shape) for name, pair in wanted.items()}
    difference = Difference(
        missing=[name for name in wanted if name not in shapes],
        extra=[name for name in shapes if name not in wanted and name not in known],
        misshapen=[
            (name, shapes[name], shape)
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
        nameless=nameless,
    )
    if difference:
        raise CheckpointError(difference.message(family))
    return wanted, new, left


def to_torch_arrays(
    variables: Mapping[str, Any], family: Family
) -> tuple[dict[str, np.ndarray], Report]:
    """Converts variables to the tensors that `family` would save, by its names.

    Raises:
      CheckpointError: A leaf that the library has no name for.
    """
    kept = {name: variables[name] for name in COLLECTIONS if name in variables}
    flat = flax.traverse_util.flatten_dict(kept, sep='/')
    pairings, nameless = pair_names(family, flat, family.prefix)
    lost = [path for path in nameless if re.fullmatch(family.may_be_lost, path)]
    lost += [p.ours for p in pairings if re.fullmatch(family.may_be_lost, p.ours)]
    pairings = [pairing for pairing in pairings if pairing.ours not in lost]
    unknown = [path for path in nameless if path not in lost]
    if unknown:
        raise CheckpointError(
            f'{family.library} has no names for {len(unknown)} leaves of this network: '
            f'{_shown(unknown, SHOWN)}; {_no_names_reason(unknown)}'
        )
    arrays: dict[str, np.ndarray] = {}
    for pairing in pairings:
        name = pairing.theirs
        arrays[name] = _converted(np.asarray(flat[pairing.ours]), pairing.leaf.to_theirs)
        if pairing.leaf.theirs == 'running_var':
            counter = name.removesuffix('running_var') + COUNTER
            arrays[counter] = np.zeros((), np.int64)
    report = Report(
        family.library,
        ported=len(pairings),
        values=sum(flat[pairing.ours].size for pairing in pairings),
        left={f'{family.library} has no place for it': tuple(lost)} if lost else {},
    )
    return arrays, report


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a file and a network disagree: names in the file, names that it should have."""

    missing: Sequence[str]
    extra: Sequence[str]
    misshapen: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]
    nameless: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.misshapen or self.nameless)

    def message(self, family: Family) -> str:
        """All of it in one line, and the likeliest reason."""
        parts = []
        if self.misshapen:
            shapes = [f'{n} is {list(got)}, not {list(want)}' for n, got, want in self.misshapen]
            parts.append(f'{len(shapes)} of another shape: {_shown(shapes, SHOWN)}')
        if self.missing:
            parts.append(f'{len(self.missing)} missing in the file: {_shown(self.missing, SHOWN)}')
        if self.extra:
            parts.append(f'{len(self.extra)} without a place: {_shown(self.extra, SHOWN)}')
        if self.nameless:
            parts.append(
                f'{len(self.nameless)} of the network that {family.library} does not have: '
                f'{_shown(self.nameless, SHOWN)}'
            )
        return f'the file does not fit the network: {"; ".join(parts)}. {self._reason()}'

    def _reason(self) -> str:
        misshapen = [name for name, _, _ in self.misshapen]
        only_shapes = not (self.missing or self.extra or self.nameless)
        if only_shapes and all(is_classifier(name) for name in misshapen):
            _, got, want = self.misshapen[0]
            return (
                f'Most likely the number of classes differs: give num_classes={got[0]} to keep the '
                f'classifier, or drop it (--drop-classifier) to start one of {want[0]}'
            )
        channels = [(got[1], want[1]) for _, got, want in self.misshapen if want[1:2] == (3,)]
        if channels and all(len(got) == 4 for _, got, _ in self.misshapen):
            return (
                f'Most likely it reads images of {channels[0][0]} channels; networks here read '
                f'{channels[0][1]}: take weights for RGB images'
            )
        unsupported = why_unsupported(self.extra)
        if unsupported:
            return f'Most likely {unsupported}'
        if only_shapes and all(is_context(name) for name in misshapen):
            return "Most likely the context blocks' ratio differs: give the ratio of the file"
        if self.missing and all(is_classifier(n) for n in self.missing) and not misshapen:
            return 'Most likely the file is a backbone: drop the classifier (--drop-classifier)'
        if self.extra and all(is_classifier(n) for n in self.extra) and not misshapen:
            return (
                'Most likely the network has num_classes=0: drop the classifier (--drop-classifier)'
            )
        if self.extra and all(is_context(n) for n in self.extra) and not self.missing:
            return 'Most likely the network lacks the context blocks of the file: name a GC network'
        if self.missing and all(is_context(n) for n in self.missing):
            return 'Most likely the file has no context blocks there: name the plain network'
        few = len(self.missing) + len(self.extra) + len(self.misshapen) <= SHOWN
        if few and not self.nameless:
            return 'Most likely the file was changed or is incomplete'
        return (
            'Most likely it is the file of another network: leave --model out to have it recognised'
        )


def _no_names_reason(paths: Sequence[str]) -> str:
    if all('/context_' in path for path in paths):
        return "it has no context blocks there: choose mmdetection for the paper's networks"
    return 'choose the library that this kind of network comes from'


def _left(
    family: Family, names: Sequence[str], dropped: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The names that are no part of the network, by the reason why."""
    left: dict[str, list[str]] = {'the classifier, dropped as asked': list(dropped)}
    for name in names:
        for pattern, reason in family.left.items():
            if name not in dropped and re.fullmatch(pattern, name):
                left.setdefault(reason, []).append(name)
                break
    return {reason: tuple(found) for reason, found in left.items() if found}


def _their_shape(pairing: Pairing, shape: tuple[int, ...]) -> tuple[int, ...]:
    return pairing.leaf.to_theirs(np.broadcast_to(np.float32(0), shape)).shape


def _converted(array: np.ndarray, layout: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A new array in memory of its own, whatever the source is mapped to."""
    return np.array(layout(array), dtype=np.float32, order='C')


def _warnings(damaged: Mapping[str, int]) -> tuple[str, ...]:
    if not damaged:
        return ()
    total, names = sum(damaged.values()), list(damaged)
    bad = f'{total} values are NaN, infinite or negative variances'
    return (f'{bad}, in {len(names)} tensors: {_shown(names, SHOWN)}',)


def _new_values(
    model: nn.Module, paths: Sequence[str], seed: int, channels: int
) -> dict[str, np.ndarray]:
    """Initialises the named leaves; the compiler drops the work for all the others."""
    if not paths:
        return {}
    initialise = _initialiser(model, channels)

    def wanted(key):
        flat = initialise(key)
        return {path: flat[path] for path in paths}

    # It runs once: compile in a hurry.
    options = {'xla_backend_optimization_level': 0}
    key = jax.random.key(seed)
    compiled = jax.jit(wanted).lower(key).compile(compiler_options=options)
    return {path: np.asarray(value) for path, value in compiled(key).items()}


def _shown(names: Sequence[str], limit: int) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
