"""Exams: single-choice questions from any file that holds some, and the prompts that ask for an option's letter."""

from collections import Counter

from utils.errors import UserError
from utils.files import show_path
from utils.raw_rows import Reject, data_files, detect_encoding, parse_row, read_rows
from utils.schemas import LETTERS, convert_row

# As CMMLU asks (Li et al. 2023, zero-shot). Its own name for the subject stands in where an item names none.
LETTER_PROMPT = "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n题目：{question}\n{options}\n答案是："
SUBJECT = "中医中药"


def read_exam(path):
    """([{"id", "question", "options", "answer", "subject"}, ...], Counter of the reasons why other rows are left out).

    Reads this project's exam.jsonl, CMMLU's csv, and CMB's and CMExam's json. UserError where no row is a single-choice
    question.
    """
    path = data_files([path], "python data_prepare/convert_to_qwen3_format.py")[0]
    encoding = detect_encoding(path)
    exam, left_out = [], Counter()
    for line, raw in read_rows(path, encoding):
        try:
            row = parse_row(raw, encoding)
            item = convert_row(row)
            if item.kind != "exam":
                raise Reject("no exam question")
        except Reject as problem:
            left_out[problem.reason] += 1
            continue
        exam.append({"id": str(row.get("id") or f"{path.stem}:{line}"), **item.body})
    if not exam:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in left_out.items()) or "it is empty"
        raise UserError(f"{show_path(path)}: no single-choice question in it ({reasons})")
    return exam, left_out


def letter_questions(item):
    """[(question with its options listed, the item's own option letters in that order), ...], one for each rotation.

    Over the rotations every option stands once at every place, under every letter.
    """
    order, questions = list(item["options"]), []
    for _ in order:
        options = "\n".join(f"{letter}. {item['options'][own]}" for letter, own in zip(LETTERS, order))
        questions.append((LETTER_PROMPT.format(subject=item["subject"] or SUBJECT, question=item["question"], options=options),
                          order))
        order = order[1:] + order[:1]
    return questions
