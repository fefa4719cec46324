"""The grid of values, the hash of frames, the fixed point of sums: the same for every feature, shard and run, so that results merge exactly.

The grid is that of an HDR histogram: octaves of powers of two, each cut into SUB_BINS equal bins, for either sign. A value's bin
follows from its float32 bits alone. Bins are half-open away from zero: [a, b) for positive values, (-b, -a] for negative ones. Zero is
in no bin. The bins next to zero take all that is smaller than 2^LOWEST_OCTAVE, the outermost ones all that is larger than
2^HIGHEST_OCTAVE.
"""

import numpy as np

SUB_BINS = 16
"""Bins per octave: a bin is at most 1/16 as wide as its values."""
LOWEST_OCTAVE = -12
"""2^-12 is a thousandth of the spread of Whisper's activations and less."""
HIGHEST_OCTAVE = 16
"""2^16 is beyond the largest float16."""
MAGNITUDES = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * SUB_BINS + 1
"""Bins of one sign."""
BINS = 2 * MAGNITUDES
"""Bins in all, ascending in value: 0 is the most negative one, MAGNITUDES the first positive one."""
MANTISSA_SHIFT = 23 - 4
"""What remains of a float32's magnitude after this shift is its exponent and the first 4 bits of its mantissa: octave and sub-bin."""
FIRST_CODE = (127 + LOWEST_OCTAVE) * SUB_BINS - 1
"""Exponent-and-sub-bin code of the bin next to zero; 127 is float32's exponent bias."""
FRACTION_BITS = 64
"""Binary places of fixed-point sums."""

GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""The increment of splitmix64."""


def bin_of(values: np.ndarray) -> np.ndarray:
    """float32 -> int64 bin in [0, BINS); -1 for zero. The plain twin of what `analysis.kernels` does value by value."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.int64)
    magnitude = np.clip(((bits & 0x7FFFFFFF) >> MANTISSA_SHIFT) - FIRST_CODE, 0, MAGNITUDES - 1)
    signed = np.where(bits >> 31 == 0, MAGNITUDES + magnitude, MAGNITUDES - 1 - magnitude)
    return np.where(bits & 0x7FFFFFFF == 0, -1, signed)


def bin_edges() -> np.ndarray:
    """float64 [BINS + 1], ascending: bin i lies between edges i and i + 1."""
    octaves = np.arange(LOWEST_OCTAVE, HIGHEST_OCTAVE)
    inner = np.ldexp(1.0, octaves)[:, None] * (1 + np.arange(SUB_BINS) / SUB_BINS)
    positive = np.append(inner.ravel(), np.ldexp(1.0, HIGHEST_OCTAVE))
    return np.concatenate([-positive[::-1], [0.0], positive])


def frame_hash(seed: int, clip: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """uint64 [n]: a random order of the frames of a data set, the same wherever it is computed."""
    state = _splitmix64(_splitmix64(np.array([seed], np.uint64)) + np.asarray(clip).astype(np.uint64))
    return _splitmix64(state + np.asarray(frame).astype(np.uint64))


def _splitmix64(state: np.ndarray) -> np.ndarray:
    """One output of the generator of Steele, Lea and Flood (OOPSLA 2014) for each state, uint64."""
    z = state + GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fixed_point(sums: np.ndarray) -> np.ndarray:
    """float64 -> Python integers, times 2^FRACTION_BITS: whatever the order of adding them, the sum is the same. Of two axes."""
    return np.array([[int(value) for value in row] for row in np.ldexp(sums, FRACTION_BITS)], dtype=object)
