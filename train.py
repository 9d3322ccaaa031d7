"""Trains a network: `python train.py [--config FILE] [--workdir DIR] [--config.KEY=VALUE ...]`."""

import sys
from pathlib import Path

from gcnet_jax.commands.train import run

if __name__ == '__main__':
    sys.exit(run(sys.argv, default_config_file=Path(__file__).parent / 'configs' / 'digits.py'))
