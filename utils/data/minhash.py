"""Which long texts may overlap: MinHash signatures of their shingles, compared in bands.

Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3. What is found this way is compared exactly
afterwards (`overlap`).
"""

import random

import numpy

SHINGLE = 3  # characters
HASHES = 32  # in 8 bands of 4: of pairs that overlap by 0.85, 0.3 % share no band
NEIGHBOURS = 4  # rows of one bucket compared with each row, so that a large bucket costs linear time

_random = random.Random(0)
_XOR = numpy.array([_random.getrandbits(32) for _ in range(HASHES)], dtype=numpy.uint32)
_ODD = numpy.array([_random.getrandbits(32) | 1 for _ in range(HASHES)], dtype=numpy.uint32)


def signatures(texts: list[str]) -> numpy.ndarray:
    """MinHash signatures of texts of at least SHINGLE characters: uint16 array (len(texts), HASHES)."""
    hashes, starts = _hashed_shingles(texts) if texts else (numpy.empty(0, dtype=numpy.uint32), [])
    result = numpy.empty((len(texts), HASHES), dtype=numpy.uint16)
    for index in range(HASHES if texts else 0):
        least = numpy.minimum.reduceat((hashes ^ _XOR[index]) * _ODD[index], starts)
        result[:, index] = (least * numpy.uint32(0x9E3779B1)) >> numpy.uint32(16)
    return result


def _hashed_shingles(texts):
    """(32-bit hashes of the shingles of all texts, one text after the other; where each text's begin)."""
    lengths = numpy.array([len(text) for text in texts])
    codes = numpy.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=numpy.uint32)
    factors = numpy.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35], dtype=numpy.uint32)
    hashes = codes[:-2] * factors[0] ^ codes[1:-1] * factors[1] ^ codes[2:] * factors[2]
    inside = numpy.ones(len(hashes), dtype=bool)
    ends = numpy.cumsum(lengths)[:-1]
    inside[ends - 1] = inside[ends - 2] = False  # no shingle reaches from one text into the next
    hashes = hashes[inside]
    hashes = (hashes ^ hashes >> numpy.uint32(15)) * numpy.uint32(0x2C1B3C6D)
    hashes ^= hashes >> numpy.uint32(13)
    return hashes, numpy.concatenate(([0], numpy.cumsum(lengths - SHINGLE + 1)[:-1]))


def candidate_pairs(
    marks: numpy.ndarray, threshold: float, band: int = 4, neighbours: int = NEIGHBOURS
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Two arrays, the pairs of rows of `marks` (signatures, in an order set by content) that may overlap by `threshold`.

    `band`: hashes that have to agree, 4 or 2; the fewer, the more of the pairs that overlap little are found.
    """
    bands = numpy.ascontiguousarray(marks).view({4: numpy.uint64, 2: numpy.uint32}[band])
    pairs = [numpy.empty(0, dtype=numpy.int64)]
    for number in range(bands.shape[1]):
        order = repeated(bands[:, number])
        # Like rows of a bucket stand side by side.
        order = order[numpy.lexsort((bands[order, (number + 1) % bands.shape[1]], bands[order, number]))]
        keys = bands[order, number]
        for step in range(1, neighbours + 1):
            same = numpy.flatnonzero(keys[step:] == keys[:-step])
            for part in numpy.array_split(same, len(same) // 100_000 + 1):
                one, other = order[part], order[part + step]
                # The estimate's standard error is 0.09 at most: two of them are left as leeway.
                close = (marks[one] == marks[other]).mean(axis=1) >= threshold - 0.2
                low, high = numpy.minimum(one, other)[close], numpy.maximum(one, other)[close]
                pairs.append(low.astype(numpy.int64) * len(marks) + high)
    return divmod(numpy.unique(numpy.concatenate(pairs)), max(1, len(marks)))


def repeated(values: numpy.ndarray) -> numpy.ndarray:
    """Indices, ascending, of the values that are there more than once: usually few, and only they need a closer look."""
    order = numpy.argsort(values)
    same = values[order[1:]] == values[order[:-1]]
    found = numpy.zeros(len(values), dtype=bool)
    found[order[1:][same]] = found[order[:-1][same]] = True
    return numpy.flatnonzero(found)


def shingles(text: str) -> set[str]:
    """All pieces of SHINGLE characters of a text."""
    return {text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)}


def overlap(one: str, other: str) -> float:
    """The Jaccard similarity of the shingles of two texts, 0 to 1."""
    own, others = shingles(one), shingles(other)
    return len(own & others) / len(own | others)


def containment(one: str, other: str) -> float:
    """The share of the shingles of that text that has fewer which the other has too, 0 to 1."""
    own, others = shingles(one), shingles(other)
    return len(own & others) / min(len(own), len(others))
