"""An evaluation on disk: `evaluation.json`, and a picture beside it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcnet_jax.errors import DataError
from gcnet_jax.files import make_directory, write_whole

REPORT_FILE = 'evaluation.json'


def write_report(
    directory: str | os.PathLike, report: Mapping[str, Any], picture: str, figure: Any
) -> list[Path]:
    """Writes a report and its picture, each whole or not at all.

    Args:
      directory: Made if it does not exist; files of these names are replaced.
      report: Plain values.
      picture: Name of the picture's file.
      figure: A matplotlib Figure; None for no picture.

    Returns:
      The files.

    Raises:
      DataError: They cannot be written.
    """
    directory = make_directory(directory, '--out', DataError)
    files = [directory / REPORT_FILE]
    with write_whole(files[0], DataError) as aside:
        aside.write_text(json.dumps(report, indent=1) + '\n')
    if figure is not None:
        files.append(directory / picture)
        with write_whole(files[1], DataError) as aside:
            figure.savefig(aside, format='png', dpi=120)
    return files
