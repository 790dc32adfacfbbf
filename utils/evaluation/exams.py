"""Exams, single choice and true or false: the prompts that ask for an answer, and how the likeliest option is found, by the
options' texts and by their letters."""

from utils.data.exams import LETTERS, SINGLE, TRUE_FALSE
from utils.device import Device
from utils.evaluation.questions import ExamQuestion, kind_of
from utils.model.chat_format import encode_answer, encode_prompt
from utils.model.logprobs import answer_logps, next_token_logps
from utils.text import progress

# By option text: the options are not listed, and the instruction asks for the bare fact that they are. A statement alone does not
# say that it is to be judged, nor in which of the usual pairs of words (对 and 错, 正确 and 错误): these are named.
INSTRUCTION = "请只写出答案。"
JUDGE_INSTRUCTION = "请判断以上说法是否正确，只写出{words}。"

# By option letter, as CMMLU asks (Li et al. 2023, zero-shot). An item without a subject is asked under SUBJECT.
LETTER_PROMPT = (
    "以下是关于{subject}的{kind}，请直接给出正确答案的选项。\n\n题目：{question}\n{options}\n答案是："
)
KIND_NAMES = {SINGLE: "单项选择题", TRUE_FALSE: "判断题"}
SUBJECT = "中医中药"


def choices_by_text(model, tokenizer, exam: list[ExamQuestion], device: Device) -> list[dict]:
    """{"text_choice": the best option's letter, "text": {letter: score}} of each question.

    The score is the log-probability of an option's text as the answer, divided by its length in characters: acc_norm of
    lm-evaluation-harness, but for the two line breaks at the end of Qwen3's prompt, which the harness counts with the option.
    """
    items, watch = [], progress(f"exam by option text, {len(exam):,} questions")
    for item in exam:
        instruction = INSTRUCTION
        if kind_of(item) == TRUE_FALSE:
            words = "或".join(f"“{option}”" for option in item["options"].values())
            instruction = JUDGE_INSTRUCTION.format(words=words)
        prompt = _prompt(tokenizer, f"{item['question']}\n{instruction}")
        options = [{"role": "assistant", "content": text} for text in item["options"].values()]
        items.append({"documents": [(prompt, encode_answer(tokenizer, option)[:-1]) for option in options]})
    choices = []
    for item, logps in zip(exam, answer_logps(model, items, device, watch)):
        scores = {letter: logp / len(text) for (letter, text), logp in zip(item["options"].items(), logps)}
        choices.append({"text_choice": max(scores, key=scores.get), "text": scores})
    return choices


def choices_by_letter(model, tokenizer, exam: list[ExamQuestion], device: Device) -> list[dict]:
    """{"letter_choice": the best option's letter, "letter": {letter: score}, "rotations": [...]} of each question.

    The options are listed, and the model's answer is the likeliest letter. This is asked for every rotation of the options, so
    that each stands once under every letter; `rotations` holds the log-probabilities by the options' own letters. The score is
    their mean: what a model gives to a letter, whatever stands under it, adds the same to every option.
    """
    asked, watch = [], progress(f"exam by option letter, {len(exam):,} questions, every rotation")
    for item in exam:
        own = list(item["options"])
        asked.append([own[start:] + own[:start] for start in range(len(own))])
    prompts = [
        _prompt(tokenizer, letter_question(item, order))
        for item, orders in zip(exam, asked)
        for order in orders
    ]
    letters = LETTERS[: max(len(item["options"]) for item in exam)]
    tokens = [token for [token] in tokenizer(list(letters), add_special_tokens=False)["input_ids"]]
    logps = iter(next_token_logps(model, prompts, tokens, device, watch))
    choices = []
    for orders in asked:
        rotations = [dict(zip(order, next(logps))) for order in orders]
        sums = {own: sum(rotation[own] for rotation in rotations) for own in orders[0]}
        scores = {own: total / len(rotations) for own, total in sums.items()}
        best = max(scores, key=scores.get)
        choices.append({"letter_choice": best, "letter": scores, "rotations": rotations})
    return choices


def letter_question(item: ExamQuestion, order: list[str]) -> str:
    """The question with its options listed in this order of their own letters."""
    options = "\n".join(f"{letter}. {item['options'][own]}" for letter, own in zip(LETTERS, order))
    asked = {"subject": item["subject"] or SUBJECT, "kind": KIND_NAMES[kind_of(item)]}
    return LETTER_PROMPT.format(**asked, question=item["question"], options=options)


def _prompt(tokenizer, question):
    """Thinking off, whatever the folder's own mode: an exam scores what the model says at once."""
    return encode_prompt(tokenizer, [{"role": "user", "content": question}], thinking=False)
