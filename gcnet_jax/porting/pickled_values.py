"""What stands for the objects in a PyTorch file, and the calls in its pickles that are understood.

A call is never made: each reader below takes the arguments that the pickle gives, checks them and
returns a description.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

# Dictionaries get no other keys: a tuple can be nested so deeply that hashing it ends the process.
_KEYS = (str, int, type(None))
MAX_NUMBER = 2**31  # of memo entries and integer keys; larger ones can be chosen to collide

STORAGES = {
    'DoubleStorage': 'float64',
    'FloatStorage': 'float32',
    'HalfStorage': 'float16',
    'BFloat16Storage': 'bfloat16',
    'LongStorage': 'int64',
    'IntStorage': 'int32',
    'ShortStorage': 'int16',
    'CharStorage': 'int8',
    'ByteStorage': 'uint8',
    'UntypedStorage': 'uint8',
    'BoolStorage': 'bool',
    'ComplexFloatStorage': 'complex64',
    'ComplexDoubleStorage': 'complex128',
    'QInt8Storage': 'int8',
    'QUInt8Storage': 'uint8',
    'QInt32Storage': 'int32',
    'QUInt4x2Storage': 'uint8',
    'QUInt2x4Storage': 'uint8',
}
ITEM_BYTES = {
    dtype: int(dtype.lstrip('abcdefilmnoptux')) // 8
    for dtype in STORAGES.values()
    if dtype != 'bool'
} | {'bool': 1}

MAX_DIMENSIONS = 32
# A tensor may repeat its values (`expand`), up to this many elements.
MAX_REPEATED = 1_000_000


class DamagedPickle(Exception):
    """A file that torch.save did not write, or that was damaged since."""


class TooLarge(DamagedPickle):
    """More than is read; names the limit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f'{self.module}.{self.name}'


