"""Finds the state dict in what a training program saved, and the plain values beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcnet_jax.errors import CheckpointError, one_line
from gcnet_jax.porting.pickled_values import OtherTensor, Record, StoredTensor
from gcnet_jax.porting.plain_values import plain_values
from gcnet_jax.porting.tensors import LazyTensors

WEIGHTS = ('auto', 'model', 'ema')

# The keys under which timm, torchvision, mmengine, Lightning and others put their tensors.
MODEL_WRAPPERS = (
    'state_dict',
    'model',
    'model_state_dict',
    'model_state',
    'net',
    'network',
    'params',
    'weights',
    'module',
)
EMA_WRAPPERS = (
    'state_dict_ema',
    'model_ema',
    'ema_state_dict',
    'model_ema_state_dict',
    'ema_model',
    'params_ema',
    'ema',
)

# What DataParallel, torch.compile and averaged copies put before every name.
WHOLE_PREFIXES = ('module.', '_orig_mod.')

# The attributes in which Lightning modules and other trainers keep the network and its average.
# Not 'backbone.' or 'decode_head.': those are names of the networks of mmdetection and others.
MODEL_PREFIXES = ('model.', 'net.', 'network.', '_model.', 'student.', 'encoder.', 'resnet.')
EMA_PREFIXES = ('ema_model.', 'model_ema.', 'ema.', 'teacher.')
# These tell a wrapper even where other names stand beside theirs.
_SURE_PREFIXES = MODEL_PREFIXES[:5]

# How many steps an average has taken: torch's and mmengine's name.
AVERAGE_COUNTERS = ('n_averaged', 'steps')


def find_state_dict(
    path: Path, loaded: Any, weights: str
) -> tuple[str, dict[Any, Any], dict[str, Any]]:
    """Finds the state dict that was asked for.

    Args:
      path: The file, for errors.
      loaded: What its pickle holds.
      weights: One of `WEIGHTS`.

    Returns:
      Its key ('' where it has none), itself, and the plain values beside it.

    Raises:
      CheckpointError: There is none, or not the one that was asked for.
    """
    if not isinstance(loaded, dict):
        kind = loaded.of if isinstance(loaded, Record) else type(loaded).__name__
        raise CheckpointError(
            f'{one_line(path)} is not a state dict: it holds a {one_line(kind, 60)}; save '
            "model.state_dict() with torch.save, or {'state_dict': model.state_dict()}"
        )
    averaged, raw = _wrappers(loaded)
    allowed = {'ema': averaged, 'model': raw, 'auto': (*averaged, *raw)}[weights]
    chosen = next((key for key in allowed if _holds_tensors(loaded.get(key))), None)
    present = [key for key in (*averaged, *raw) if _holds_tensors(loaded.get(key))]
    others = [key for key in loaded if isinstance(key, str) and _holds_tensors(loaded[key])]
    if chosen is None and weights == 'ema':
        # An average may lie among the names of one state dict, as Lightning modules have it.
        chosen = next((key for key in raw if _has_average(loaded.get(key))), None)
    if chosen is None and not present and (not loaded or any(map(_is_tensor, loaded.values()))):
        if weights == 'ema' and not _has_average(loaded):
            raise CheckpointError(
                f'{one_line(path)} holds no ema weights; it holds: one state dict without a '
                "wrapper; use weights='auto'"
            )
        return '', loaded, {}
    if chosen is None and weights != 'ema' and not present and len(others) == 1:
        chosen = others[0]
    if chosen is None:
        raise CheckpointError(_no_weights(path, loaded, weights, present, others))
    beside = {key: value for key, value in loaded.items() if key != chosen}
    return chosen, loaded[chosen], plain_values(beside)


def _wrappers(loaded: Mapping[Any, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of averaged and of raw weights, the likeliest first.

    mmengine's hook swaps the two when it saves: its `state_dict` is the average.
    """
    averaged, raw = EMA_WRAPPERS, MODEL_WRAPPERS
    swapped = 'ema_state_dict'
    if _is_mmengine(loaded) and all(_holds_tensors(loaded.get(k)) for k in (swapped, 'state_dict')):
        return ('state_dict',), (swapped,)
    return averaged, raw


def _is_mmengine(loaded: Mapping[Any, Any]) -> bool:
    meta, average = loaded.get('meta'), loaded.get('ema_state_dict')
    return (
        'message_hub' in loaded
        or (isinstance(meta, dict) and 'mmengine_version' in meta)
        or (isinstance(average, dict) and 'steps' in average)
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (StoredTensor, OtherTensor))


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(map(_is_tensor, value.values()))


