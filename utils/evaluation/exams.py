"""Exams: the prompts that ask for an answer, and how options are chosen.

Three kinds of question, told apart everywhere: single choice and true or false, of which the likeliest option counts (by its
text, by its letter), and several right answers, of which the model writes the letters.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from utils.data.exams import LETTERS, MULTIPLE, SINGLE, TRUE_FALSE
from utils.device import Device
from utils.evaluation.questions import ExamQuestion, kind_of
from utils.model.chat_format import encode_prompt, encode_text
from utils.model.generate import generate_tokens, read_answer
from utils.model.logprobs import answer_logps, next_token_logps, pack_for_scoring

# By option text: the options are not listed, and the instruction asks for the bare fact that they are. A statement alone does not
# say that it is to be judged, nor in which of the usual pairs of words (对 and 错, 正确 and 错误): these are named.
TEXT_PROMPT = "{question}\n{instruction}"
INSTRUCTION = "请只写出答案。"
JUDGE_INSTRUCTION = "请判断以上说法是否正确，只写出{words}。"

# By option letter, as CMMLU asks (Li et al. 2023, zero-shot). SUBJECT, its own name for ours, stands in where an item has none.
LETTER_PROMPT = (
    "以下是关于{subject}的{kind}，请直接给出正确答案的选项。\n\n题目：{question}\n{options}\n答案是："
)
KIND_NAMES = {SINGLE: "单项选择题", TRUE_FALSE: "判断题", MULTIPLE: "多项选择题"}
SUBJECT = "中医中药"
# Tokens of an answer that names several options: enough to write the texts of most beside the letters.
LONGEST_SET = 64


def prompt_texts() -> dict[str, Any]:
    """All texts and limits of this file that decide a score: part of the key under which results are kept."""
    return {
        "text": TEXT_PROMPT,
        "instruction": INSTRUCTION,
        "judge": JUDGE_INSTRUCTION,
        "letter": LETTER_PROMPT,
        "kinds": KIND_NAMES,
        "subject": SUBJECT,
        "longest_set": LONGEST_SET,
    }


class TextChoice(NamedTuple):
    letter: str
    scores: dict[str, float]


class LetterChoice(NamedTuple):
    letter: str
    scores: dict[str, float]
    rotations: list[dict[str, float]]


class SetChoice(NamedTuple):
    """`letters`: the options named, in order ("ABD", "" for none, "?" for one that is not there); `said`: the whole answer."""

    letters: str
    said: str


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
        prompt = _prompt(tokenizer, text_question(item))
        answers = [encode_text(tokenizer, text) for text in item["options"].values()]
        items.append({"documents": [(prompt, answer) for answer in answers]})
    choices = []
    for item, logps in zip(exam, answer_logps(model, pack_for_scoring(items), device, watch)):
        scores = {letter: logp / len(text) for (letter, text), logp in zip(item["options"].items(), logps)}
        choices.append(TextChoice(_best(scores), scores))
    return choices


def text_question(item: ExamQuestion) -> str:
    """The question as it is asked by option text."""
    instruction = INSTRUCTION
    if kind_of(item) == TRUE_FALSE:
        words = "或".join(f"“{option}”" for option in item["options"].values())
        instruction = JUDGE_INSTRUCTION.format(words=words)
    return TEXT_PROMPT.format(question=item["question"], instruction=instruction)


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
        sums = {own: sum(rotation[own] for rotation in rotations) for own in item["options"]}
        scores = {own: total / len(rotations) for own, total in sums.items()}
        choices.append(LetterChoice(_best(scores), scores, rotations))
    return choices


def letter_questions(item: ExamQuestion) -> list[tuple[str, list[str]]]:
    """[(question with its options listed, the item's own option letters in that order), ...], one for each rotation.

    Over the rotations every option stands once at every place, under every letter.
    """
    order, questions = list(item["options"]), []
    for _ in order:
        questions.append((_letter_question(item, order), order))
        order = order[1:] + order[:1]
    return questions


def _letter_question(item, order):
    """The question with its options listed in this order (list of their own letters)."""
    options = "\n".join(f"{letter}. {item['options'][own]}" for letter, own in zip(LETTERS, order))
    asked = {"subject": item["subject"] or SUBJECT, "kind": KIND_NAMES[kind_of(item)]}
    return LETTER_PROMPT.format(**asked, question=item["question"], options=options)


def choices_of_several(
    model, tokenizer, exam: list[ExamQuestion], stop: set[int], batch_size: int, watch: Callable = iter
) -> list[SetChoice]:
    """For each question with several right answers the set of letters that the model writes, always its likeliest token.

    As CMB asks such questions (Wang et al. 2023): a set is right where it is exactly the answer's. The probabilities of the
    single letters would need a threshold from which an option belongs to the set, and a threshold fitted to a model or an
    exam is one more thing that the score would measure. `model` as loaded, not prepared for packed rows; `stop`: the ids that
    end an answer.
    """
    order = [list(item["options"]) for item in exam]
    prompts = [_prompt(tokenizer, _letter_question(item, own)) for item, own in zip(exam, order)]
    answers = generate_tokens(model, prompts, stop, LONGEST_SET, batch_size=batch_size, watch=watch)
    choices = []
    for item, own, prompt, ids in zip(exam, order, prompts, answers):
        said = read_answer(tokenizer, prompt, ids).content
        asked = dict(zip(LETTERS, own))  # a file may leave out an empty option: A, B, D are asked as A, B, C
        letters = letters_in(said, item["options"].values())
        choices.append(SetChoice("".join(asked.get(letter, "?") for letter in letters), said))
    return choices


def letters_in(answer: str, options: Iterable[str] = ()) -> str:
    """The option letters that an answer names, in order, each once: "A、B、D", "ABD" and "答案是：B，A 和 D。" are "ABD".

    Read is what follows the word 答案, where it is said. Letters inside a word or beside a digit (DNA, B12) name nothing, nor
    do those in the texts of `options` (维生素 C). Nothing is read out of a sentence: "不选 A" names A.
    """
    text = unicodedata.normalize("NFKC", answer)
    for option in sorted(options, key=len, reverse=True):
        option = unicodedata.normalize("NFKC", option)
        if not set(option) <= set(LETTERS):
            text = text.replace(option, " ")
    text = re.split(r"答案(?:是|为|应该是|应该为|:)", text)[-1]
    runs = re.findall(rf"(?<![A-Za-z0-9])[{LETTERS}]+(?![A-Za-z0-9])", text)
    return "".join(sorted(set("".join(runs))))


def _prompt(tokenizer, question):
    """Thinking off, whatever the folder's own mode: an exam scores what the model says at once."""
    return encode_prompt(tokenizer, [{"role": "user", "content": question}], thinking=False)


def _best(scores):
    return max(scores, key=scores.get)
