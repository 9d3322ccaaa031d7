"""train.py, but each process also writes down which images it reads, by their checksums."""

import json
import sys
import zlib
from pathlib import Path

import jax

from gcnet_jax.commands.train import run
from gcnet_jax.data import loader


def recorded(make, kind):
    """Wraps a function of loader.py: a line of checksums for every batch, beside the workdir."""

    def batches(*arguments, **options):
        made = make(*arguments, **options)
        if kind == 'train' and 'start_step' not in options:
            return made  # For the norms' statistics, which are no steps.
        workdir = next(text for text in sys.argv if text.startswith('--workdir=')).split('=')[1]
        made._iterator = watched(made._iterator, f'{workdir}-{kind}-{jax.process_index()}.jsonl')
        return made

    return batches


def watched(iterator, file):
    """Hands out what an iterator gives, and writes down which images that is."""
    try:
        with Path(file).open('a') as lines:
            for batch, skipped in iterator:
                images = batch['image'][batch['mask']] if 'mask' in batch else batch['image']
                sums = [zlib.crc32(image.tobytes()) for image in images]
                print(json.dumps(sums), file=lines, flush=True)
                yield batch, skipped
    finally:
        iterator.close()


if __name__ == '__main__':
    loader.train_batches = recorded(loader.train_batches, 'train')
    loader.evaluation_batches = recorded(loader.evaluation_batches, 'evaluation')
    sys.exit(run(sys.argv, Path()))
