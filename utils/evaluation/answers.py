"""Answers in full: which questions a model answers, alone and in conversations, and what counts as right in an answer."""

import random
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from utils.data.texts import Terms
from utils.evaluation.questions import Tests
from utils.model.chat_format import THINKING_MODES, encode_prompt
from utils.model.generate import generate_tokens, read_answer, stop_tokens
from utils.settings import Settings
from utils.text import progress

CAUTION = (
    "使用注意："  # begins the caution of an answer, which goes to its end (data_prepare/sample/texts.py)
)
DIGITS = "0-9一二三四五六七八九十百千"


class Question(NamedTuple):
    """One that is answered in full.

    test, about: answer: heldout or general; follow_up: second, third or fourth; caution: wanted or unasked. `accept`: texts one of
    which the answer has to hold; None: the facts of `reference`; `alone`: was it answered right by itself?
    """

    test: str
    about: str
    id: str
    messages: list[dict]
    reference: str
    accept: list[str] | None = None
    alone: bool | None = None


Ask = Callable[
    [list[Question], str], list[dict[str, Any]]
]  # (questions, a label for the progress) -> results


def generated_answers(model, tokenizer, tests: Tests, settings: Settings) -> tuple[float, list[dict]]:
    """(seconds of generating first answers, results), always the likeliest token: some held-out questions and the general ones,
    some of the former again in conversations, and the questions of preference pairs about cautions."""
    if not settings.GENERATE:
        return 0.0, []
    stop, thinking = stop_tokens(model, tokenizer), THINKING_MODES[settings.THINKING]
    limits = {"max_new_tokens": settings.MAX_NEW_TOKENS, "batch_size": settings.BATCH_SIZE}
    seconds = []

    def ask(questions, label):
        if not questions:
            return []
        prompts = [encode_prompt(tokenizer, asked.messages, thinking) for asked in questions]
        watch = progress(f"{len(prompts):,} {label}")
        began = time.monotonic()
        generated = generate_tokens(model, prompts, stop, **limits, watch=watch)
        seconds.append(round(time.monotonic() - began, 3))
        results = []
        for asked, prompt, ids in zip(questions, prompts, generated):
            text, ended = read_answer(tokenizer, prompt, ids).content, ids[-1] in stop
            results.append(judge(asked, text, ids[:-1] if ended else ids, ended, tests.terms))
        return results

    questions = []
    for row in random.Random(settings.SEED).sample(tests.heldout, min(settings.GENERATE, len(tests.heldout))):
        *messages, answer = row["messages"]
        questions.append(Question("answer", "heldout", row["id"], messages, answer["content"]))
    heldout = len(questions)
    for row in tests.general:
        asked = [{"role": "user", "content": row["question"]}]
        questions.append(Question("answer", "general", row["id"], asked, row["answer"], row["accept"]))
    answers = ask(questions, "answers in full")
    follow_ups = ask_in_conversations(ask, questions[:heldout], answers, settings.FOLLOW_UPS)
    cautions = ask(caution_questions(tests.pairs)[: settings.GENERATE], "answers about cautions")
    return seconds[0], [*answers, *follow_ups, *cautions]


def ask_in_conversations(ask: Ask, questions: list[Question], answers: list[dict], count: int) -> list[dict]:
    """The first `count` questions once more, each as the second and as the fourth of a conversation, which is one as in chat.

    Conversation i is about questions i - 1 and i, then about i - 3 to i (counted in a circle); every answer in it is the model's
    own at that place. Questions that came with a conversation of their own are left out.
    """
    alone = [
        (asked, found)
        for asked, found in zip(questions, answers)
        if all(message["role"] != "assistant" for message in asked.messages)
    ][:count]
    if len(alone) < 4:  # no three others
        return []
    talks, said, results = [asked.messages for asked, _ in alone], [found["answer"] for _, found in alone], []
    for place in ("second", "third", "fourth"):
        turns = []
        for i, (asked, found) in enumerate(alone):
            talk = [*talks[i - 1], {"role": "assistant", "content": said[i - 1]}, asked.messages[-1]]
            turns.append(asked._replace(test="follow_up", about=place, messages=talk, alone=found["right"]))
        found = ask(turns, f"answers to {place} questions")
        talks, said = [turn.messages for turn in turns], [each["answer"] for each in found]
        results += found if place != "third" else []
    return results


def caution_questions(pairs: list[dict]) -> list[Question]:
    """The questions of preference pairs of which just one answer brings a caution: the better one (wanted) or the worse one
    (unasked)."""
    questions = []
    for pair in pairs:
        chosen, rejected = (pair[side][-1]["content"] for side in ("chosen", "rejected"))
        if (CAUTION in chosen) != (CAUTION in rejected):
            about = "wanted" if CAUTION in chosen else "unasked"
            questions.append(Question("caution", about, pair["id"], pair["prompt"], chosen))
    return questions


def judge(asked: Question, answer: str, said: list[int], ended: bool, terms: Terms) -> dict[str, Any]:
    """The result of one answer: its text, the ids `said` (less the end token), and `ended`: it ended by itself.

    right: None if it cannot be told; named: does it name what the reference names of the question? kind: of the fact asked for.
    A caution that the reference has not is not held against an answer's facts: it is judged by itself.
    """
    question, (facts, caution) = asked.messages[-1]["content"], parts_of(answer)
    named, right, kind = None, None, ""
    if asked.test == "caution":
        right = caution == parts_of(asked.reference)[1] if CAUTION in asked.reference else None
    elif asked.accept:
        right = states_one_of(answer, asked.accept)
    elif asked.accept is None:
        facts = answer if CAUTION in asked.reference else facts
        named = same_names(terms, asked.reference, facts, question)
        right = same_facts(terms, asked.reference, facts, question)
        right = False if right and named is False else right
        stated = [term for _, _, term in terms.find(asked.reference) if term not in question]
        kind = terms.kinds[stated[0]][0] if stated else ""
    return {
        **{"test": asked.test, "about": asked.about, "id": asked.id, "alone": asked.alone, "kind": kind},
        "before": [message["content"] for message in asked.messages[:-1] if message["role"] == "user"],
        **{"question": question, "reference": asked.reference, "answer": answer},
        **{"tokens": len(said) + ended, "ended": ended, "repetition": repetition(said)},
        **{"right": right, "named": named, "caution": CAUTION in answer},
    }


def parts_of(answer: str) -> tuple[str, str]:
    """("麻黄的功效是发汗解表。", "孕妇慎用") of "麻黄的功效是发汗解表。使用注意：孕妇慎用。"; no caution is ""."""
    facts, _, caution = answer.partition(CAUTION)
    return facts, caution.strip().rstrip("。")


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
    for text in accept:
        pattern = re.escape(text)
        if re.search(f"[{DIGITS}]", text):
            pattern = f"(?<![{DIGITS}]){pattern}(?![{DIGITS}])"
        if re.search(pattern, answer, re.IGNORECASE):
            return True
    return False


def repetition(ids: list[int], n: int = 4) -> float:
    """The share of an answer's runs of `n` tokens that it has said before (seq-rep-4 of Welleck et al. 2019)."""
    runs = list(zip(*(ids[start:] for start in range(n))))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
