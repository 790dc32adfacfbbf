"""Answers in full: which questions a model answers, and what counts as right in an answer."""

import random
import re
import time
from typing import NamedTuple, TypedDict

from utils.data.terms import Terms
from utils.evaluation.questions import Tests, as_question
from utils.model.chat_format import THINKING_MODES, encode_prompt
from utils.model.generate import generate_tokens, read_answer, stop_tokens
from utils.settings import Settings
from utils.text import progress

DIGITS = "0-9一二三四五六七八九十百千"


class AnswerResult(TypedDict):
    """One answer in full.

    about: heldout or general; right: None if it cannot be told; named: does it name what the reference names? None if that names
    nothing of the question; repetition: see the function of this name.
    """

    test: str
    id: str
    about: str
    question: str
    reference: str
    answer: str
    tokens: int
    ended: bool
    right: bool | None
    named: bool | None
    repetition: float


class Question(NamedTuple):
    """One that is answered in full. `accept`: texts one of which the answer has to hold; None: the facts of `reference`."""

    about: str
    id: str
    messages: list[dict]
    reference: str
    accept: list[str] | None = None


def generated_answers(model, tokenizer, tests: Tests, settings: Settings) -> tuple[float, list[AnswerResult]]:
    """(seconds of generating, results) of some held-out questions and the general ones, answered greedily."""
    if not settings.GENERATE:
        return 0.0, []
    questions = []
    for row in random.Random(settings.SEED).sample(tests.heldout, min(settings.GENERATE, len(tests.heldout))):
        *messages, answer = row["messages"]
        questions.append(Question("heldout", row["id"], messages, answer["content"]))
    for row in tests.general:
        asked = as_question(row["question"])
        questions.append(Question("general", row["id"], asked, row["answer"], row["accept"]))
    prompts = [
        encode_prompt(tokenizer, asked.messages, THINKING_MODES[settings.THINKING]) for asked in questions
    ]
    stop = stop_tokens(model, tokenizer)
    watch = progress(f"{len(prompts):,} answers in full", always=True)
    began = time.monotonic()
    generated = generate_tokens(
        model, prompts, stop, settings.MAX_NEW_TOKENS, batch_size=settings.BATCH_SIZE, watch=watch
    )
    seconds = round(time.monotonic() - began, 3)
    results = []
    for asked, prompt, ids in zip(questions, prompts, generated):
        text, ended = read_answer(tokenizer, prompt, ids).content, ids[-1] in stop
        results.append(judge(asked, text, ids[:-1] if ended else ids, ended, tests.terms))
    return seconds, results


def judge(asked: Question, answer: str, said: list[int], ended: bool, terms: Terms) -> AnswerResult:
    """The result of one answer: its text, the ids `said` (less the end token), and `ended`: it ended by itself."""
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


def same_facts(terms: Terms, reference: str, answer: str, question: str) -> bool | None:
    """Does `answer` state exactly the terms that `reference` does? None if that states none beyond the question's.

    A term counts if it is part of a name in the question: 麻黄 is an ingredient of 麻黄汤.
    """
    asked = _terms_in(terms, question)
    wanted = _terms_in(terms, reference) - asked
    return _terms_in(terms, answer) - asked == wanted if wanted else None


def same_names(terms: Terms, reference: str, answer: str, question: str) -> bool | None:
    """Does `answer` hold the names of the question that `reference` repeats, such as the herb's? None if there are none.

    A name with a wrong character is no term, so that `same_facts` would let it pass.
    """
    repeated = {term for term in _terms_in(terms, question) & _terms_in(terms, reference) if len(term) > 1}
    return repeated <= _terms_in(terms, answer) if repeated else None


def _terms_in(terms, text):
    return {term for _, _, term in terms.find(text)}


def states_one_of(answer: str, accept: list[str]) -> bool:
    """Is one of the texts in `accept` in the answer? A number has to stand by itself: no 2 in 1024."""

    def pattern(text):
        exact = re.escape(text)
        return f"(?<![{DIGITS}]){exact}(?![{DIGITS}])" if re.search(f"[{DIGITS}]", text) else exact

    return any(re.search(pattern(text), answer, re.IGNORECASE) for text in accept)


def repetition(ids: list[int], n: int = 4) -> float:
    """The share of an answer's runs of `n` tokens that it has said before (seq-rep-4 of Welleck et al. 2019)."""
    runs = list(zip(*(ids[start:] for start in range(n))))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
