"""Reads out of a compiled program's HLO text what it moves: to memory, and between devices.

The text is what XLA runs on each device, after the partitioner and every optimisation. It tells
more than the compiler's own cost analysis, which counts accesses to on-chip memory like those to
HBM, and the body of a loop once.
"""

import collections
import dataclasses
import re

KINDS = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'ragged-all-to-all',
    'collective-permute',
    'collective-broadcast',
)
# These move nothing themselves: names for what is there already, or bodies that count for
# themselves. An asynchronous operation counts where it ends.
_FREE = {
    'after-all',
    'bitcast',
    'call',
    'conditional',
    'constant',
    'get-tuple-element',
    'opt-barrier',
    'parameter',
    'partition-id',
    'replica-id',
    'tuple',
    'while',
}
_CONTROL = {'call', 'conditional', 'while'}
# They read as much of their first operand as they return.
_SLICES = {'dynamic-slice', 'gather', 'slice'}
# They write into their first operand, in place, what the operand of this number holds.
_WRITES = {'dynamic-update-slice': 1, 'scatter': 2}
_SAME_DATA = {'bitcast', 'reshape'}

_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
# The text of a tuple's type ends at the first ') opcode(': layouts have brackets, but no words.
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\](\{[^}]*\})?')
_CALLED = re.compile(r'\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)')
_CALLED_LIST = re.compile(r'\b(?:calls|branch_computations|called_computations)=\{([^}]*)\}')
_CONDITION = re.compile(r'\bcondition=%?([\w.\-]+)')
_CHANNEL = re.compile(r'\bchannel_id=(\d+)')
_TURNS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind in one run of a program.

    Attributes:
      count: How many there are; those in a loop count for each turn.
      bytes: Size of the arrays that are reduced, gathered or exchanged, as one device has them
        whole: the argument, and of an all-gather the result. What passes the links depends on the
        algorithm; in a ring an all-reduce sends nearly twice its argument.
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device moves in one run of a program.

    Attributes:
      collectives: By kind, such as 'all-reduce'.
      hbm_bytes: Read from and written to the main memory: every operand and every result of every
        fused operation that lives there, once; of an array that is sliced, or written into, those
        slices. Memory on the chip (VMEM) is left out.
      unknown_loops: Loops with an unknown number of iterations; their contents count once.
    """

    collectives: dict[str, Collective]
    hbm_bytes: int
    unknown_loops: int = 0


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    shape: str
    rest: str  # Operands and attributes.
    is_root: bool = False

    def operands(self) -> list[str]:
        depth, end = 1, 0
        for match in re.finditer(r'[()]', self.rest):
            depth += 1 if match[0] == '(' else -1
            if depth == 0:
                end = match.start()
                break
        return re.findall(r'%([\w.\-]+)', self.rest[:end])

    def called(self) -> list[str]:
        names = _CALLED.findall(self.rest)
        for group in _CALLED_LIST.findall(self.rest):
            names += [item.strip().lstrip('%') for item in group.split(',')]
        return names


def read_traffic(text: str) -> Traffic:
    """Returns what a compiled program moves.

    Args:
      text: HLO of a compiled program, `compiled.as_text()`.
    """
    reader = _Reader(*_parse(text))
    reader.visit(reader.entry, 1)
    kinds = {
        kind: Collective(reader.counts[kind], reader.sizes[kind]) for kind in sorted(reader.counts)
    }
    return Traffic(kinds, reader.hbm_bytes, reader.unknown_loops)


class _Reader:
    """Follows the calls between computations and adds up their costs."""

    def __init__(self, computations: dict[str, dict[str, _Instruction]], entry: str) -> None:
        self.computations, self.entry = computations, entry
        self.counts, self.sizes = collections.Counter(), collections.Counter()
        self.hbm_bytes = self.unknown_loops = 0
        self._channels = set()

    def visit(self, name: str, times: int, fused: bool = False) -> None:
        """Adds `times` runs of a computation; of a fused one only the collectives count."""
        instructions = self.computations.get(name, {})
        for instruction in instructions.values():
            opcode = instruction.opcode
            self._add_collective(name, instruction, instructions, times, fused)
            if not fused:
                body = self._fused_body(instruction)
                self.hbm_bytes += times * _memory_bytes(instruction, instructions, body)
            turns = self._turns(instruction) if opcode == 'while' else 1
            if '=' in instruction.rest:
                for called in instruction.called():
                    self.visit(called, times * turns, fused or opcode not in _CONTROL)

    def _fused_body(self, instruction: _Instruction) -> dict[str, _Instruction]:
        called = instruction.called() if instruction.opcode == 'fusion' else []
        return self.computations.get(called[0], {}) if called else {}

    def _add_collective(self, computation, instruction, instructions, times, fused) -> None:
        kind = _kind(instruction.opcode)
        if kind is None:
            return
        channel = _CHANNEL.search(instruction.rest)
        if fused and channel:
            # Overlapped with computation, one collective stands in every operation beside it.
            if channel[1] in self._channels:
                return
            self._channels.add(channel[1])
        if fused and computation.startswith('all-reduce-scatter'):
            kind = 'reduce-scatter'
        size = array_bytes(instruction.shape)
        if kind != 'all-gather':
            operands = [name for name in instruction.operands() if name in instructions]
            size = sum(array_bytes(instructions[name].shape) for name in operands) or size
        self.counts[kind] += times
        self.sizes[kind] += times * size

    def _turns(self, loop: _Instruction) -> int:
        """How often a loop's body runs: as noted, or counted from 0 up to a constant."""
        noted = _TURNS.search(loop.rest)
        if noted:
            return int(noted[1])
        condition = _CONDITION.search(loop.rest)
        steps = list(self.computations.get(condition[1], {}).values()) if condition else []
        limits = [step.rest for step in steps if step.opcode == 'constant']
        compared = [step.rest for step in steps if step.opcode == 'compare']
        if len(limits) == len(compared) == 1 and 'direction=LT' in compared[0]:
            limit = re.match(r'(\d+)\)', limits[0])
            if limit:
                return int(limit[1])
        self.unknown_loops += 1
        return 1


