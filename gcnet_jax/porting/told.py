"""What a file of mmdetection or mmsegmentation says about itself, beside its tensors.

Its name and the config that it was trained with, as text: nothing in it is run.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gcnet_jax.errors import CheckpointError, one_line

NUMBER = r'\d+\.?\d*'
_OPEN, _CLOSE = '([{', ')]}'
# Limits of the groups of settings that are looked at: a text of a stranger may open many.
_MAX_GROUPS, _MAX_GROUP = 8, 20_000


def refuse_contradictions(
    path: Path, sources: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]
) -> None:
    """Refuses a file whose name or config is of another network than its tensors.

    Args:
      path: The file.
      sources: What each source, such as 'name', says.
      found: What the tensors say. Only what is in both is compared.

    Raises:
      CheckpointError: Says both.
    """
    for source, told in sources.items():
        wrong = [key for key, value in told.items() if key in found and value != found[key]]
        if wrong:
            raise CheckpointError(
                f'{one_line(path)}: its {source} says {listed(told, wrong)}, and its tensors say '
                f'{listed(found, wrong)}: the file is mislabelled or was replaced; download it '
                'again, or load it regardless with --ignore-architecture'
            )


def listed(values: Mapping[str, Any], keys: list[str]) -> str:
    """Some of the values with their names, for errors."""
    return ', '.join(f'{key} {one_line(str(values[key]), 80)}' for key in keys)


def config_texts(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Yields the configs in a file as text.

    mmcv writes 'config', mmengine 'cfg': the text of the file, or its settings.
    """
    meta = metadata.get('meta')
    for place in (meta if isinstance(meta, Mapping) else {}, metadata):
        for config in (place.get('config'), place.get('cfg')):
            if config:
                yield config if isinstance(config, str) else repr(config)


def setting(name: str, value: str) -> str:
    """The pattern of a setting in Python (`depth=50`) or JSON (`"depth": 50`)."""
    return rf'\b{name}[\'"]?\s*[=:]\s*[\'"]?({value})(?!\w)'


def fraction(name: str, text: str) -> float | None:
    """Returns a setting that is a number or a fraction, such as `1. / 16`; None without one."""
    found = re.search(setting(name, NUMBER) + rf'(?:\s*/\s*({NUMBER}))?', text)
    return found and float(found[1]) / (float(found[2] or 1) or 1)


def whole_numbers(name: str, text: str) -> tuple[int, ...] | None:
    """Returns a setting that is a tuple or a list of whole numbers; None without one."""
    found = re.search(rf'\b{name}[\'"]?\s*[=:]\s*[(\[]([\d,\s]*)[)\]]', text)
    return found and tuple(int(number[:9]) for number in re.findall(r'\d+', found[1])[:16])


def groups(name: str, text: str) -> Iterator[str]:
    """Yields the settings of every group of a name, such as `backbone=dict(...)`, as text.

    Groups inside are left out: the type of a norm is not that of its backbone.
    """
    starts = re.finditer(rf'\b{name}[\'"]?\s*[=:]\s*(dict\(|{{)', text)
    for found in itertools.islice(starts, _MAX_GROUPS):
        kept, inside, depth = [], [], 0
        for place in range(found.end() - 1, min(len(text), found.end() + _MAX_GROUP)):
            letter = text[place]
            if letter in _OPEN:
                inside.append(letter == '{' or text[place - 4 : place] == 'dict')
                depth += inside[-1]
            if depth == 1:
                kept.append(letter)
            if letter in _CLOSE:
                depth -= inside.pop()
            if not inside:
                yield ''.join(kept)
                break
