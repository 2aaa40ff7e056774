"""Keys of documents: hashes that alone determine what is taken and in which order."""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

KEY_END = 2**64


def batch_keys(seed: int, file_name: str, lines: Sequence[int]) -> NDArray[np.uint64]:
    """Return the keys of documents of one file by their lines, each uniform in [0, 2^64).

    Returns: [lines, 2]: `drop_key` and `order_key`.

    >>> keys = batch_keys(0, "a.jsonl", [1, 2])
    >>> keys.shape, len(set(keys.flat))
    ((2, 2), 4)
    """
    prefix, digest = f"{file_name}\0".encode(), xxhash.xxh3_128_digest
    joined = b"".join([digest(prefix + b"%d" % line, seed) for line in lines])
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2)


def threshold(probability: float) -> np.uint64:
    """Return the key below which a document is with this probability; keys are compared with `<=`.

    >>> int(threshold(0.5)) == 2**63 - 1, int(threshold(1.0)) == 2**64 - 1
    (True, True)
    """
    return np.uint64(max(min(int(probability * KEY_END), KEY_END) - 1, 0))


def below(keys: NDArray[np.uint64], probability: float) -> NDArray[np.bool_]:
    """Mark the keys of documents that are taken with this probability.

    >>> below(np.array([0, 2**63, 2**64 - 1], np.uint64), 0.5).tolist()
    [True, False, False]
    """
    if probability <= 0:
        return np.zeros(len(keys), np.bool_)
    return keys <= threshold(probability)


def below_each(keys: NDArray[np.uint64], probabilities: NDArray) -> NDArray[np.bool_]:
    """Mark the keys of documents that are taken with a probability of their own.

    >>> below_each(np.array([0, 2**63, 2**64 - 1], np.uint64), np.array([0.0, 0.6, 1.0])).tolist()
    [False, True, True]
    """
    return (keys / KEY_END <= probabilities) & (probabilities > 0)


def mix_keys(keys: NDArray[np.uint64], number: NDArray | int) -> NDArray[np.uint64]:
    """Scramble keys (splitmix64's finalizer), differently for each number: the pass, or the piece.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    steps = np.atleast_1d(np.asarray(number)).astype(np.uint64) + np.uint64(1)
    mixed = keys + steps * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
