"""Files of PyTorch and safetensors, without torch: kinds of tensors, damage and limits."""

import io
import json
import os
import struct
import time
import zipfile

import numpy as np
import pytest

from gcnet_jax.errors import CheckpointError
from gcnet_jax.porting.files import read_checkpoint
from tests.porting.crafted import FORMS, Call, Name, floats, legacy, program, tensor, zipped

TWO = {'0': floats(1, 2)}


def write(path, value, storages=None, form='zip'):
    path.write_bytes(FORMS[form](program(value), TWO if storages is None else storages))
    return path


@pytest.fixture
def refused(tmp_path):
    """A function (content, message): the file with this content is refused in one line."""

    def check(content, message, name='a.pth'):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=message) as error:
            read_checkpoint(path)
        assert time.monotonic() - start < 10
        assert '\n' not in str(error.value)
        assert len(str(error.value)) < 1200
        return str(error.value)

    return check


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('form', FORMS)
def test_views_of_one_storage(tmp_path, form):
    values = floats(*range(6))
    state = {
        'rows': tensor(shape=(2, 3)),
        'columns': tensor(shape=(3, 2), strides=(1, 3), size=6),
        'last': tensor(shape=(2,), offset=4, strides=(1,), size=6),
        'number': tensor(shape=(), offset=5, strides=(), size=6),
        'repeated': tensor(shape=(2, 2), strides=(0, 1), size=6),
        'empty': tensor(shape=(0, 4), size=6),
    }
    tensors = read_checkpoint(write(tmp_path / 'a.pth', state, {'0': values}, form)).tensors
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(tensors['rows'], array)
    np.testing.assert_array_equal(tensors['columns'], array.T)
    np.testing.assert_array_equal(tensors['last'], [4, 5])
    assert tensors['number'].shape == ()
    assert tensors['number'] == 5
    np.testing.assert_array_equal(tensors['repeated'], [[0, 1], [0, 1]])
    assert tensors['empty'].shape == (0, 4)
    assert all(tensors[name].flags.writeable for name in tensors)


@pytest.mark.parametrize(
    ('kind', 'item', 'name'),
    [
        ('BoolStorage', 1, 'bool'),
        ('ComplexFloatStorage', 8, 'complex64'),
        ('ComplexDoubleStorage', 16, 'complex128'),
    ],
)
def test_bool_and_complex_tensors_are_refused_by_name(refused, kind, item, name):
    state = {'layer.weight': tensor(kind=f'torch {kind}')}
    refused(zipped(program(state), {'0': bytes(2 * item)}), f'layer.weight is {name}')


def test_integers_are_counters_and_no_weights(tmp_path):
    numbers = np.array([7, 8], '<i8').tobytes()
    state = {
        'bn.num_batches_tracked': tensor(
            shape=(), strides=(), size=2, offset=1, kind='torch LongStorage'
        ),
        'conv.weight': tensor(kind='torch LongStorage'),
    }
    tensors = read_checkpoint(write(tmp_path / 'a.pth', state, {'0': numbers})).tensors
    assert tensors['bn.num_batches_tracked'] == 8
    with pytest.raises(CheckpointError, match=r'conv.weight holds int64 numbers'):
        tensors['conv.weight']


@pytest.mark.parametrize(
    ('function', 'kind'),
    [
        ('_rebuild_sparse_tensor', 'sparse'),
        ('_rebuild_sparse_csr_tensor', 'sparse'),
        ('_rebuild_qtensor', 'quantised'),
        ('_rebuild_nested_tensor', 'nested'),
        ('_rebuild_meta_tensor_no_storage', 'meta'),
    ],
)
def test_other_kinds_of_tensors_are_refused_by_name(refused, function, kind):
    state = {'fc.weight': Call(f'torch._utils {function}', ()), 'w': tensor()}
    refused(zipped(program(state), TWO), f'fc.weight is {kind}')


def test_float8_is_refused_by_name(refused):
    arguments = (None, 0, (2,), (1,), False, None, Name('torch float8_e4m3fn'))
    state = {'w': Call('torch._utils _rebuild_tensor_v3', arguments)}
    refused(zipped(program(state), TWO), 'w is float8_e4m3fn')
    header = b'{"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    refused(struct.pack('<Q', len(header)) + header + b'ab', 'w is float8_e4m3', 'a.safetensors')


