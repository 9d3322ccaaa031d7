"""What folders of images hold: their entries, and how those are named in errors."""

from collections.abc import Collection
from pathlib import Path

from gcnet_jax.errors import DataError, one_line

# Folder of a split, in any case -> split, by TFDS's usual names.
SPLIT_FOLDERS = {
    **{'train': 'train', 'training': 'train'},
    **{'val': 'validation', 'valid': 'validation', 'validation': 'validation', 'dev': 'validation'},
    **{'test': 'test', 'testing': 'test'},
}
# What systems and archives leave in folders, beside hidden files.
SYSTEM_ENTRIES = {
    *('thumbs.db', 'ehthumbs.db', 'desktop.ini', 'icon\r', '__macosx', '@eadir'),
    *('$recycle.bin', 'system volume information', 'lost+found'),
}
MAX_LISTED = 5


def entries(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f'{shown(folder)} cannot be read ({error.strerror})') from error
    return [
        entry
        for entry in entries
        if not entry.name.startswith('.') and entry.name.casefold() not in SYSTEM_ENTRIES
    ]


def subfolders(folder: Path) -> list[Path]:
    return [entry for entry in entries(folder) if entry.is_dir()]


def shown(name: object) -> str:
    return f"'{one_line(name)}'"


def damaged_files(root: Path, damaged: Collection[str], what: str) -> DataError:
    """Returns the error for files of a folder that cannot be used, each with the reason."""
    listed = '; '.join(list(damaged)[:MAX_LISTED])
    more = f' and {len(damaged) - MAX_LISTED} more' if len(damaged) > MAX_LISTED else ''
    return DataError(
        f'{len(damaged)} file{"s" if len(damaged) > 1 else ""} in {shown(root)} {what}: '
        f'{listed}{more}; '
        'they can stay where they are and be left out of the data set with skip_damaged '
        '(--skip-damaged)'
    )
