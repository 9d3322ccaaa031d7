"""Files in the form of torch.save that are written without torch, read with the reader here.

That torch reads them too is in test_live_torch.py.
"""

import zipfile

import numpy as np
import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.porting.files import read_checkpoint
from gcnet_jax.porting.torch_writer import ALIGNMENT, STORAGES, write_torch

TENSORS = {
    'b.weight': np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    'a.weight': np.array([[np.pi, -0.0], [np.float32(1e-45), 3e38]], np.float32).T,
    'bn.num_batches_tracked': np.array(7, np.int64),
    'empty': np.zeros((0, 3), np.float32),
    'ü': np.ones(1, np.float32),
}
META = {
    'CLASSES': ('person', 'hot dog', 'Maß'),
    'epoch': 12,
    'big': 2**40,
    'negative': -(2**35),
    'rate': 0.02,
    'flags': [True, False, None, {}],
    'nothing': (),
}


@pytest.mark.parametrize('meta', [None, {}, META])
def test_every_bit_comes_back(tmp_path, meta):
    write_torch(tmp_path / 'a.pth', TENSORS, meta=meta)
    file = read_checkpoint(tmp_path / 'a.pth')
    assert list(file.tensors) == list(TENSORS)
    for name, expected in TENSORS.items():
        value = file.tensors[name]
        assert (value.shape, value.dtype, value.tobytes()) == (
            *(expected.shape, expected.dtype, expected.tobytes()),
        )
    assert file.wrapper == ('' if meta is None else 'state_dict')
    plain = (meta or {}) | ({'CLASSES': [*META['CLASSES']], 'nothing': []} if meta else {})
    assert file.metadata == ({} if meta is None else {'meta': plain})


def test_the_archive_is_that_of_torch(tmp_path):
    write_torch(tmp_path / 'a.pth', TENSORS)
    with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
        names = archive.namelist()
        assert archive.read('archive/byteorder') == b'little'
        assert archive.read('archive/version') == b'3\n'
        assert archive.testzip() is None
        content = (tmp_path / 'a.pth').read_bytes()
        data = archive.read('archive/data/0')
        assert content.index(data) % ALIGNMENT == 0
    assert [name for name in names if '/data/' in name] == [
        f'archive/data/{key}' for key in range(len(TENSORS))
    ]


@pytest.mark.parametrize('kind', STORAGES)
def test_every_type(tmp_path, kind):
    write_torch(tmp_path / 'a.pth', {'w': np.array(3, kind)})
    file = read_checkpoint(tmp_path / 'a.pth')
    assert file.tensors.dtypes == {'w': kind}
    assert file.tensors['w'] == 3


def test_another_type_leaves_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r'type complex64 cannot be written .* float32'):
        write_torch(tmp_path / 'a.pth', {'w': np.zeros(2, np.complex64)})
    with pytest.raises(CheckpointError, match='cannot write'):
        write_torch(tmp_path / 'missing' / 'a.pth', TENSORS)
    assert not list(tmp_path.iterdir())
