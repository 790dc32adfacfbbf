"""Ask one model every question: losses, exam, preference pairs, answers in full. One result (a dict) for each item."""

import random
import re
import time
from dataclasses import replace
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch

from utils.data.exams import MULTIPLE
from utils.data.terms import Terms
from utils.device import Device
from utils.evaluation.exams import choices_by_letter, choices_by_text, choices_of_several
from utils.evaluation.questions import ExamQuestion, Tests, kind_of
from utils.files import sample_by_id
from utils.model.chat_format import THINKING_MODES, encode_answer, encode_prompt, encode_turns
from utils.model.folder import load_model, load_tokenizer
from utils.model.generate import generate_tokens, read_answer, stop_tokens
from utils.model.logprobs import answer_logps, pack_for_scoring
from utils.model.packed_forward import prepare_packed
from utils.settings import Settings
from utils.text import progress

DIGITS = "0-9一二三四五六七八九十百千"


class Result(TypedDict):
    test: str
    id: str


class LossResult(Result):
    """test: heldout or general; loss: nats, the sum over the answer."""

    loss: float
    tokens: int


class ExamResult(ExamQuestion):
    """`text`, `letter`: {option letter: score}; the fields of a way in which a question was not asked are missing.

    Of a question with several right answers there are only letter_choice ("ABD") and `said`, what the model wrote.
    """

    test: str
    text_choice: NotRequired[str]
    text: NotRequired[dict[str, float]]
    said: NotRequired[str]
    letter_choice: NotRequired[str]
    letter: NotRequired[dict[str, float]]
    rotations: NotRequired[list[dict[str, float]]]


class PreferenceResult(Result):
    """`chosen`, `rejected`: log-probabilities of the two answers."""

    kind: str
    chosen: float
    rejected: float


class AnswerResult(Result):
    """about: heldout or general; right: None where it cannot be told; named: whether it names what the reference names, None
    where that names nothing of the question; repetition: see the function of this name."""

    about: str
    question: str
    reference: str
    answer: str
    tokens: int
    ended: bool
    right: bool | None
    named: bool | None
    repetition: float


def measure(folder: str, tests: Tests, settings: Settings, device: Device) -> tuple[float, list[Any]]:
    """(seconds of generating, the results of all tests) of a model folder. `settings`: those of compare_models.py."""
    tokenizer = load_tokenizer(folder)
    letter_rows, batch_size = settings.LETTER_ROWS, settings.BATCH_SIZE
    by_letter = letter_choices(folder, tokenizer, tests.exam, letter_rows, batch_size, device)
    model = load_model(folder, device.dtype).to(device.name).eval()
    # answers first: prepare_packed changes how the model computes
    seconds, answers = generated_answers(model, tokenizer, tests, settings)
    prepare_packed(model)
    return seconds, [
        *answers,
        *answer_losses(model, tokenizer, "heldout", tests.heldout, device),
        *answer_losses(model, tokenizer, "general", as_conversations(tests.general), device),
        *exam_results(model, tokenizer, tests.exam, by_letter, device),
        *preference_results(model, tokenizer, tests.pairs, device),
    ]


