"""What a notebook needs before gcnet_jax can be imported, and what only a notebook needs.

Imports nothing but the standard library until what is missing has been installed. The package is
used as it lies in its directory: that is put on the path, and nothing of it is installed into the
runtime.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SMOKE = 'GCNET_JAX_SMOKE'
DRIVE = '/content/drive'
# In requirements.txt for the tests alone.
TEST_TOOLS = ('beartype', 'pytest', 'pytest-xdist')


def prepare(source: str | os.PathLike, *, expect_tpu: bool = False) -> SimpleNamespace:
    """Makes the package importable and says what jax runs on.

    Args:
      source: The project's directory, or that of the package where it was installed.
      expect_tpu: Say loudly if there is none.

    Returns:
      `source`, and `smoke`: whether the environment variable GCNET_JAX_SMOKE asks for a short run
      on little data.
    """
    source = Path(source).absolute()
    if (source / '__init__.py').is_file():
        source = source.parent
    install_missing(read_requirements(source))
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    smoke = os.environ.get(SMOKE, '') not in ('', '0')
    print(describe_devices(expect_tpu))
    return SimpleNamespace(source=source, smoke=smoke)


def read_requirements(source: Path) -> str:
    """Returns what the package needs, one requirement per line, without the tests' tools.

    Args:
      source: The project's directory, or one that the package was installed into.
    """
    from packaging.requirements import Requirement  # The notebook's own kernel needs it.

    if (source / 'requirements.txt').is_file():
        lines = (source / 'requirements.txt').read_text().splitlines()
    else:
        found = importlib.metadata.distributions(name='gcnet-jax', path=[str(source)])
        lines = [line for distribution in found for line in distribution.requires or ()]
    texts = filter(None, (line.partition('#')[0].strip() for line in lines))
    wanted = (Requirement(text) for text in texts)
    return '\n'.join(
        str(requirement)
        for requirement in wanted
        if requirement.name not in TEST_TOOLS
        and (requirement.marker is None or requirement.marker.evaluate({'extra': ''}))
    )


def install_missing(requirements: str) -> list[str]:
    """Installs what is absent of requirements, one per line; changes nothing that is there.

    An upgrade of jax would come without its TPU library, and jax then runs on the CPU in silence.

    Returns:
      What was installed.

    Raises:
      RuntimeError: Something that is there is too old, or the installation failed.
    """
    missing, too_old = find_missing(requirements)
    if too_old:
        raise RuntimeError(
            f'too old for gcnet_jax: {"; ".join(too_old)}. Choose a newer runtime version in Colab '
            '(Runtime > Change runtime type), or upgrade in an environment of your own'
        )
    if not missing:
        return []
    print(f'installing {", ".join(missing)}')
    with tempfile.TemporaryDirectory() as directory:
        constraints = Path(directory) / 'constraints.txt'
        constraints.write_text('\n'.join(installed()) + '\n')
        command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--constraint']
        done = subprocess.run([*command, str(constraints), *missing], check=False)
    if done.returncode:
        raise RuntimeError(f'pip could not install {", ".join(missing)}; its message is above')
    importlib.invalidate_caches()
    return missing


def find_missing(requirements: str) -> tuple[list[str], list[str]]:
    """Returns the requirements that are absent, and those that are there and too old, with why."""
    from packaging.requirements import Requirement

    missing, too_old = [], []
    for line in requirements.splitlines():
        text = line.partition('#')[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            too_old.append(f'{requirement.name} is {version}, needed is {requirement.specifier}')
    return missing, too_old


def installed() -> list[str]:
    """Returns every installed distribution as a constraint that keeps it as it is."""
    from packaging.version import InvalidVersion, Version

    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata['Name']
        try:
            version = str(Version(distribution.version))
        except (InvalidVersion, TypeError):
            continue  # pip would not read it either.
        if name:  # The first on the path is the one that is imported.
            found.setdefault(name.lower(), f'{name}=={version}')
    return sorted(found.values())


def describe_devices(expect_tpu: bool) -> str:
    """Returns what jax runs on; a banner where a TPU was expected and there is none."""
    import jax

    try:
        devices, reason = jax.devices(), ''
    except RuntimeError as error:  # A TPU library that does not go with this jax.
        devices, reason = [], ' '.join(str(error).split())[:300]
    kinds = sorted({device.device_kind for device in devices})
    found = f'jax {jax.__version__} on {len(devices)} x {", ".join(kinds) or "nothing"}'
    if not expect_tpu or any(device.platform == 'tpu' for device in devices):
        return found
    lines = [
        f'NO TPU: {found}.',
        *([reason] if reason else []),
        'Training works and will take many times as long.',
        'In Colab: Runtime > Change runtime type > TPU, then run all cells again.',
    ]
    bar = '!' * (max(map(len, lines)) + 4)
    return '\n'.join([bar, *(f'! {line}' for line in lines), bar])


def training_config(
    setup: SimpleNamespace,
    *,
    dataset: str,
    epochs: float,
    folder: str = '',
    image_size: int = 0,
    network: str = '',
    block: str = '',
    stages: str = '',
    position: str = '',
    ratio: float | None = None,
    dtype: str = '',
    batch_size: int = 0,
    learning_rate: float = 0.0,
) -> Any:
    """Returns the settings of a run: those of the config file for that kind of data, changed.

    Downloads and prepares the data where need be. In a short run the data are the digits.

    Args:
      setup: What `prepare` returned.
      dataset: 'digits', 'folder' or a TFDS set.
      epochs: How long.
      folder: With 'folder': where the images are, one folder a class.
      image_size, network, dtype, batch_size, learning_rate: What is empty is left as in the file.
      block: A context block, 'none' for no context; empty as in the file.
      stages, position, ratio: Where it goes, and its ratio if it has one.
    """
    from gcnet_jax.commands.config_files import load_config, shipped_configs
    from gcnet_jax.data.folder import prepare_folder
    from gcnet_jax.training.config import name_network

    if setup.smoke:
        dataset, epochs = 'digits', 1
    own_file = dataset if dataset in ('digits', 'folder') else ''
    by_size = 'cifar10' if image_size <= 64 else 'folder'
    config = load_config(str(shipped_configs() / f'{own_file or by_size}.py'))
    if dataset == 'folder':
        prepared = prepare_folder(folder, 'my_images', overwrite=True)
        dataset = prepared.name
    elif dataset != 'digits':
        prepare_tfds(dataset)
    config.data.name = dataset
    if image_size and dataset != 'digits':
        config.data.image_size = image_size
    if network and network != config.model.name:
        name_network(config, network)
    if block:
        place = {'stages': tuple(map(int, stages.split(','))), 'position': position}
        if block in ('global_context', 'squeeze_excite') and ratio is not None:
            place['ratio'] = ratio
        if 'context' in config.model:
            del config.model.context  # The file's is of another type.
        config.model.context = None if block == 'none' else ({'block': block, **place},)
    config.training.total_epochs = float(epochs)
    # A short run from the form keeps a short warm-up.
    config.schedule.warmup_epochs = min(config.schedule.warmup_epochs, epochs / 4)
    config.training.batch_size = batch_size or config.training.batch_size
    config.schedule.peak_learning_rate = learning_rate or config.schedule.peak_learning_rate
    config.model.dtype = dtype or config.model.dtype
    config.runtime.progress = 'lines'
    return config


def run_directory(name: str, *, on_drive: bool) -> Path:
    """Returns where a run goes: on Google Drive, where it outlives the machine, or in `runs`."""
    root = Path('runs')
    if on_drive and 'google.colab' in sys.modules:
        from google.colab import drive

        drive.mount(DRIVE)
        root = Path(DRIVE) / 'MyDrive' / 'gcnet_jax'
    elif on_drive:
        print('this is not Colab, so there is no Drive to save to')
    return (root / name).absolute()


def train(config: Any, workdir: Path) -> dict[str, float]:
    """Trains a network, or continues a run; an error names the fields of the form.

    Raises:
      UserError: As `gcnet_jax.training.loop.train`.
    """
    from gcnet_jax.errors import UserError
    from gcnet_jax.training.loop import train

    try:
        return train(config, workdir)
    except UserError as error:
        # What belongs to the command line has another name in the form.
        text = re.sub(
            r'--workdir \S+ holds a run', f'the run {workdir.name!r} is there', str(error)
        )
        text = text.replace('another --workdir', 'another run_name')
        if text == str(error):
            raise
        raise type(error)(text) from None


def prepare_tfds(name: str, data_dir: str = '') -> None:
    """Downloads a TFDS set and prepares it, in an environment apart.

    TFDS needs TensorFlow for that. Beside jax it would replace libraries of the runtime, and take
    the TPU for itself.
    """
    from gcnet_jax.private_directories import private_directory

    # Never a place that others can write to: what is found there is run.
    caches = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    place = private_directory(caches / 'gcnet_jax' / 'tensorflow')
    python = place / 'bin' / 'python'
    if not python.exists():
        subprocess.run([sys.executable, '-m', 'venv', str(place)], check=True)
    pip = [str(python), '-m', 'pip', 'install', '--quiet']
    needed = ['tensorflow-cpu', 'tensorflow-datasets', 'array-record', 'importlib-resources']
    subprocess.run([*pip, *needed], check=True)
    code = (
        'import sys, tensorflow_datasets as tfds\n'
        'tfds.builder(sys.argv[1], data_dir=sys.argv[2] or None, file_format="array_record")'
        '.download_and_prepare()'
    )
    subprocess.run([str(python), '-c', code, name, data_dir], check=True)


def show(*pictures: Any) -> None:
    """Shows PNG files below the cell."""
    from IPython.display import Image, display

    for picture in pictures:
        display(Image(filename=str(picture)))


def write_digits(directory: str | os.PathLike, count: int) -> list[Path]:
    """Writes handwritten digits of the test set as image files, to try a network on."""
    from gcnet_jax.data.sources import load_source

    source = load_source('digits', 'test')
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    files = [place / f'digit_{source[index]["label"]}_{index}.png' for index in range(count)]
    for index, file in enumerate(files):
        file.write_bytes(source[index]['image'])
    return files


def sample_photo() -> Path:
    """Returns a photograph that comes with scikit-learn (by danielbuechele, CC BY 2.0)."""
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / 'images' / 'china.jpg'


def write_random_weights(network: str, file: str | os.PathLike) -> Path:
    """Writes weights that were never trained as timm would, where there is no hub to load from."""
    import numpy as np
    from flax.traverse_util import unflatten_dict

    from gcnet_jax import create_model
    from gcnet_jax.porting import to_torch, write_safetensors
    from gcnet_jax.porting.convert import variable_shapes

    model = create_model(network)
    generator = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        values = generator.normal(size=shape).astype(np.float32)
        if path.endswith('kernel'):
            return values / np.float32(np.sqrt(np.prod(shape[:-1])))
        return 1 + np.abs(values) / 5 if path.endswith(('scale', 'var')) else values / 5

    shapes = variable_shapes(model)
    flat = {path: draw(path, leaf.shape) for path, leaf in shapes.items()}
    write_safetensors(file, to_torch(model, unflatten_dict(flat, sep='/'), 'timm'))
    return Path(file)