@dataclasses.dataclass(slots=True)
class Record:
    """An object: the name of its class, and its fields where the pickle gives them."""

    of: str
    fields: dict[Any, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class NumpyType:
    """A simple type of numpy's: its code, such as 'f8', and its byte order."""

    code: str
    order: str = '='


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Values of one type in the file."""

    key: str
    dtype: str
    size: int

    @property
    def bytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor: which elements of a storage it consists of. Offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class OtherTensor:
    """A tensor of a kind that is not read, such as 'sparse'."""

    kind: str


def is_key(key: Any) -> bool:
    """Whether a dictionary may have this key."""
    return isinstance(key, _KEYS) and (not isinstance(key, int) or abs(key) < MAX_NUMBER)


def is_count(number: Any) -> bool:
    """Whether this is a number of elements that a file can hold."""
    return type(number) is int and 0 <= number < 2**48


def _counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(map(is_count, values))


# Readers: each takes the machine and the call's arguments -----------------------------------------


def _tensor(machine: Any, *arguments: Any) -> StoredTensor | OtherTensor:
    """`torch._utils._rebuild_tensor` and its second version."""
    storage, offset, shape, strides = arguments[:4]
    if not (isinstance(storage, Storage) and is_count(offset) and _counts(shape)):
        raise DamagedPickle('a tensor in it has no storage, offset or shape')
    if not _counts(strides) or len(strides) != len(shape) or len(shape) > MAX_DIMENSIONS:
        raise DamagedPickle('a tensor in it has strides that do not suit its shape')
    elements, last = 1, offset
    for size, stride in zip(shape, strides, strict=True):
        elements *= size
        last += (size - 1) * stride
    if elements and last >= storage.size:
        raise DamagedPickle('a tensor in it lies outside its storage')
    if elements > max(storage.size, MAX_REPEATED):
        raise TooLarge(
            f'a tensor in it has {elements:,} elements, of {storage.size:,} stored values; '
            f'at most {MAX_REPEATED:,} are read of a tensor that repeats its values'
        )
    if len(arguments) > 6 and arguments[6]:
        return OtherTensor('conjugated or negated')
    return StoredTensor(storage, offset, shape, strides)


def _other(kind: str) -> Callable[..., OtherTensor]:
    return lambda machine, *arguments: OtherTensor(kind)


def _newer_tensor(machine: Any, *arguments: Any) -> OtherTensor:
    """`_rebuild_tensor_v3`: of types that have no storage class, such as float8."""
    return OtherTensor(arguments[6].name if isinstance(arguments[6], Global) else 'untyped')


def _parameter(machine: Any, data: Any = None, *_: Any) -> Any:
    return data


def _typed_tensor(machine: Any, function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, or of a class of its own."""
    is_plain = isinstance(kind, Global) and kind in _TENSOR_CLASSES
    if is_plain and isinstance(function, Global) and function.module == 'torch._utils':
        return machine.call(function, arguments)
    return OtherTensor(f'{getattr(kind, "name", "unknown")} class')


def _dictionary(machine: Any, items: Any = (), *_: Any) -> Any:
    if isinstance(items, dict):
        return items
    made: dict[Any, Any] = {}
    if isinstance(items, (list, tuple)):
        machine.count(len(items))
        for pair in items:
            machine.set_items(made, pair if isinstance(pair, (list, tuple)) else [])
    return made


def _default_dictionary(machine: Any, *_: Any) -> Any:
    return {}


def _sizes(machine: Any, sizes: Any = (), *_: Any) -> Any:
    return sizes


def _bytes(machine: Any, text: Any, *_: Any) -> Any:
    """`_codecs.encode(text, 'latin1')`: bytes, as protocol 2 spells them. Long ones are skipped."""
    is_short = isinstance(text, str) and len(text) <= 64
    return text.encode('latin1', 'replace') if is_short else Record('bytes')


def _numpy_type(machine: Any, code: Any, *_: Any) -> NumpyType | Record:
    is_simple = isinstance(code, str) and code in _NUMPY_CODES
    return NumpyType(code) if is_simple else Record('numpy.dtype')


def _numpy_scalar(machine: Any, kind: Any, data: Any = b'', *_: Any) -> Any:
    if not (isinstance(kind, NumpyType) and isinstance(data, bytes)):
        return Record('numpy.generic')
    dtype = np.dtype(kind.order + kind.code)
    if len(data) != dtype.itemsize:
        raise DamagedPickle('a numpy number in it has the wrong length')
    return np.frombuffer(data, dtype)[0].item()


def _attribute(machine: Any, owner: Any, *_: Any) -> Record:
    """`getattr`: mmengine's records of the past name their own methods."""
    if owner != _HISTORY and not machine.foreign:
        machine.foreign = 'builtins.getattr'
    return Record('function')


def _path(machine: Any, *parts: Any) -> Any:
    is_short = all(isinstance(part, str) for part in parts) and sum(map(len, parts)) <= 4096
    return '/'.join(parts) if is_short else Record('pathlib.Path')


def _object(machine: Any, kind: Any, *_: Any) -> Record:
    """`copyreg._reconstructor`: an object of a class, as protocols 0 and 1 spell it."""
    return Record(str(kind) if isinstance(kind, Global) else 'object')


_NUMPY_CODES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')
_PATHS = ('Path', 'PosixPath', 'WindowsPath', 'PurePath', 'PurePosixPath', 'PureWindowsPath')
_BUILTINS = re.findall(
    r'\w+',
    'set frozenset bytearray bytes complex slice range object int float str bool list dict tuple',
)
_HISTORY = Global('mmengine.logging.history_buffer', 'HistoryBuffer')
_TENSOR_CLASSES = frozenset(
    Global(module, name)
    for module, name in (
        ('torch', 'Tensor'),
        ('torch._tensor', 'Tensor'),
        ('torch.nn.parameter', 'Parameter'),
        ('torch.nn.parameter', 'Buffer'),
    )
)
_TORCH_NAMES = re.findall(
    r'\w+',
    'float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool '
    'complex32 complex64 complex128 qint8 quint8 qint32 quint4x2 quint2x4 float8_e4m3fn '
    'float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 strided '
    'sparse_coo sparse_csr per_tensor_affine per_channel_affine contiguous_format',
)

# What Python 2 called the modules.
PYTHON_3 = {'__builtin__': 'builtins', 'copy_reg': 'copyreg', 'UserDict': 'collections'}


def _record(name: str) -> Callable[..., Record]:
    return lambda machine, *arguments: Record(name)


def _table() -> dict[Global, Callable[..., Any]]:
    readers = {
        'torch._utils': {
            '_rebuild_tensor': _tensor,
            '_rebuild_tensor_v2': _tensor,
            '_rebuild_tensor_v3': _newer_tensor,
            '_rebuild_parameter': _parameter,
            '_rebuild_parameter_with_state': _parameter,
            '_rebuild_qtensor': _other('quantised'),
            '_rebuild_sparse_tensor': _other('sparse'),
            '_rebuild_sparse_csr_tensor': _other('sparse'),
            '_rebuild_nested_tensor': _other('nested'),
            '_rebuild_meta_tensor_no_storage': _other('meta'),
            '_rebuild_device_tensor_from_numpy': _other('device'),
            '_rebuild_device_tensor_from_cpu_tensor': _other('device'),
            '_rebuild_wrapper_subclass': _other('wrapper'),
        },
        'torch._tensor': {'_rebuild_from_type_v2': _typed_tensor},
        'collections': {
            'OrderedDict': _dictionary,
            'Counter': _dictionary,
            'defaultdict': _default_dictionary,
        },
        '_codecs': {'encode': _bytes},
        'numpy': {'dtype': _numpy_type, 'ndarray': _record('numpy.ndarray')},
        'copyreg': {'_reconstructor': _object},
        'builtins': {'getattr': _attribute} | {name: _record(name) for name in _BUILTINS},
        'torch': {'Size': _sizes, 'device': _record('torch.device')}
        | {name: _record(f'torch.{name}') for name in _TORCH_NAMES},
        'torch.serialization': {'_get_layout': _record('torch.layout')},
        'argparse': {'Namespace': _record('argparse.Namespace')},
        _HISTORY.module: {_HISTORY.name: _record(str(_HISTORY))},
        'pathlib': dict.fromkeys(_PATHS, _path),
    }
    for module in ('numpy.core', 'numpy._core'):
        readers[f'{module}.multiarray'] = {
            'scalar': _numpy_scalar,
            '_reconstruct': _record('numpy.ndarray'),
        }
        readers[f'{module}.numeric'] = {'_frombuffer': _record('numpy.ndarray')}
    for module in ('torch', 'torch.cuda', 'torch.storage'):
        readers.setdefault(module, {}).update({name: _record(name) for name in STORAGES})
    table = {
        Global(module, name): reader
        for module, named in readers.items()
        for name, reader in named.items()
    }
    table |= {kind: _record(str(kind)) for kind in _TENSOR_CLASSES}
    # torch before 0.4 called the class itself.
    return table | {Global('torch.nn.parameter', 'Parameter'): _parameter}


# Every name that a pickle may use. All others count as foreign, and the file is refused.
PLAIN = _table()
