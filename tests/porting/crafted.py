"""Writes PyTorch files byte by byte, without torch: good ones, and ones torch would never write."""

import dataclasses
import io
import pickle
import struct
import zipfile
from typing import Any

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C


@dataclasses.dataclass
class Name:
    """A class or function, by name."""

    text: str


@dataclasses.dataclass
class Call:
    """A call of a name, or a new object of a class (`new`), with the state it is given."""

    of: str
    arguments: Any = ()
    state: Any = None
    new: bool = False


@dataclasses.dataclass
class Raw:
    """Instructions as they are."""

    code: bytes


@dataclasses.dataclass
class Stored:
    """A storage's reference."""

    key: str
    size: int
    kind: str = 'torch FloatStorage'


def encode(value: Any) -> bytes:
    """The instructions (of protocol 2, as torch.save has it) that push a value."""
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, Name):
        return b'c' + value.text.replace(' ', '\n').encode() + b'\n'
    if isinstance(value, Stored):
        parts = ('storage', Name(value.kind), value.key, 'cpu', value.size)
        return encode(parts) + b'Q'
    if isinstance(value, Call):
        code = encode(Name(value.of)) + encode(value.arguments) + (b'\x81' if value.new else b'R')
        return code + (b'' if value.state is None else encode(value.state) + b'b')
    if isinstance(value, dict):
        items = b''.join(encode(k) + encode(v) for k, v in value.items())
        return b'}(' + items + b'u'
    if isinstance(value, list):
        return b'](' + b''.join(map(encode, value)) + b'e'
    if isinstance(value, tuple):
        return b'(' + b''.join(map(encode, value)) + b't'
    if isinstance(value, bytes):
        return encode(Call('_codecs encode', (value.decode('latin1'), 'latin1')))
    return pickle.dumps(value, protocol=2)[2:-1]


def program(value: Any) -> bytes:
    return b'\x80\x02' + encode(value) + b'.'


def tensor(key='0', shape=(2,), strides=None, offset=0, size=None, kind='torch FloatStorage'):
    """A tensor as torch.save refers to it; contiguous, and all of its storage, unless told."""
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    size = int(np.prod(shape)) if size is None else size
    arguments = (Stored(key, size, kind), offset, shape, strides, False)
    return Call('torch._utils _rebuild_tensor_v2', (*arguments, Call('collections OrderedDict')))


def zipped(data: bytes, storages: dict[str, bytes], **more: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr('archive/data.pkl', data)
        archive.writestr('archive/byteorder', b'little')
        for key, content in storages.items():
            archive.writestr(f'archive/data/{key}', content)
        archive.writestr('archive/version', b'3\n')
        for name, content in more.items():
            archive.writestr(f'archive/{name}', content)
    return out.getvalue()


def legacy(data: bytes, storages: dict[str, bytes], item: int = 4) -> bytes:
    system = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'int': 4}}
    parts = [pickle.dumps(v, protocol=2) for v in (MAGIC, 1001, system)]
    # A storage's reference has a sixth part here: whether it is a view.
    parts += [data.replace(b'tQ', b'NtQ'), pickle.dumps(list(storages), protocol=2)]
    parts += [struct.pack('<q', len(v) // item) + v for v in storages.values()]
    return b''.join(parts)


FORMS = {'zip': zipped, 'legacy': legacy}


def state_dict(beside: dict[str, Any] | None = None, **tensors: Any) -> bytes:
    """The pickle of {'state_dict': {'w': two floats, **tensors}, **beside}."""
    return program({'state_dict': {'w': tensor(), **tensors}, **(beside or {})})


def floats(*values: float) -> bytes:
    return np.array(values, '<f4').tobytes()
