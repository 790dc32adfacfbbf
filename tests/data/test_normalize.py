"""Texts as they are compared."""

import pytest

from utils.data.normalize import normalize


@pytest.mark.parametrize(
    "one, other, equal",
    [
        ("麻黄，1.5克？", "麻黄15克", False),
        ("麻黄 １５ 克", "麻黄15克", True),
        ("10㎎", "10mg", True),
        ("ＡＢＣ、甲", "abc甲", True),
        ("血糖>7", "血糖<7", False),
        ("①…，①", "11", True),
        ("3-5天", "35天", False),
        ("10％", "10%", True),
    ],
)
def test_normalise(one, other, equal):
    assert (normalize(one) == normalize(other)) == equal
