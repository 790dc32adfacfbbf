"""How sure a metric is: 95 % intervals of shares and of losses, and whether two models differ on the same items."""

import math

Z = 1.96  # a normal distribution holds 95 % within this many standard deviations


def wilson(right: int, total: int) -> list[float]:
    """[low, high]: the interval of a share `right` / `total` (Wilson 1927)."""
    share, spread = right / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return [max(0.0, centre - half), min(1.0, centre + half)]  # rounding alone would leave -0.0


def mean_per_token(sums: list[float], tokens: list[int]) -> tuple[float, list[float] | None]:
    """(mean, [low, high]) of sum(sums) / sum(tokens), one of each per item (ratio estimate, Cochran 1977).

    Items count as independent; the tokens of one answer are not. One item alone says nothing of the spread: its interval is
    None.
    """
    mean, count = sum(sums) / sum(tokens), len(sums)
    if count < 2:
        return mean, None
    squares = sum((part - mean * weight) ** 2 for part, weight in zip(sums, tokens))
    half = Z * math.sqrt(squares * count / (count - 1)) / sum(tokens)
    return mean, [mean - half, mean + half]


def discordant(one: list[bool], other: list[bool]) -> tuple[int, int]:
    """(items that only `one` has right, items that only `other` has right), for the same items."""
    pairs = list(zip(one, other, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def mcnemar(one: list[bool], other: list[bool]) -> float:
    """p, two-sided and exact, that two models with such answers to the same items are equally good (McNemar 1947)."""
    first, second = discordant(one, other)
    total = first + second
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(min(first, second) + 1)) / 2**total)


def share_difference(one: list[bool], other: list[bool]) -> tuple[float, list[float]]:
    """(share of `other` - share of `one`, [low, high]) for the same items (Agresti and Min 2005).

    The interval adds half an item to each of the four cells, so that it has a width where no item differs.
    """
    first, second = discordant(one, other)
    total = len(one) + 2
    centre = (second - first) / total
    half = Z * math.sqrt((first + second + 1) / total - centre**2) / math.sqrt(total)
    return (second - first) / len(one), [centre - half, centre + half]