@pytest.mark.parametrize(('dtype', 'size'), [('BOOL', 2), ('C64', 16), ('F4', 1), ('X', 2)])
def test_safetensors_of_other_types(refused, dtype, size):
    header = json.dumps(
        {'w': {'dtype': dtype, 'shape': [2], 'data_offsets': [0, size]}}, separators=(',', ':')
    ).encode()
    refused(struct.pack('<Q', len(header)) + header + bytes(size), ' w is ', 'a.safetensors')


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('record', ['data/0', 'data.pkl', 'version'])
def test_a_flipped_bit_in_a_zip_is_seen(refused, record):
    content = zipped(program({'w': tensor(shape=(4,))}), {'0': floats(1, 2, 3, 4)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.getinfo(f'archive/{record}')
    place = member.header_offset + 30 + len(member.filename) + member.file_size - 1
    damaged = bytearray(content)
    damaged[place] ^= 1
    refused(bytes(damaged), 'checksum')


def test_a_directory_that_contradicts_the_records(refused):
    content = zipped(program({'w': tensor()}), TWO)
    start = content.index(b'PK\1\2')
    member = content.index(b'archive/data/0', start) - 46
    for place, message in [
        (16, 'checksum'),
        (20, 'compressed'),
        (24, 'compressed'),
        (42, 'damaged'),
    ]:
        damaged = bytearray(content)
        damaged[member + place] ^= 4
        refused(bytes(damaged), message)
    # Both sizes, so that the record reaches into the next.
    damaged = bytearray(content)
    damaged[member + 20] = damaged[member + 24] = 200
    refused(bytes(damaged), 'reaches into the next')


def test_records_that_do_not_suit_the_tensors(refused):
    data = program({'w': tensor()})
    refused(zipped(data, {'0': floats(1, 2, 3)}), 'has 12 bytes, and its tensors have 8')
    refused(zipped(data, {'1': floats(1, 2)}), 'data/0 is missing')
    refused(legacy(data, {'0': floats(1, 2, 3)}), 'has another size')
    refused(legacy(data, {}), 'storages are missing')


def test_a_compressed_or_double_record(refused):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', program({'w': tensor()}))
        archive.writestr('archive/data/0', bytes(100_000_000))
    refused(out.getvalue(), 'compressed')
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr('archive/data.pkl', program({'w': tensor()}))
        with pytest.warns(UserWarning, match='Duplicate'):
            archive.writestr('archive/data.pkl', program({}))
    refused(out.getvalue(), 'one record twice')
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr('word/document.xml', '<xml/>')
    refused(out.getvalue(), 'not one that torch.save wrote')


def test_safetensors_with_a_header_of_two_meanings(refused):
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    cases = {
        b'{"w":' + entry + b',"w":' + entry + b'}': 'one name twice',
        b'{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}': 'damaged',
        b'{"w":' + entry + b',"v":' + entry + b'}': 'damaged',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}': 'damaged',
        b'{"w":' + b'[' * 100_000 + b'}': 'nested too deeply',
    }
    for header, message in cases.items():
        refused(struct.pack('<Q', len(header)) + header + bytes(4), message, 'a.safetensors')


def test_what_is_no_regular_file(refused, tmp_path):
    if hasattr(os, 'mkfifo'):
        os.mkfifo(tmp_path / 'pipe.pth')
        refused(None, 'not a regular file', 'pipe.pth')
    if os.path.exists('/dev/zero'):
        os.symlink('/dev/zero', tmp_path / 'zero.pth')
        refused(None, 'not a regular file', 'zero.pth')
    (tmp_path / 'folder.pth').mkdir()
    refused(None, 'is a directory', 'folder.pth')
    with pytest.raises(CheckpointError, match='cannot read'):
        read_checkpoint('a\0b.pth')


# Limits -------------------------------------------------------------------------------------------


def test_too_many_names_are_refused_at_once(refused):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = '{' + ','.join(f'"{n}":{entry}' for n in range(60_000)) + '}'
    start = struct.pack('<Q', len(header))
    refused(start + header.encode(), 'at most 50,000 are read', 'a.safetensors')
    refused(struct.pack('<Q', 10**8) + b'{' + bytes(99), '16,777,216 are read', 'a.safetensors')


def test_long_names_are_refused_and_shown_in_part(refused):
    message = refused(zipped(program({'\x1b[31m' + 'x' * 2_000: tensor()}), TWO), 'at most 1,000')
    assert '\x1b' not in message


def test_a_pickle_larger_than_the_limit(refused):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr('archive/data.pkl', bytes(65 * 2**20))
    refused(out.getvalue(), 'at most 67,108,864 are read')


def test_a_file_larger_than_the_limit(refused, tmp_path):
    for name in ('a.pth', 'a-00000000.pth'):
        with (tmp_path / name).open('wb') as file:
            file.write(b'PK\x03\x04')
            file.truncate(9 * 2**30)
        refused(None, 'at most 8,589,934,592 are read', name)


# Names of files -----------------------------------------------------------------------------------


def test_the_hash_in_a_published_name_is_compared(tmp_path, refused):
    import hashlib

    content = zipped(program({'w': tensor()}), TWO)
    digest = hashlib.sha256(content).hexdigest()[:8]
    names = (f'resnet50-{digest}.pth', 'resnet50-0676.pth', 'run-20261126.pth', 'a-deadbeef.txt')
    for name in names:
        (tmp_path / name).write_bytes(content)
        assert list(read_checkpoint(tmp_path / name).tensors) == ['w']
    for name in (
        'resnet50-0676ba61.pth',
        'mask_rcnn_20200515_211915-187da160.pth',
        'a-00000000.pt',
    ):
        refused(content, 'Fetch it again, or rename it', name)