def _kind(opcode: str) -> str | None:
    """Returns the kind of a collective, once for a pair of start and done operations.

    The size of an all-gather is read from its end, that of the others from their start.
    """
    opcode = opcode.removesuffix('-done' if opcode.startswith('all-gather') else '-start')
    return opcode if opcode in KINDS else None


def _memory_bytes(
    instruction: _Instruction, known: dict[str, _Instruction], body: dict[str, _Instruction]
) -> int:
    """What an instruction moves from and to main memory; `body` is that of a fusion, else empty."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(('-start', '-update')):
        return 0
    operands = [known[name] for name in instruction.operands() if name in known]
    written = array_bytes(instruction.shape, main_memory_only=True)
    if opcode.endswith('-done') and operands:
        # A copy or a slice reads as much as it writes, from wherever its start took it.
        start = operands[0]
        sources = [known[name].shape for name in start.operands() if name in known]
        read = sum(array_bytes(shape, main_memory_only=True) for shape in sources)
        return written + min(read, array_bytes(instruction.shape))
    if not body:
        parameters = [name for name in instruction.operands() if name in known]
        body = {name: _Instruction('parameter', known[name].shape, '') for name in parameters}
        body['root'] = dataclasses.replace(instruction, is_root=True)
    else:
        numbers = {name: item.rest for name, item in body.items() if item.opcode == 'parameter'}
        parameters = sorted(numbers, key=lambda name: int(numbers[name].split(')')[0]))
    sizes = [array_bytes(operand.shape, main_memory_only=True) for operand in operands]
    return _body_bytes(body, list(zip(parameters, sizes, strict=False)), written)


def _body_bytes(
    body: dict[str, _Instruction], parameters: list[tuple[str, int]], result: int
) -> int:
    """What a computation reads of its parameters and writes of its result; their sizes are given.

    Of an array that it slices, or writes into, that is those slices. An operand that is given twice
    is twice among the parameters.
    """
    users = collections.defaultdict(list)
    for name, item in body.items():
        for used in dict.fromkeys(item.operands()):
            users[used].append(name)
    roots = [name for name, item in body.items() if item.is_root]
    total = min(result, sum(_written_bytes(name, body) for name in roots) if roots else result)
    for name, size in parameters:
        total += min(size, _read_bytes(name, body, users)) if size else 0
    return total


def _read_bytes(name: str, body: dict[str, _Instruction], users: dict[str, list[str]]) -> float:
    """How much of one of its arrays a computation reads; infinity for all of it."""
    total = 0
    for user_name in users[name]:
        user = body[user_name]
        operands = user.operands()
        if user.opcode in _SAME_DATA and not user.is_root:
            total += _read_bytes(user_name, body, users)
        elif operands.index(name) > 0 or operands.count(name) > 1:
            return float('inf')
        elif user.opcode in _SLICES:
            total += array_bytes(user.shape)
        elif user.opcode not in _WRITES or not _is_result(user_name, body, users):
            return float('inf')
        elif user.opcode == 'scatter':  # It adds to what is there.
            total += _written_bytes(user_name, body)
    return total


def _is_result(name: str, body: dict[str, _Instruction], users: dict[str, list[str]]) -> bool:
    """Whether a computation only returns this, and reads nothing of it."""
    passed_on = all(
        body[user].opcode in (*_SAME_DATA, 'tuple') and _is_result(user, body, users)
        for user in users[name]
    )
    return passed_on and (body[name].is_root or bool(users[name]))


def _written_bytes(name: str, body: dict[str, _Instruction]) -> float:
    """How much of a result a computation writes; infinity for all of it."""
    if name not in body:
        return float('inf')
    item = body[name]
    operands = item.operands()
    if item.opcode == 'tuple':
        return sum(_written_bytes(operand, body) for operand in operands)
    if item.opcode in _SAME_DATA and operands:
        return min(array_bytes(item.shape), _written_bytes(operands[0], body))
    place = _WRITES.get(item.opcode, len(operands))
    if place < len(operands) and operands[place] in body:
        return array_bytes(body[operands[place]].shape)
    return array_bytes(item.shape)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    """Returns the instructions of every computation by name, and which one is the entry."""
    computations, entry, current = {}, '', {}
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            root, name, shape, opcode, rest = match.groups()
            current[name] = _Instruction(opcode, shape, rest, is_root=bool(root))
            continue
        match = _HEADER.match(line)
        if match:
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
    return computations, entry


def array_bytes(shape: str, main_memory_only: bool = False) -> int:
    """Returns the size of an array, or of all arrays of a tuple, by its type in HLO text.

    Args:
      shape: Such as `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`, where `S(1)` is a memory on the chip.
      main_memory_only: Leave out what lives in another memory than the main one.
    """
    total = 0
    for element, dimensions, layout in _ARRAY.findall(shape):
        if main_memory_only and 'S(' in layout:
            continue
        bits = 8 if element == 'pred' else int(re.search(r'\d+', element)[0])
        for size in re.findall(r'\d+', dimensions):
            bits *= int(size)
        total += -(-bits // 8)
    return total
