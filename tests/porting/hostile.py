"""Files that no honest program writes, by what is wrong with them; used by two tests."""

from tests.porting.crafted import Call, Name, Raw, Stored, encode, program, state_dict, tensor

DTYPE = Call('numpy dtype', ('O8', False, True), (3, '|', None, None, None, -1, -1, 63))
ARRAY = Call('numpy.core.multiarray _reconstruct', (Name('numpy ndarray'), (0,), b'b'))


def array(state):
    return Call(ARRAY.of, ARRAY.arguments, state)


def nested(opening: bytes, inner: bytes, closing: bytes, depth: int) -> Raw:
    return Raw(opening * depth + inner + closing * depth)


# An array whose objects lie at addresses that the file chooses: reading one reads, and then counts
# a reference, there. numpy itself builds it, and every container below reads it.
ADDRESSES = b'\x41' * 64
OBJECT = Call('numpy dtype', ('O',))
OTHER_NUMBERS = Call(
    'numpy dtype', ('f8', False, True), (3, '<', None, ('a',), {'a': (OBJECT, 0)}, 8, 1, 0)
)
OBJECTS = Call('numpy ndarray', ((8,), OBJECT, ADDRESSES))
POINTERS = {
    'objects, kept': OBJECTS,
    'objects in a counter': Call('collections Counter', (OBJECTS,)),
    'objects in a set': Call('builtins set', (OBJECTS,)),
    'objects in an ordered dictionary': Call('collections OrderedDict', (OBJECTS,)),
    'objects in a bytearray': Call('builtins bytearray', (OBJECTS,)),
    'objects as sizes': Call('torch Size', (OBJECTS,)),
    'objects as a list': Raw(b'](' + encode(OBJECTS) + b'e'),
    'objects as state': Call('argparse Namespace', (), OBJECTS, new=True),
    'objects as a number': Call('numpy.core.multiarray scalar', (OTHER_NUMBERS, ADDRESSES[:8])),
}
FIELDS = (3, '|', None, ('a',), {'a': (DTYPE, 10**6)}, 8, 1, 16)
TYPED = 'torch._tensor _rebuild_from_type_v2'
# A list of ten times the same list of ten times the same list, and so on.
DOUBLED = (
    b']q\0'
    + b''.join(b'](' + b'h%c' % n * 10 + b'eq%c' % (n + 1) for n in range(40))
    + b'0' * 41
    + b'h('
)
DEEP = nested(b'', b')', b'\x85', 200_000)

# Files that must be refused.
REFUSED = {
    'code': {'meta': Call('os system', ('touch CANARY',))},
    'code by a new object': {'meta': Call('posix system', ('touch CANARY',), new=True)},
    'code by getattr': {'meta': Call('builtins getattr', (Name('os system'), 'x'))},
    'eval': {'meta': Call('builtins eval', ('open("CANARY", "w")',))},
    'import of a dotted name': {'meta': Call('torch serialization.os.system', ('touch CANARY',))},
    'empty stack': {'meta': Raw(b'0' * 50)},
    'memo entry that was never put': {'meta': Raw(b'j\xff\xff\xff\xff')},
    'memo entry far away': {'meta': Raw(b'Nr\xff\xff\xff\xff')},
    'extension': {'meta': Raw(b'\x82\x01')},
    'persistent id of text': {'meta': Raw(b'Pabc\n')},
    'persistent id of a number': {'meta': Raw(b'K\x01Q')},
    'string that is longer than the file': {'meta': Raw(b'X\xff\xff\xff\x7fabc')},
    'bytearray that is longer than the file': {'meta': Raw(b'\x96' + b'\xff' * 7 + b'\x0fabc')},
    'number of digits': {'meta': Raw(b'L' + b'9' * 100_000 + b'L\n')},
    'storage of a negative size': {'meta': Stored('0', -1)},
    'storage of another size': {'meta': Stored('0', 3)},
    'storage of no class': {'meta': Stored('0', 2, 'torch Size')},
    'storage that is missing': {'meta': Stored('7', 2)},
    'instance of a class, as Python 2 wrote it': {'meta': Raw(b'(ios\nsystem\n')},
    'call without arguments': {'meta': Raw(encode(Name('collections OrderedDict')) + b'NR')},
}

