"""A program compiled for a chip that need not be here, and what it costs there."""

import dataclasses
import re
import time
from typing import Any

import jax

from gcnet_jax.errors import UserError
from gcnet_jax.planning.hlo import Traffic, read_traffic


class OutOfMemory(UserError):
    """The compiler found no way to run the step in the chip's memory.

    Attributes:
      needed_bytes: What it would take, or None where the compiler does not say.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        found = re.search(r'([\d.]+)([MGT])', message)
        scale = {'M': 2**20, 'G': 2**30, 'T': 2**40}
        self.needed_bytes = round(float(found[1]) * scale[found[2]]) if found else None


@dataclasses.dataclass(frozen=True)
class Program:
    """One chip's share of one compiled step; sizes in bytes.

    Attributes:
      arguments, outputs, temporaries, code: What lies in the main memory.
      aliased: Counted in both arguments and outputs: the new state takes the place of the old one.
      flops: As the compiler counts them: a loop's body once.
      bytes_accessed: As the compiler counts them: memory on the chip too, and a loop's body once.
      traffic: HBM bytes and collectives.
      compile_seconds: How long the compiler took here.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    aliased: int
    flops: float
    bytes_accessed: float
    traffic: Traffic
    compile_seconds: float

    @property
    def memory(self) -> int:
        """What must fit into a chip's main memory."""
        return self.arguments + self.outputs + self.temporaries + self.code - self.aliased


def compile_lowered(lowered: jax.stages.Lowered, repeats: int = 1) -> Program:
    """Compiles and reads what it costs.

    Args:
      lowered: For devices that need not be here.
      repeats: How often nearly all of it is run, where the compiler counts it once.

    Raises:
      OutOfMemory: It does not fit into the chip's memory.
    """
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' in str(error):
            raise OutOfMemory(' '.join(str(error).split())) from error
        raise
    seconds = time.perf_counter() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        flops=cost['flops'] * repeats,
        bytes_accessed=cost['bytes accessed'],
        traffic=read_traffic(compiled.as_text()),
        compile_seconds=seconds,
    )


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns the same shapes, each with its sharding."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )
