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

CAUTION = (
    "使用注意："  # begins the caution of an answer, which goes to its end (data_prepare/sample/texts.py)
)
DIGITS = "0-9一二三四五六七八九十百千"


class AnswerResult(TypedDict):
    """One answer in full.

    test: answer (of a first question), follow_up or caution; about: heldout or general, second or fourth, wanted or unasked;
    before: the questions asked before this one; kind: the kind of fact that is asked for; right: None if it cannot be told;
    named: does it name what the reference names? None if that names nothing of the question; alone: was the same question
    answered right by itself?; caution: does the answer bring one?; repetition: see the function of this name.
    """

    test: str
    id: str
    about: str
    before: list[str]
    question: str
    kind: str
    reference: str
    answer: str
    tokens: int
    ended: bool
    right: bool | None
    named: bool | None
    alone: bool | None
    caution: bool
    repetition: float


class Question(NamedTuple):
    """One that is answered in full. `accept`: texts one of which the answer has to hold; None: the facts of `reference`;
    `alone`: see AnswerResult."""

    test: str
    about: str
    id: str
    messages: list[dict]
    reference: str
    accept: list[str] | None = None
    alone: bool | None = None


class Answerer:
    """A model, and all that decides how it answers in full: greedily, in the settings' thinking mode."""

    def __init__(self, model, tokenizer, terms: Terms, settings: Settings):
        self.model, self.tokenizer, self.terms, self.settings = model, tokenizer, terms, settings
        self.stop = stop_tokens(model, tokenizer)
        self.seconds = 0.0  # of generating, in all

    def ask(self, questions: list[Question], label: str) -> list[AnswerResult]:
        """The judged answers to `questions`."""
        if not questions:
            return []
        thinking = THINKING_MODES[self.settings.THINKING]
        prompts = [encode_prompt(self.tokenizer, asked.messages, thinking) for asked in questions]
        watch = progress(f"{len(prompts):,} {label}", always=True)
        limits = (self.stop, self.settings.MAX_NEW_TOKENS)
        began = time.monotonic()
        generated = generate_tokens(
            self.model, prompts, *limits, batch_size=self.settings.BATCH_SIZE, watch=watch
        )
        self.seconds += time.monotonic() - began
        results = []
        for asked, prompt, ids in zip(questions, prompts, generated):
            text, ended = read_answer(self.tokenizer, prompt, ids).content, ids[-1] in self.stop
            results.append(judge(asked, text, ids[:-1] if ended else ids, ended, self.terms))
        return results


def generated_answers(model, tokenizer, tests: Tests, settings: Settings) -> tuple[float, list[AnswerResult]]:
    """(seconds of generating first answers, results): some held-out questions and the general ones, some of the former again as
    second and as fourth question of a conversation, and what preference pairs say of cautions."""
    if not settings.GENERATE:
        return 0.0, []
    drawn = random.Random(settings.SEED).sample(tests.heldout, min(settings.GENERATE, len(tests.heldout)))
    questions = []
    for row in drawn:
        *messages, answer = row["messages"]
        questions.append(Question("answer", "heldout", row["id"], messages, answer["content"]))
    for row in tests.general:
        asked = as_question(row["question"])
        questions.append(Question("answer", "general", row["id"], asked, row["answer"], row["accept"]))
    answerer = Answerer(model, tokenizer, tests.terms, settings)
    answers = answerer.ask(questions, "answers in full")
    seconds = round(answerer.seconds, 3)
    follow_ups = ask_in_conversations(answerer, questions[: len(drawn)], answers, settings.FOLLOW_UPS)
    cautions = answerer.ask(caution_questions(tests.pairs)[: settings.GENERATE], "answers about cautions")
    return seconds, [*answers, *follow_ups, *cautions]


def ask_in_conversations(
    answerer: Answerer, questions: list[Question], answers: list[AnswerResult], count: int
) -> list[AnswerResult]:
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
    firsts, said = [asked for asked, _ in alone], [found["answer"] for _, found in alone]
    talks, results = [asked.messages for asked in firsts], []
    for place in ("second", "third", "fourth"):
        turns = []
        for i, (asked, found) in enumerate(alone):
            reply = {"role": "assistant", "content": said[i - 1]}
            turns.append(
                asked._replace(
                    test="follow_up",
                    about=place,
                    messages=[*talks[i - 1], reply, asked.messages[-1]],
                    alone=found["right"],
                )
            )
        asked_again = answerer.ask(turns, f"answers to {place} questions")
        talks, said = [turn.messages for turn in turns], [found["answer"] for found in asked_again]
        results += asked_again if place != "third" else []
    return results


def caution_questions(pairs: list[dict]) -> list[Question]:
    """The questions of preference pairs of which just one answer brings a caution: the better one (wanted) or the worse one
    (unasked). `accept` is empty: what is judged is the caution."""
    questions = []
    for pair in pairs:
        chosen, rejected = (pair[side][-1]["content"] for side in ("chosen", "rejected"))
        if (CAUTION in chosen) != (CAUTION in rejected):
            about = "wanted" if CAUTION in chosen else "unasked"
            questions.append(Question("caution", about, pair["id"], pair["prompt"], chosen, []))
    return questions


def judge(asked: Question, answer: str, said: list[int], ended: bool, terms: Terms) -> AnswerResult:
    """The result of one answer: its text, the ids `said` (less the end token), and `ended`: it ended by itself.

    A caution that the reference has not is not held against an answer's facts: it is judged by itself.
    """
    question = asked.messages[-1]["content"]
    facts, caution = parts_of(answer)
    named, right, kind = None, None, ""
    if asked.test == "caution":
        right = caution == parts_of(asked.reference)[1] if CAUTION in asked.reference else None
    elif asked.accept:
        right = states_one_of(answer, asked.accept)
    elif asked.accept is None:
        facts = answer if CAUTION in asked.reference else facts
        named = same_names(terms, asked.reference, facts, question)
        right = same_facts(terms, asked.reference, facts, question)
        if right and named is False:
            right = False
        stated = [term for _, _, term in terms.find(asked.reference) if term not in question]
        kind = terms.kinds[stated[0]][0] if stated else ""
    return {
        "test": asked.test,
        "about": asked.about,
        "id": asked.id,
        "before": [message["content"] for message in asked.messages[:-1] if message["role"] == "user"],
        "question": question,
        "kind": kind,
        "reference": asked.reference,
        "answer": answer,
        "tokens": len(said) + ended,
        "ended": ended,
        "right": right,
        "named": named,
        "alone": asked.alone,
        "caution": CAUTION in answer,
        "repetition": repetition(said),
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

    def pattern(text):
        exact = re.escape(text)
        return f"(?<![{DIGITS}]){exact}(?![{DIGITS}])" if re.search(f"[{DIGITS}]", text) else exact

    return any(re.search(pattern(text), answer, re.IGNORECASE) for text in accept)


def repetition(ids: list[int], n: int = 4) -> float:
    """The share of an answer's runs of `n` tokens that it has said before (seq-rep-4 of Welleck et al. 2019)."""
    runs = list(zip(*(ids[start:] for start in range(n))))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