def letter_choices(
    folder: str, tokenizer, exam: list[ExamQuestion], count: int, batch_size: int, device: Device
) -> dict[str, dict]:
    """{question id: its fields letter_choice, letter and rotations} for `count` of the questions (0: all; below: none).

    All questions with several right answers are among them, with letter_choice and `said`: they are asked in no other way.
    Weights and products are float32 whatever the device's number format. An untrained model finds all letters about
    equally likely, and bfloat16 would decide between them by rounding (4 of 60 choices were others).
    """
    several = [item for item in exam if kind_of(item) == MULTIPLE]
    single = [item for item in exam if kind_of(item) != MULTIPLE]
    asked = sample_by_id(single, count) if count >= 0 else []
    if not several and not asked:
        return {}
    model, found = load_model(folder, torch.float32).to(device.name).eval(), {}
    if several:
        watch = progress(f"exam, {len(several):,} questions with several right answers", always=True)
        stop = stop_tokens(model, tokenizer)
        sets = choices_of_several(model, tokenizer, several, stop, batch_size, watch)
        for item, named in zip(several, sets):
            found[item["id"]] = {"letter_choice": named.letters, "said": named.said}
    if asked:
        watch = progress(f"exam by option letter, {len(asked):,} questions, every rotation", always=True)
        exact = replace(device, bf16=False)
        choices = choices_by_letter(prepare_packed(model), tokenizer, asked, exact, watch)
        for item, choice in zip(asked, choices):
            scores = {"letter": choice.scores, "rotations": choice.rotations}
            found[item["id"]] = {"letter_choice": choice.letter, **scores}
    return found


def generated_answers(model, tokenizer, tests: Tests, settings: Settings) -> tuple[float, list[AnswerResult]]:
    """(seconds of generating, results) of some held-out questions and the general ones, answered greedily."""
    if not settings.GENERATE:
        return 0.0, []
    questions = _questions(tests, settings)
    thinking, stop = THINKING_MODES[settings.THINKING], stop_tokens(model, tokenizer)
    prompts = [encode_prompt(tokenizer, asked.messages, thinking) for asked in questions]
    watch = progress(f"{len(prompts):,} answers in full", always=True)
    began = time.monotonic()
    generated = generate_tokens(
        model, prompts, stop, settings.MAX_NEW_TOKENS, batch_size=settings.BATCH_SIZE, watch=watch
    )
    seconds = round(time.monotonic() - began, 3)
    results = []
    for asked, prompt, ids in zip(questions, prompts, generated):
        text, ended = read_answer(tokenizer, prompt, ids).content, ids[-1] in stop
        results.append(_judge(asked, text, ids[:-1] if ended else ids, ended, tests.terms))
    return seconds, results


class _Question(NamedTuple):
    """One that is answered in full. `accept`: texts one of which the answer has to hold; None: the facts of `reference`."""

    about: str
    id: str
    messages: list[dict]
    reference: str
    accept: list[str] | None


def _questions(tests, settings):
    drawn = random.Random(settings.SEED).sample(tests.heldout, min(settings.GENERATE, len(tests.heldout)))
    questions = []
    for row in drawn:
        *messages, answer = row["messages"]
        questions.append(_Question("heldout", row["id"], messages, answer["content"], None))
    for row in tests.general:
        asked = _asks(row["question"])
        questions.append(_Question("general", row["id"], asked, row["answer"], row["accept"]))
    return questions


def _judge(asked, answer, said, ended, terms) -> AnswerResult:
    """The result of one answer: its text, the ids `said` (less the end token), and whether it ended by itself."""
    question = asked.messages[-1]["content"]
    named, right = None, None
    if asked.accept:
        right = states_one_of(answer, asked.accept)
    elif asked.accept is None:
        named = same_names(terms, asked.reference, answer, question)
        right = same_facts(terms, asked.reference, answer, question)
        if right and named is False:
            right = False
    return {
        "test": "answer",
        "about": asked.about,
        "id": asked.id,
        "question": question,
        "reference": asked.reference,
        "answer": answer,
        "tokens": len(said) + ended,
        "ended": ended,
        "right": right,
        "named": named,
        "repetition": repetition(said),
    }


def answer_losses(model, tokenizer, test: str, rows: list[dict], device: Device) -> list[LossResult]:
    """The loss of every assistant turn of conversations. `test`: their name in the results, heldout or general."""
    turns = [(row["id"], turn) for row in rows for turn in encode_turns(tokenizer, row["messages"])]
    if not turns:
        return []
    packed = pack_for_scoring([{"documents": [turn]} for _, turn in turns])
    watch = progress(f"loss on {len(turns):,} {test} answers", always=True)
    return [
        {"test": test, "id": row_id, "loss": -logp, "tokens": len(answer)}
        for (row_id, (_, answer)), [logp] in zip(turns, answer_logps(model, packed, device, watch))
    ]