def _has_average(value: Any) -> bool:
    return _holds_tensors(value) and any(
        isinstance(name, str) and name.startswith(EMA_PREFIXES) for name in value
    )


def _no_weights(
    path: Path, loaded: Mapping[Any, Any], weights: str, present: list[str], others: list[str]
) -> str:
    if weights == 'ema' or present:
        return (
            f'{one_line(path)} holds no {weights} weights; it holds: '
            f"{', '.join(present) or _shown(others) or 'no state dict'}; use weights='auto'"
        )
    if others:
        return (
            f'{one_line(path)} holds several state dicts and none is called '
            f'{" or ".join(MODEL_WRAPPERS[:2])}: {_shown(others)}; save the one to read alone, '
            f"torch.save({{'state_dict': torch.load(FILE)[{one_line(others[0], 40)!r}]}}, NEW)"
        )
    found = [f'{one_line(key, 60)}: {_kind(value)}' for key, value in loaded.items()]
    return (
        f'{one_line(path)} is not a state dict: it holds {", ".join(found[:4])}'
        f'{" and more" if len(found) > 4 else ""} among 0 tensors'
    )


def _kind(value: Any) -> str:
    return one_line(value.of, 60) if isinstance(value, Record) else type(value).__name__


def _shown(names: list[str]) -> str:
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return ', '.join(one_line(name, 60) for name in names[:4]) + more


# Prefixes -----------------------------------------------------------------------------------------


def take_prefixes_off(path: Path, tensors: LazyTensors, weights: str) -> tuple[LazyTensors, str]:
    """Takes off what stands before every name of the network: (the tensors, what was taken off).

    Raises:
      CheckpointError: Only some of the names carry the prefix of a wrapper, and the others are
        weights too.
    """
    taken = ''
    while len(taken) < 100:
        tensors, part = _one_prefix(path, tensors, weights)
        if not part:
            return tensors, taken
        taken += part
    return tensors, taken


def _one_prefix(path: Path, tensors: LazyTensors, weights: str) -> tuple[LazyTensors, str]:
    # An average keeps its count beside the `module.` names.
    names = [name for name in tensors if name not in AVERAGE_COUNTERS]
    whole = (*WHOLE_PREFIXES, *MODEL_PREFIXES, *EMA_PREFIXES)
    for part in whole:
        if names and all(name.startswith(part) for name in names):
            return _without_steps(tensors).without_prefix(part), part
    for part in EMA_PREFIXES:
        is_copy = _is_copy(names, part)
        if weights == 'model' and is_copy:
            tensors = tensors.leaving(part)
            names = [name for name in names if not name.startswith(part)]
        elif is_copy or (weights == 'ema' and any(name.startswith(part) for name in names)):
            return tensors.only(part), part
    for part in _SURE_PREFIXES:
        inside = [name for name in names if name.startswith(part)]
        beside = [name for name in names if not name.startswith((part, *EMA_PREFIXES))]
        if not inside:
            continue
        weights_beside = [name for name in beside if _is_weight(name, tensors)]
        if not weights_beside:
            return tensors.only(part), part
        raise CheckpointError(
            f'{one_line(path)}: {len(inside)} names start with {part!r} and others do not, such as '
            f'{one_line(weights_beside[0], 80)}; save those of the network alone, '
            f"{{k.removeprefix('{part}'): v for k, v in state_dict.items() "
            f"if k.startswith('{part}')}}"
        )
    return tensors, ''


def _without_steps(tensors: LazyTensors) -> LazyTensors:
    """Leaves mmengine's count of an average's steps: a single number beside the `module.` names."""
    return LazyTensors({k: v for k, v in tensors.entries.items() if k != AVERAGE_COUNTERS[1]})


def _is_copy(names: list[str], part: str) -> bool:
    """Whether the names with an average's prefix are those of the network beside it."""
    inside = {
        name.removeprefix(part).removeprefix('module.') for name in names if name.startswith(part)
    }
    others = {name for name in names if not name.startswith(part)}
    for prefix in (*_SURE_PREFIXES, ''):
        beside = {name.removeprefix(prefix) for name in others if name.startswith(prefix)}
        if beside and inside and beside <= inside:
            return True
    return False


def _is_weight(name: str, tensors: LazyTensors) -> bool:
    """Whether a name beside the network's could belong to a network: not of a loss or a metric."""
    root = name.partition('.')[0].lower()
    is_other = any(part in root for part in ('loss', 'criterion', 'metric', 'acc', 'auroc', 'f1'))
    is_floating = 'float' in tensors.dtypes[name]
    return not is_other and is_floating and len(tensors.shapes[name]) > 1
