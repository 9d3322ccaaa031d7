"""Reads the pickles in PyTorch files without building anything that they ask for.

A pickle is a program for a machine with a stack. The machine here knows every instruction that
torch.save writes, but no class and no function: a name that a pickle imports becomes a `Global`,
an object becomes a `Record` of its fields, a tensor becomes a description of where its values lie
in the file. Only dictionaries, lists, tuples, strings and numbers are what they seem.
"""

import dataclasses
import pickletools
import re
import struct
from collections.abc import Callable
from io import BytesIO
from typing import Any

from gcnet_jax.porting.pickled_values import (
    MAX_NUMBER,
    PLAIN,
    PYTHON_3,
    STORAGES,
    DamagedPickle,
    Global,
    NumpyType,
    Record,
    Storage,
    TooLarge,
    is_count,
    is_key,
)

# Limits of what is read. The pickle of a ResNet-50 with its optimizer has 30,000 instructions.
MAX_PICKLE_BYTES = 64 * 2**20
MAX_INSTRUCTIONS = 2_000_000


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a pickle holds.

    Attributes:
      value: Its object.
      foreign: The first class or function named in it that is not plain data; '' without one.
      storages: Every storage by its key.
      end: Number of bytes up to the end of the pickle.
    """

    value: Any
    foreign: str
    storages: dict[str, Storage]
    end: int


def read_pickle(data: BytesIO) -> Contents:
    """Reads the pickle that starts where `data` stands.

    Raises:
      DamagedPickle: Not a pickle, a damaged one, or one with more instructions than are read.
    """
    machine = _Machine()
    try:
        return machine.run(data)
    except DamagedPickle:
        raise
    except IndexError:
        raise DamagedPickle('its pickle takes from an empty stack') from None
    except (
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
        struct.error,
        MemoryError,
        RecursionError,
    ) as error:
        raise DamagedPickle(f'its pickle: {str(error) or type(error).__name__}') from None


class _Machine:
    """The stack, the memo and what was met so far."""

    def __init__(self):
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # what was on the stack below each mark
        self.memo: dict[int, Any] = {}
        self.foreign = ''
        self.storages: dict[str, Storage] = {}
        self.work = 0

    def run(self, data: BytesIO) -> Contents:
        for instruction, argument, _ in pickletools.genops(data):
            self.count(1)
            name = instruction.name
            if name in _PUSHES_ARGUMENT:
                self.stack.append(argument)
            elif name in _PUSHES:
                self.stack.append(_PUSHES[name]())
            elif name == 'STOP':
                return Contents(self.stack.pop(), self.foreign, self.storages, data.tell())
            elif name in _INSTRUCTIONS:
                _INSTRUCTIONS[name](self, argument)
            else:
                raise DamagedPickle(f'its pickle has the instruction {name}')
        raise DamagedPickle('its pickle has no end')

    def count(self, steps: int) -> None:
        self.work += steps
        if self.work > MAX_INSTRUCTIONS:
            raise TooLarge(f'at most {MAX_INSTRUCTIONS:,} instructions of a pickle are read')

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def put(self, index: int, value: Any) -> None:
        if not 0 <= index < MAX_NUMBER:
            raise DamagedPickle(f'its pickle has the memo entry {index}')
        self.memo[index] = value

    def name(self, module: Any, name: Any) -> Global:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise DamagedPickle('its pickle names a class that is no text')
        found = Global(PYTHON_3.get(module, module), name)
        if found not in PLAIN and not self.foreign:
            self.foreign = str(found)
        return found

    def call(self, function: Any, arguments: Any) -> Any:
        """What stands for the result of a call; nothing is called but the readers below."""
        if not isinstance(arguments, tuple):
            raise DamagedPickle('its pickle has a call without arguments')
        reader = PLAIN.get(function) if isinstance(function, Global) else None
        return reader(self, *arguments) if reader else Record(str(_name_of(function)))

    def set_items(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict):
            return  # of a class that is a mapping: what it holds does not matter
        for key, value in zip(items[::2], items[1::2], strict=True):
            if is_key(key):
                target[key] = value

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Record) and isinstance(state, dict):
            target.fields = state
        elif isinstance(target, NumpyType) and isinstance(state, tuple) and len(state) > 1:
            target.order = state[1] if state[1] in ('<', '>') else '='

    def find_storage(self, found: Any) -> Any:
        """What stands for a persistent id: a storage, or the class of a pickled module."""
        if isinstance(found, tuple) and len(found) == 4 and found[0] == 'module':
            return found[1]
        if not (isinstance(found, tuple) and len(found) in (5, 6) and found[0] == 'storage'):
            raise DamagedPickle('its pickle has a reference to no storage')
        _, kind, key, _, size = found[:5]
        if found[5:] not in ((), (None,)):
            raise DamagedPickle('it has views of storages, which torch wrote before 0.4')
        dtype = STORAGES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or not isinstance(key, str) or not is_count(size):
            raise DamagedPickle('its pickle has a reference to a storage of no type or size')
        storage = Storage(key, dtype, size)
        if self.storages.setdefault(key, storage).bytes != storage.bytes:
            raise DamagedPickle('its pickle gives one storage two sizes')
        return storage


def _name_of(function: Any) -> Any:
    return function if isinstance(function, Global) else getattr(function, 'of', 'object')


# Instructions -------------------------------------------------------------------------------------

_PUSHES_ARGUMENT = frozenset(
    re.findall(
        r'\w+',
        'BININT BININT1 BININT2 INT LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING '
        'SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES '
        'BINBYTES8',
    )
)
_PUSHES: dict[str, Callable[[], Any]] = {
    'NONE': lambda: None,
    'NEWTRUE': lambda: True,
    'NEWFALSE': lambda: False,
    'EMPTY_LIST': list,
    'EMPTY_DICT': dict,
    'EMPTY_TUPLE': tuple,
    'EMPTY_SET': lambda: Record('set'),
    'BYTEARRAY8': lambda: Record('bytearray'),
}


def _mark(machine: _Machine, _: Any) -> None:
    machine.outer.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine, _: Any) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _put(machine: _Machine, index: Any) -> None:
    machine.put(len(machine.memo) if index is None else index, machine.stack[-1])


def _get(machine: _Machine, index: int) -> None:
    machine.stack.append(machine.memo[index])


def _list(machine: _Machine, _: Any) -> None:
    items = machine.pop_mark()
    machine.stack.append(items)


def _tuple(machine: _Machine, _: Any) -> None:
    items = machine.pop_mark()
    machine.stack.append(tuple(items))


def _short_tuple(size: int) -> Callable[[_Machine, Any], None]:
    def make(machine: _Machine, _: Any) -> None:
        items = [machine.stack.pop() for _ in range(size)]
        machine.stack.append(tuple(reversed(items)))

    return make


def _dict(machine: _Machine, _: Any) -> None:
    items, made = machine.pop_mark(), {}
    machine.set_items(made, items)
    machine.stack.append(made)


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items(machine.stack[-1], [key, value])


def _set_items(machine: _Machine, _: Any) -> None:
    items = machine.pop_mark()
    machine.set_items(machine.stack[-1], items)


def _append(machine: _Machine, _: Any) -> None:
    item = machine.stack.pop()
    if isinstance(machine.stack[-1], list):
        machine.stack[-1].append(item)


def _appends(machine: _Machine, _: Any) -> None:
    items = machine.pop_mark()
    if isinstance(machine.stack[-1], list):
        machine.stack[-1].extend(items)


def _frozen_set(machine: _Machine, _: Any) -> None:
    machine.pop_mark()
    machine.stack.append(Record('frozenset'))


def _global(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(' ')
    machine.stack.append(machine.name(module, name))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.name(module, name))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(function, arguments))


def _new(machine: _Machine, _: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(function, arguments))


def _new_with_names(machine: _Machine, _: Any) -> None:
    del machine.stack[-2:]
    machine.stack.append(Record(str(_name_of(machine.stack.pop()))))


def _build(machine: _Machine, _: Any) -> None:
    state = machine.stack.pop()
    machine.build(machine.stack[-1], state)


def _persistent(machine: _Machine, _: Any) -> None:
    machine.stack.append(machine.find_storage(machine.stack.pop()))


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    'PROTO': lambda machine, _: None,
    'FRAME': lambda machine, _: None,
    'MARK': _mark,
    'POP': _pop,
    'POP_MARK': lambda machine, _: machine.pop_mark() and None,
    'DUP': lambda machine, _: machine.stack.append(machine.stack[-1]),
    'PUT': _put,
    'BINPUT': _put,
    'LONG_BINPUT': _put,
    'MEMOIZE': _put,
    'GET': _get,
    'BINGET': _get,
    'LONG_BINGET': _get,
    'LIST': _list,
    'TUPLE': _tuple,
    'TUPLE1': _short_tuple(1),
    'TUPLE2': _short_tuple(2),
    'TUPLE3': _short_tuple(3),
    'DICT': _dict,
    'SETITEM': _set_item,
    'SETITEMS': _set_items,
    'APPEND': _append,
    'APPENDS': _appends,
    'ADDITEMS': lambda machine, _: machine.pop_mark() and None,
    'FROZENSET': _frozen_set,
    'GLOBAL': _global,
    'STACK_GLOBAL': _stack_global,
    'REDUCE': _reduce,
    'NEWOBJ': _new,
    'NEWOBJ_EX': _new_with_names,
    'BUILD': _build,
    'BINPERSID': _persistent,
}