def as_conversations(general: list[dict]) -> list[dict]:
    """Rows of question and answer as rows of messages."""
    conversations = []
    for row in general:
        messages = [*_asks(row["question"]), {"role": "assistant", "content": row["answer"]}]
        conversations.append({"id": row["id"], "messages": messages})
    return conversations


def exam_results(
    model, tokenizer, exam: list[ExamQuestion], by_letter: dict[str, dict], device: Device
) -> list[ExamResult]:
    """Every question, by option text where it has one right answer, joined with its fields of `letter_choices`, if any."""
    asked, by_text = [item for item in exam if kind_of(item) != MULTIPLE], {}
    if asked:
        watch = progress(f"exam by option text, {len(asked):,} questions", always=True)
        for item, choice in zip(asked, choices_by_text(model, tokenizer, asked, device, watch)):
            by_text[item["id"]] = {"text_choice": choice.letter, "text": choice.scores}
    return [
        {**item, "test": "exam", **by_text.get(item["id"], {}), **by_letter.get(item["id"], {})}
        for item in exam
    ]


def preference_results(model, tokenizer, pairs: list[dict], device: Device) -> list[PreferenceResult]:
    """Log-probabilities of the chosen and the rejected answer of every pair."""
    if not pairs:
        return []
    items = []
    for pair in pairs:
        chosen, rejected = pair["chosen"][-1], pair["rejected"][-1]
        prompt = encode_prompt(tokenizer, pair["prompt"], bool(chosen.get("reasoning_content")))
        answers = [encode_answer(tokenizer, message) for message in (chosen, rejected)]
        items.append({"documents": [(prompt, answer) for answer in answers]})
    watch = progress(f"{len(pairs):,} preference pairs", always=True)
    results = []
    for pair, (good, bad) in zip(pairs, answer_logps(model, pack_for_scoring(items), device, watch)):
        about = {"test": "preference", "id": pair["id"], "kind": pair.get("kind", "")}
        results.append({**about, "chosen": good, "rejected": bad})
    return results


def _asks(question):
    return [{"role": "user", "content": question}]


def same_facts(terms: Terms, reference: str, answer: str, question: str) -> bool | None:
    """Whether `answer` states exactly the terms that `reference` does; None where that states none beyond the question's.

    What is part of a name in the question counts: 麻黄 is an ingredient of 麻黄汤.
    """
    asked = _terms_in(terms, question)
    wanted = _terms_in(terms, reference) - asked
    return _terms_in(terms, answer) - asked == wanted if wanted else None


def same_names(terms: Terms, reference: str, answer: str, question: str) -> bool | None:
    """Whether `answer` holds the names of the question that `reference` repeats, such as the herb's; None if there are none.

    A name with a wrong character is no term, so that `same_facts` would let it pass.
    """
    repeated = {term for term in _terms_in(terms, question) & _terms_in(terms, reference) if len(term) > 1}
    return repeated <= _terms_in(terms, answer) if repeated else None


def _terms_in(terms, text):
    return {term for _, _, term in terms.find(text)}


def states_one_of(answer: str, accept: list[str]) -> bool:
    """Whether one of the texts in `accept` is in the answer; a number has to stand by itself: no 2 in 1024."""

    def pattern(text):
        exact = re.escape(text)
        return f"(?<![{DIGITS}]){exact}(?![{DIGITS}])" if re.search(f"[{DIGITS}]", text) else exact

    return any(re.search(pattern(text), answer, re.IGNORECASE) for text in accept)


def repetition(ids: list[int], n: int = 4) -> float:
    """The share of an answer's runs of `n` tokens that it has said before (seq-rep-4 of Welleck et al. 2019)."""
    runs = list(zip(*(ids[start:] for start in range(n))))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
