"""Seeds of a step."""

from __future__ import annotations


def mixed(*numbers: int) -> int:
    """Combine non-negative integers below 2**61 - 1 into a seed in [0, 2**63), independent of the Python version.

    Same as the tuple hash of CPython 3.8 to 3.14 (xxHash), so that runs of older versions, which used ``hash``, resume
    bit for bit.
    """
    first, second, fifth, word = 11400714785074694791, 14029467366897019727, 2870177450012600261, 2**64 - 1
    result = fifth
    for number in numbers:
        result = (result + number * second) & word
        result = (result << 31 | result >> 33) & word
        result = result * first & word
    result = (result + (len(numbers) ^ fifth ^ 3527539)) & word
    return (result if result != word else 1546275796) % 2**63
