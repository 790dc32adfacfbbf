"""Exams: the prompts that ask for an answer, how an option is chosen, and files of single-choice questions."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from utils.data.exam_rows import LETTERS, MULTIPLE
from utils.data.readers import parse_row, read_rows
from utils.data.reject import Reject
from utils.data.schemas import convert_row
from utils.data.sources import find_sources
from utils.device import Device
from utils.errors import UserError
from utils.files import show_path
from utils.model.chat_format import encode_prompt, encode_text
from utils.model.logprobs import answer_logps, next_token_logps, pack_for_scoring

# By option text: the options are not listed, and the instruction asks for the bare fact that they are.
TEXT_PROMPT = "{question}\n{instruction}"
INSTRUCTION = "请只写出答案。"

# By option letter, as CMMLU asks (Li et al. 2023, zero-shot). SUBJECT, its own name for ours, stands in where an item has none.
LETTER_PROMPT = (
    "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n题目：{question}\n{options}\n答案是："
)
SUBJECT = "中医中药"


def prompt_texts() -> dict[str, str]:
    """All texts of this file that decide a score: part of the key under which results are kept."""
    return {"text": TEXT_PROMPT, "instruction": INSTRUCTION, "letter": LETTER_PROMPT, "subject": SUBJECT}


class ExamQuestion(TypedDict):
    id: str
    question: str
    options: dict[str, str]
    answer: str
    subject: str


class TextChoice(NamedTuple):
    letter: str
    scores: dict[str, float]


class LetterChoice(NamedTuple):
    letter: str
    scores: dict[str, float]
    rotations: list[dict[str, float]]


def choices_by_text(
    model, tokenizer, exam: list[ExamQuestion], device: Device, watch: Callable = iter
) -> list[TextChoice]:
    """For each question the letter of the best option and {letter: score}.

    The score is the log-probability of an option's text as the answer, divided by its length in characters. It is what
    lm-evaluation-harness calls acc_norm, with one difference: the harness moves white space at the end of a prompt into every
    option. Qwen3's prompt ends in two line breaks, so their log-probability and length count in its acc_norm, and not here.
    """
    items = []
    for item in exam:
        prompt = _prompt(tokenizer, TEXT_PROMPT.format(question=item["question"], instruction=INSTRUCTION))
        items.append(
            {"documents": [(prompt, encode_text(tokenizer, text)) for text in item["options"].values()]}
        )
    choices = []
    for item, logps in zip(exam, answer_logps(model, pack_for_scoring(items), device, watch)):
        scores = {letter: logp / len(text) for (letter, text), logp in zip(item["options"].items(), logps)}
        choices.append(TextChoice(_best(scores), scores))
    return choices


def choices_by_letter(
    model, tokenizer, exam: list[ExamQuestion], device: Device, watch: Callable = iter
) -> list[LetterChoice]:
    """For each question the letter of the best option, {letter: score}, and the log-probabilities of every rotation.

    The options are listed in the question, and the model's answer is the letter that it finds likeliest. This is asked for
    every rotation of the options; `rotations` holds for each the log-probability of the letter under which an option
    stood, by the option's own letter. The score is the mean over the rotations, so that what a model gives to a letter,
    whatever stands under it, adds the same to every option.
    """
    questions = [letter_questions(item) for item in exam]
    prompts = [_prompt(tokenizer, question) for rotations in questions for question, _ in rotations]
    letters = LETTERS[: max(len(item["options"]) for item in exam)]
    tokens = tokenizer(list(letters), add_special_tokens=False)["input_ids"]
    assert all(len(ids) == 1 for ids in tokens), "every tokenizer of bytes has the Latin letters"
    logps = iter(next_token_logps(model, prompts, [token for [token] in tokens], device, watch))
    choices = []
    for item, asked in zip(exam, questions):
        rotations = [dict(zip(order, next(logps))) for _, order in asked]
        scores = {
            letter: sum(rotation[letter] for rotation in rotations) / len(rotations)
            for letter in item["options"]
        }
        choices.append(LetterChoice(_best(scores), scores, rotations))
    return choices


def letter_questions(item: ExamQuestion) -> list[tuple[str, list[str]]]:
    """[(question with its options listed, the item's own option letters in that order), ...], one for each rotation.

    Over the rotations every option stands once at every place, under every letter.
    """
    order, questions = list(item["options"]), []
    for _ in order:
        options = "\n".join(f"{letter}. {item['options'][own]}" for letter, own in zip(LETTERS, order))
        subject = item["subject"] or SUBJECT
        question = LETTER_PROMPT.format(subject=subject, question=item["question"], options=options)
        questions.append((question, order))
        order = order[1:] + order[:1]
    return questions


def _prompt(tokenizer, question):
    """Thinking off, whatever the folder's own mode: an exam scores what the model says at once."""
    return encode_prompt(tokenizer, [{"role": "user", "content": question}], thinking=False)


def _best(scores):
    return max(scores, key=scores.get)


def read_exam(path: Path) -> tuple[list[ExamQuestion], Counter[str]]:
    """The questions of a file, and the reasons why other rows are left out, counted.

    Reads this project's exam.jsonl, CMMLU's csv, and CMB's and CMExam's json. UserError where no row is a single-choice
    question.
    """
    source = find_sources([path], "python data_prepare/convert_to_qwen3_format.py")[0][0]
    exam: list[Any] = []
    left_out: Counter[str] = Counter()
    for line, raw in read_rows(source):
        try:
            row = parse_row(raw, source.encoding)
            item = convert_row(row)
            if item.kind != "exam":
                raise Reject("no exam question")
            if item.body.get("kind") == MULTIPLE:
                raise Reject("several right answers")
        except Reject as problem:
            left_out[problem.reason] += 1
            continue
        exam.append({"id": str(row.get("id") or f"{path.stem}:{line}"), **item.body})
    if not exam:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in left_out.items()) or "it is empty"
        raise UserError(f"{show_path(path)}: no single-choice question in it ({reasons})")
    return exam, left_out
