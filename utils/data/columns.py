"""Which fields of an unknown schema are the question and the answer: as the user says, or as names and a batch suggest."""

import statistics
from typing import NamedTuple

# Names of fields that hold questions and answers in published data sets, the surest first.
ANSWERS = (
    *("答案", "回答", "回复", "答复", "处方", "方剂", "输出", "治疗", "诊断"),
    *("answer", "response", "output", "completion", "reply", "target", "label", "summary", "assistant"),
)
QUESTIONS = (
    *("问题", "提问", "题目", "题干", "症状", "主诉", "病情", "描述", "输入", "指令"),
    *("question", "query", "instruction", "prompt", "input", "ask", "symptom", "content", "source"),
    *("document", "article", "text", "user", "human", "title"),
)
LEAST_DISTINCT = 0.5  # of a field's texts: below that, it is a category rather than a question or an answer


class UnknownRow(NamedTuple):
    """A row whose fields are not recognised, its texts shortened and other values left out."""

    line: int | str
    row: dict


def suggest_columns(rows: list[dict]) -> tuple[str, str] | None:
    """(question field, answer field) of rows that have the same fields; None where there are no two fields of text.

    A known name decides; for what no name tells, the longest texts of the whole batch are taken, and of two such fields
    the one that asks more often, or comes first, is the question. The length of one row decides nothing.
    """
    texts = {}  # {field: its texts}, of fields that are text, and not the same few texts over and over
    for name in rows[0]:
        found = [row[name].strip() for row in rows if isinstance(row.get(name), str) and row[name].strip()]
        if 2 * len(found) >= len(rows) and len(set(found)) >= LEAST_DISTINCT * len(found):
            texts[str(name)] = found
    answer = _known(texts, ANSWERS)
    question = _known([name for name in texts if name != answer], QUESTIONS)
    rest = sorted(
        (name for name in texts if name not in (answer, question)),
        key=lambda name: -statistics.median(map(len, texts[name])),
    )
    if not answer and not question and len(rest) > 1:
        pair = sorted(rest[:2], key=list(texts).index)
        question = max(pair, key=lambda name: _asking(texts[name]))
        answer = next(name for name in pair if name != question)
    elif not answer and rest:
        answer = rest[0]
    elif not question and rest:
        question = rest[0]
    return (question, answer) if question and answer else None


def look_reversed(question: str, answer: str) -> bool:
    """Whether the two fields' names say the opposite of what they are to be used as."""
    return bool(
        _known([question], ANSWERS)
        and not _known([question], QUESTIONS)
        and _known([answer], QUESTIONS)
        and not _known([answer], ANSWERS)
    )


def _known(names, known):
    """The first of `names` that is a known one, else the first that ends with one; "" where none does."""
    for fits in (str.__eq__, str.endswith):
        for word in known:
            for name in names:
                if fits(name.strip().lower(), word):
                    return name
    return ""


def _asking(texts):
    """The share of texts that ask something."""
    return sum(text.endswith(("？", "?")) or "吗" in text for text in texts) / len(texts)
