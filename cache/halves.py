"""float16 in compiled loops: numba has no such type, the processor has."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_instruction: Any = intrinsic


@_instruction
def from_bits(context: Any, bits: Any) -> Any:
    """The float16 or float32 of these bits (uint16 or uint32), as float32."""
    is_half = bits == types.uint16

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.bitcast(arguments[0], ir.HalfType() if is_half else ir.FloatType())
        return builder.fpext(value, ir.FloatType()) if is_half else value

    return types.float32(bits), generate