# Tensors that must be refused.
REFUSED_TENSORS = {
    'beyond the storage': tensor(shape=(3,), size=2),
    'far beyond the storage': tensor(shape=(2,), strides=(2**40,), size=2),
    'offset beyond the storage': tensor(shape=(2,), offset=1, size=2),
    'negative offset': tensor(shape=(2,), offset=-1, size=2),
    'negative stride': tensor(shape=(2,), strides=(-1,), size=2),
    'negative size': tensor(shape=(-2,), strides=(1,), size=2),
    'size of a float': tensor(shape=(2.0,), strides=(1,), size=2),
    'more strides than sizes': tensor(shape=(2,), strides=(1, 1), size=2),
    'a trillion elements of two': tensor(shape=(10**6, 10**6), strides=(0, 0), size=2),
    'product that overflows': tensor(shape=(2**32, 2**32), strides=(0, 0), size=2),
    'hundred dimensions': tensor(shape=(1,) * 100, strides=(1,) * 100, size=2),
    'no storage': Call('torch._utils _rebuild_tensor_v2', (None, 0, (2,), (1,))),
    'too few arguments': Call('torch._utils _rebuild_tensor_v2', ()),
    'of itself': Call(TYPED, (Name(TYPED), Name('torch Tensor'), ())),
    'sparse': Call('torch._utils _rebuild_sparse_tensor', (Name('torch sparse_coo'), ())),
    'quantised': Call('torch._utils _rebuild_qtensor', (Stored('0', 2), 0, (2,), (1,))),
    'meta': Call('torch._utils _rebuild_meta_tensor_no_storage', (Name('torch int8'), (2,), (1,))),
    'nested': Call('torch._utils _rebuild_nested_tensor', ()),
    'subclass': Call('torch._utils _rebuild_wrapper_subclass', ()),
}  # fmt: skip

# Files that are read, since what is odd in them stands beside the weights and is never built.
HARMLESS = {
    **{name: {'x': value} for name, value in POINTERS.items()},
    'array of objects': {'x': array((1, (8,), DTYPE, False, ADDRESSES))},
    'array of objects in a list': {'x': array((1, (8,), DTYPE, False, [ADDRESSES] * 8))},
    'type with a state of its own': {'x': DTYPE},
    'type of fields at odd places': {'x': Call('numpy dtype', ('V8', False, True), FIELDS)},
    'number of objects': {'x': Call('numpy.core.multiarray scalar', (DTYPE, ADDRESSES[:8]))},
    'array of a negative size': {'x': array((1, (-8,), DTYPE, False, b''))},
    'large bytearray': {'x': Call('builtins bytearray', (10**12,))},
    'large bytes': {'x': Call('builtins bytes', (10**12,))},
    'large range': {'x': Call('builtins list', (Call('builtins range', (10**12,)),))},
    'large set': {'x': Call('builtins set', ([1, 2],))},
    'deep tuple': {'x': DEEP},
    'deep tuple as a key': {'x': Raw(b'}' + DEEP.code + b'K\x01s')},
    'deep tuple in a set': {'x': Raw(b'\x8f(' + DEEP.code + b'\x90')},
    'deep list': {'x': nested(b']', b'N', b'a', 200_000)},
    'deep dictionary': {'x': nested(b'}K\x01', b'N', b's', 200_000)},
    'list that holds itself': {'x': Raw(b']q\x01h\x01a')},
    'dictionary that holds itself': {'x': Raw(b'}q\x01K\x01h\x01s')},
    'list of lists of lists, shared': {'x': Raw(DOUBLED)},
    'namespace with a class': {'x': Call('argparse Namespace', (), {'__class__': 1}, True)},
    'state for a dictionary': {'x': Call('collections OrderedDict', (), {'__init__': 1})},
    'state for a type': {'x': Raw(encode(Name('argparse Namespace')) + encode({'x': 1}) + b'b')},
    'items for a list': {'x': Raw(b']K\x01K\x02s')},
}  # fmt: skip


def programs() -> dict[str, tuple[bytes, bool]]:
    """(the pickle, whether it must be refused) by name."""
    found = {name: (state_dict(beside), True) for name, beside in REFUSED.items()}
    found |= {f'tensor: {n}': (state_dict(None, t=t), True) for n, t in REFUSED_TENSORS.items()}
    found |= {name: (state_dict(beside), False) for name, beside in HARMLESS.items()}
    return found | {
        'two million instructions': (b'\x80\x02' + b'N0' * 1_100_000 + b'N.', True),
        'no end': (program({})[:-1], True),
        'unhashable': (program({'state_dict': Raw(b'}]K\x01s')}), True),
    }
