"""The questions that models are asked, and what counts as right in an answer. Without torch, so that a wrong file is told at once."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.exams import MULTIPLE, SINGLE
from utils.data.inputs import find_input_files
from utils.data.messages import Reject
from utils.data.pairs import Terms
from utils.data.schemas import convert_rows
from utils.errors import UserError
from utils.files import show_path

# Begins the caution of an answer, which goes to its end (data_prepare/sample/texts.py).
CAUTION = "使用注意："
DIGITS = "0-9一二三四五六七八九十百千"

# {"id", "question", "options": {letter: text}, "answer": the right letter, "subject", "kind" unless it is SINGLE}
ExamQuestion = dict[str, Any]


class Tests(NamedTuple):
    """The questions that every model is asked: rows of the project's files (no rows: this test is left out). Of general ones the
    question and the answer are messages, too."""

    heldout: list[dict]
    exam: list[ExamQuestion]
    pairs: list[dict]
    general: list[dict]
    terms: Terms


class Question(NamedTuple):
    """One that is answered in full.

    `about`: heldout, general; second, third or fourth (in a conversation); wanted or unasked (a caution). `accept`: texts one of
    which the answer has to hold; none: the facts of `reference`. `alone`: was it answered right by itself?
    """

    about: str
    id: str
    messages: list[dict]
    reference: str
    accept: Sequence[str] = ()
    alone: bool | None = None


Ask = Callable[[list[Question], str], list[dict]]  # (questions, a label for the progress): what judge() says


def kind_of(item: ExamQuestion) -> str:
    """SINGLE, TRUE_FALSE or MULTIPLE."""
    return item.get("kind", SINGLE)


def read_exam(path: Path) -> tuple[list[ExamQuestion], Counter[str]]:
    """The questions of a file, and the reasons why other rows are left out, counted.

    Reads this project's exam.jsonl and all that the conversion knows as an exam (utils/data/exams.py), in all files of an
    archive and all sheets of a book. UserError if no row is a question.
    """
    files, _ = find_input_files([path], "python data_prepare/convert_to_qwen3_format.py")
    exam: dict[str, Any] = {}
    left_out: Counter[str] = Counter()
    for file in files:
        for place, row, item in convert_rows(file):
            if isinstance(item, Reject):
                left_out[item.reason] += 1
            elif item.kind != "exam":
                left_out["another kind of row"] += 1
            elif kind_of(item.body) == MULTIPLE:
                left_out["questions with several right answers"] += 1
            else:
                given, own = str(row.get("id") or ""), f"{file.name if file.member else path.stem}:{place}"
                name = own if not given or given in exam else given  # results are found by id: each once
                exam[name] = {"id": name, **item.body}
    if not exam:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in left_out.items()) or "it is empty"
        raise UserError(f"{show_path(path)}: no exam question in it ({reasons})")
    return list(exam.values()), left_out


# ---- Questions answered in full


def first_questions(tests: Tests, count: int, seed: int) -> list[Question]:
    """`count` of the held-out questions, drawn with this seed, and the general ones."""
    heldout, questions = random.Random(seed).sample(tests.heldout, min(count, len(tests.heldout))), []
    for about, rows in (("heldout", heldout), ("general", tests.general)):
        for row in rows:
            *messages, answer = row["messages"]
            questions.append(Question(about, row["id"], messages, answer["content"], row.get("accept", ())))
    return questions


def ask_in_conversations(ask: Ask, questions: list[Question], answers: list[dict], count: int) -> list[dict]:
    """The first `count` held-out questions once more, each as the second and as the fourth of a conversation, as in chat.

    Conversation i is about questions i - 1 and i, then about i - 3 to i (counted in a circle); every answer in it is the
    model's own at that place. Questions that came with a conversation of their own are left out.
    """
    alone = []
    for asked, found in zip(questions, answers):
        single = all(message["role"] != "assistant" for message in asked.messages)
        if single and asked.about == "heldout" and len(alone) < count:
            alone.append((asked, found))
    if len(alone) < 4:  # no three others
        return []
    talks, said, results = [asked.messages for asked, _ in alone], [found["answer"] for _, found in alone], []
    for place in ("second", "third", "fourth"):
        turns = []
        for i, (asked, found) in enumerate(alone):
            talk = [*talks[i - 1], {"role": "assistant", "content": said[i - 1]}, asked.messages[-1]]
            turns.append(asked._replace(about=place, messages=talk, alone=found["right"]))
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
            questions.append(Question(about, pair["id"], pair["prompt"], chosen))
    return questions


# ---- What is right


def judge(asked: Question, answer: str, said: list[int], ended: bool, terms: Terms) -> dict[str, Any]:
    """The result of one answer: its text, the ids `said` (less the end token), and `ended`: it ended by itself.

    right: None if it cannot be told; kind: of the fact that a held-out question asks for. A caution that the reference has not
    is not held against an answer's facts: it is judged by itself.
    """
    question, (facts, caution) = asked.messages[-1]["content"], parts_of(answer)
    right, kind = None, ""
    if asked.about in ("wanted", "unasked"):
        right = caution == parts_of(asked.reference)[1] if asked.about == "wanted" else None
    elif asked.accept:
        right = states_one_of(answer, asked.accept)
    else:
        facts = answer if CAUTION in asked.reference else facts
        right = states_facts(terms, asked.reference, facts, question)
    if asked.about == "heldout":
        stated = [term for _, _, term in terms.find(asked.reference) if term not in question]
        kind = terms.kinds[stated[0]][0] if stated else ""
    before = [message["content"] for message in asked.messages[:-1] if message["role"] == "user"]
    found = {"test": "answer", "about": asked.about, "id": asked.id, "alone": asked.alone, "kind": kind}
    found |= {"before": before, "question": question, "reference": asked.reference, "answer": answer}
    found |= {"tokens": len(said) + ended, "ended": ended, "repetition": repetition(said)}
    return found | {"right": right, "caution": CAUTION in answer}


def parts_of(answer: str) -> tuple[str, str]:
    """("麻黄的功效是发汗解表。", "孕妇慎用") of "麻黄的功效是发汗解表。使用注意：孕妇慎用。"; no caution is ""."""
    facts, _, caution = answer.partition(CAUTION)
    return facts, caution.strip().rstrip("。")


def states_facts(terms: Terms, reference: str, answer: str, question: str) -> bool | None:
    """Does `answer` hold the names of the question that `reference` repeats, such as the herb's, and state exactly the terms that
    `reference` states beyond the question's? None if it states none.

    A term counts if it is part of a name in the question: 麻黄 is an ingredient of 麻黄汤.
    """
    asked, wanted, stated = (
        {term for _, _, term in terms.find(text)} for text in (question, reference, answer)
    )
    names = {term for term in asked & wanted if len(term) > 1}
    facts = wanted - asked
    return (names <= stated and stated - asked == facts) if facts else None


def states_one_of(answer: str, accept: Sequence[str]) -> bool:
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
