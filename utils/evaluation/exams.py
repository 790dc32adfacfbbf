"""Exams: single-choice questions from any file that holds some, and the prompts that ask for an option's letter."""

from collections import Counter

from utils.data.exam_rows import LETTERS, MULTIPLE
from utils.data.readers import parse_row, read_rows
from utils.data.reject import Reject
from utils.data.schemas import convert_row
from utils.data.sources import find_sources
from utils.errors import UserError
from utils.files import show_path
from utils.model.chat_format import encode_prompt
from utils.model.logprobs import answer_logps, next_token_logps, pack_for_scoring


def exam_choices(model, tokenizer, exam, instruction, device, watch=iter):
    """By option text: for each exam item (letter of the best option, {letter: score}).

    The options are not listed; the score is the log-probability of an option's text as the answer to the question and
    `instruction`, divided by its length in characters, as lm-evaluation-harness's acc_norm does.
    """
    items = []
    for item in exam:
        prompt = _prompt(tokenizer, f"{item['question']}\n{instruction}")
        options = tokenizer(list(item["options"].values()), add_special_tokens=False)["input_ids"]
        items.append({"documents": [(prompt, option) for option in options]})
    choices = []
    for item, logps in zip(exam, answer_logps(model, pack_for_scoring(items), device, watch)):
        scores = {letter: logp / len(text) for (letter, text), logp in zip(item["options"].items(), logps)}
        choices.append((max(scores, key=scores.get), scores))
    return choices


def exam_letter_choices(model, tokenizer, exam, device, watch=iter):
    """By option letter, as CMMLU does: for each exam item (letter of the best option, {letter: score}, rotations).

    The options are listed in the question, and the model's answer is the letter that it finds likeliest. This is asked for
    every rotation of the options; `rotations` holds for each the log-probability of the letter under which an option
    stood, by the option's own letter. The score is the mean over the rotations, so that what a model gives to a letter,
    whatever stands under it, adds the same to every option.
    """
    questions = [letter_questions(item) for item in exam]
    prompts = [_prompt(tokenizer, question) for rotations in questions for question, _ in rotations]
    letters = LETTERS[: max(len(item["options"]) for item in exam)]
    tokens = [
        token for letter in letters for token in tokenizer(letter, add_special_tokens=False)["input_ids"]
    ]
    assert len(tokens) == len(letters), "every tokenizer of bytes has the Latin letters"
    logps, choices = iter(next_token_logps(model, prompts, tokens, device, watch)), []
    for item, rotations in zip(exam, questions):
        rotations = [dict(zip(order, next(logps))) for _, order in rotations]
        scores = {
            letter: sum(rotation[letter] for rotation in rotations) / len(rotations)
            for letter in item["options"]
        }
        choices.append((max(scores, key=scores.get), scores, rotations))
    return choices


def _prompt(tokenizer, question):
    """Thinking off, whatever the folder's own mode: an exam scores what the model says at once."""
    return encode_prompt(tokenizer, [{"role": "user", "content": question}], thinking=False)


# As CMMLU asks (Li et al. 2023, zero-shot). Its own name for the subject stands in where an item names none.
LETTER_PROMPT = (
    "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n题目：{question}\n{options}\n答案是："
)


SUBJECT = "中医中药"


def read_exam(path):
    """([{"id", "question", "options", "answer", "subject"}, ...], Counter of the reasons why other rows are left out).

    Reads this project's exam.jsonl, CMMLU's csv, and CMB's and CMExam's json. UserError where no row is a single-choice
    question.
    """
    source = find_sources([path], "python data_prepare/convert_to_qwen3_format.py")[0][0]
    exam, left_out = [], Counter()
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


def letter_questions(item):
    """[(question with its options listed, the item's own option letters in that order), ...], one for each rotation.

    Over the rotations every option stands once at every place, under every letter.
    """
    order, questions = list(item["options"]), []
    for _ in order:
        options = "\n".join(f"{letter}. {item['options'][own]}" for letter, own in zip(LETTERS, order))
        questions.append(
            (
                LETTER_PROMPT.format(
                    subject=item["subject"] or SUBJECT, question=item["question"], options=options
                ),
                order,
            )
        )
        order = order[1:] + order[:1]
    return questions
