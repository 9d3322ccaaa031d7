"""train.py, but each process also writes down which images it reads, by their checksums."""

import json
import sys
import zlib
from pathlib import Path

import jax

from gcnet_jax.commands.train import run
from gcnet_jax.training import experiment


def recorded(make, kind):
    """Wraps a loader of experiment.py: a line of checksums for every batch, beside the workdir."""

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
            for images, labels, masks, skipped in iterator:
                sums = [zlib.crc32(image.tobytes()) for image in images[masks]]
                print(json.dumps(sums), file=lines, flush=True)
                yield images, labels, masks, skipped
    finally:
        iterator.close()


if __name__ == '__main__':
    experiment.train_batches = recorded(experiment.train_batches, 'train')
    experiment.evaluation_batches = recorded(experiment.evaluation_batches, 'evaluation')
    sys.exit(run(sys.argv, Path()))
