"""The questions that models are asked: the tests, and files of exam questions. Without torch, so that a wrong file is told at once."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.exams import SINGLE
from utils.data.inputs import find_input_files
from utils.data.messages import Reject
from utils.data.schemas import convert_rows
from utils.data.texts import Terms
from utils.errors import UserError
from utils.files import show_path

# {"id", "question", "options": {letter: text}, "answer": the right letters in order, "subject", "kind" unless it is SINGLE}
ExamQuestion = dict[str, Any]


def kind_of(item: ExamQuestion) -> str:
    """SINGLE, TRUE_FALSE or MULTIPLE."""
    return item.get("kind", SINGLE)


class Tests(NamedTuple):
    """The questions that every model is asked: rows of the project's files (no rows: this test is left out)."""

    heldout: list[dict]
    exam: list[ExamQuestion]
    pairs: list[dict]
    general: list[dict]
    terms: Terms


def read_exam(path: Path) -> tuple[list[ExamQuestion], Counter[str]]:
    """The questions of a file, and the reasons why other rows are left out, counted.

    Reads this project's exam.jsonl and all that the conversion knows as an exam (utils/data/exams.py), in all files of an
    archive and all sheets of a book. UserError if no row is a question.
    """
    files, _ = find_input_files([path], "python data_prepare/convert_to_qwen3_format.py")
    exam: dict[str, Any] = {}
    left_out: Counter[str] = Counter()
    for file in files:
        for place, _, row, item in convert_rows(file):
            if isinstance(item, Reject) or item.kind != "exam":
                left_out[item.reason if isinstance(item, Reject) else "another kind of row"] += 1
                continue
            given, own = str(row.get("id") or ""), f"{file.name if file.member else path.stem}:{place}"
            name = own if not given or given in exam else given  # results are found by id: each once
            exam[name] = {"id": name, **item.body}
    if not exam:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in left_out.items()) or "it is empty"
        raise UserError(f"{show_path(path)}: no exam question in it ({reasons})")
    return list(exam.values()), left_out
