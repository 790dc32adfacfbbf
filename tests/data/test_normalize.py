"""Texts as they are compared."""

import random

import pytest

from utils.data.normalize import normalize, normalize_all


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


@pytest.mark.slow
def test_normalise_all_is_normalise():
    characters = [chr(code) for code in range(1, 0x10000) if not 0xD800 <= code < 0xE000]
    # digits, and what joins with a mark after it
    neighbours = ("1{}2", "a{}1", "は{}", "ᄀ{}", "가{}", "{}{}", ".{}1")
    texts = [form.replace("{}", character) for character in characters for form in neighbours]
    chance = random.Random(0)
    mixture = [*"1234567890.，,% 一二三\n\1_<>=あ℃①Ⅱ𠀀e\u0301", *chance.choices(characters, k=30)]
    texts += ["".join(chance.choices(mixture, k=chance.randint(0, 12))) for _ in range(50_000)]
    assert normalize_all(texts) == [normalize(text) for text in texts]
    for texts in ([], [""], ["", ""], ["a\0b，", "1"], ["\ud800，", "甲，"]):
        assert normalize_all(texts) == [normalize(text) for text in texts]
