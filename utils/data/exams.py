"""Exam items: single choice, multiple choice and true or false, in the forms in which exams are published."""

import ast
import contextlib
import functools
import re
import unicodedata

from utils.data.messages import Fields, Reject, is_empty, question_of, text_of

LETTERS = "ABCDEFGHIJ"
SINGLE, MULTIPLE, TRUE_FALSE = "single", "multiple", "true_false"  # `kind` of an item; single is not written
RIGHT, WRONG = {"对", "正确", "是", "√", "T", "TRUE"}, {"错", "错误", "否", "×", "F", "FALSE"}

# Names of fields, as `plain_names` gives them; the first that a row has.
SUBJECTS = ("subject", "exam_subject", "subject_name", "exam_class")
QUESTIONS = ("question", "query", "instruction", "prompt", "problem", "input", "title")
COUNTED_FROM_0 = ("answer_idx", "cop", "label")  # a number here is counted from 0
ANSWERS = (
    "answer_idx answer correct_answer cop ans correct answer_text key gold target output response completion label"
).split()

# Fields of an option that is an object of its own.
_KEYS = ("key", "label", "letter", "option", "id", "name")
_TEXTS = ("value", "text", "content", "option_text", "option", "description")

_SIGN = r"\s*[.．、:：)）\]】]\s*"
_OPTION = r"[(（\[【]?([A-J])"
# The beginnings of options, the surest form first: a letter with its sign at the beginning of a line, and after a blank; a letter
# and a blank at the beginning of a line; a letter with its sign anywhere; and before a Chinese character, of which three are wanted.
_OPTION_BEGINS = (
    re.compile(rf"^\s*{_OPTION}{_SIGN}", re.MULTILINE),
    re.compile(rf"(?:(?<=[\s。；;，,？?：:)）])|^){_OPTION}{_SIGN}", re.MULTILINE),
    re.compile(r"^\s*([A-J])[ \t\u3000]+(?=\S)", re.MULTILINE),
    re.compile(rf"(?<![A-Za-z0-9]){_OPTION}{_SIGN}"),
    re.compile(r"(?<![A-Za-z0-9])([A-J])\s*(?=[\u4e00-\u9fff])"),
)
_OPTION_FIELD = re.compile(r"(op|opt|option|choice|选项|选择|备选|备选项|选)?[\s_.-]*([a-j]|10|[0-9])")
_ANSWER_LETTERS = re.compile(
    r"(?:(?i:the )?(?i:correct |right )?(?i:answer|option)(?i: is)?|(?:本题)?(?:正确|标准|参考)?(?:答案|选项)|[故应]?选择?)?"
    r"[是为:：\s]*[(（\[【]?([A-J\s,，、;；]+?)[)）\]】]?(?:选?项)?[.。．、]?"
)


@functools.lru_cache(maxsize=4096)
def option_fields(fields: tuple) -> dict[str, object]:
    """{letter: field} of a row that has a field for each option: A, opa, option_a, optionA, 选项A, option1; {} of another."""
    groups = {}
    for field in fields:
        name = unicodedata.normalize("NFKC", str(field)).lower().strip(" .、:()[]【】")
        found = _OPTION_FIELD.fullmatch(name)
        if found and (found[1] or found[2].isalpha()):
            groups.setdefault((found[1], found[2].isalpha()), {})[found[2]] = field
    for (_, lettered), group in groups.items():
        marks = list(LETTERS.lower()) if lettered else [str(number) for number in range("0" not in group, 11)]
        if {marks[0], marks[1]} <= set(group):
            return {letter: group[mark] for letter, mark in zip(LETTERS, marks) if mark in group}
    return {}


def options_in(text: str) -> tuple[str, dict[str, str]]:
    """(the text before the first option, {letter: option}) of a question that lists its options; (text, {}) of another."""
    for strictness, pattern in enumerate(_OPTION_BEGINS):
        found = list(pattern.finditer(text))
        letters = "".join(match[1] for match in found)
        start = max(letters.find("AB"), 0)  # before that, a letter such as that of "维生素 A." is no option
        found, letters = found[start:], letters[start:]
        if len(letters) > 1 + (strictness > 3) and LETTERS.startswith(letters):
            ends = [match.start() for match in found[1:]] + [len(text)]
            options = {match[1]: text[match.end() : end].strip(" \t\n；;") for match, end in zip(found, ends)}
            return text[: found[0].start()].strip(), options
    return text, {}


def letters_alone(answer: str) -> str:
    """The option letters that an answer consists of ("B", "ABD", "答案：B。"), or "" of an answer that says anything else."""
    answer = unicodedata.normalize("NFKC", answer).strip()
    found = _ANSWER_LETTERS.fullmatch(answer.upper() if len(answer) == 1 else answer)
    letters = re.sub("[^A-J]", "", found[1]) if found else ""
    return letters if len(letters) == len(set(letters)) else ""


def exam_item(row: Fields, first: int | None = None) -> tuple[dict, bool]:
    """({"question", "options": {letter: text}, "answer", "subject"} and, unless it is single choice, "kind"; was it guessed?).

    It reads the forms of CMMLU, C-Eval, MMLU, CMB, CMExam, MedQA, ARC, MedMCQA, and options as a text. If nobody knows the
    number of the `first` option, a number that belongs to a list is counted from 0, which is guessed, any other from 1.
    """
    question = question_of(row, QUESTIONS)
    options, lettered = _options(row)
    if options and all(letters_alone(text) == letter for letter, text in options.items()):
        question, options = options_in(question)  # only letters are listed, the options stand in the question
    words = {_plain(option) for option in options.values()}
    asked_as = str(row.get("question_type") or "")
    true_false = "判断" in asked_as or len(options) == 2 and words & RIGHT and words & WRONG
    if true_false and not options:
        options = {"A": "正确", "B": "错误"}
    if len(options) < 2:
        raise Reject("missing or empty options", f"{len(options)} options")
    name = next((name for name in ANSWERS if row.peek(name) is not None), "")
    if not name:
        raise Reject("exam question without an answer", f"fields: {', '.join(map(str, row.row))}")
    given, known = row.get(name), name in COUNTED_FROM_0
    if known:
        row.get("answer")  # the same answer as a text
    listed = type(given) in (int, float) and not lettered
    guessed = first is None and listed and not known and given != 0
    if first is None:
        first = 0 if known or listed or given in (0, "0") else 1
    answer = _answer(given, options, first)
    several = len(answer) > 1 or re.search("多[项选]|multi", asked_as) or row.peek("kind") == MULTIPLE
    kind = MULTIPLE if several else TRUE_FALSE if true_false else SINGLE
    if row.peek("kind") == kind:
        row.get("kind")
    item = {"question": question, "options": options, "answer": answer, "subject": subject_of(row)}
    return (item if kind == SINGLE else item | {"kind": kind}), guessed


def _options(row):
    """({letter: option}, True if the row itself gives them letters)."""
    options = row.get("options") or {letter: row.get(f"option {letter}") for letter in LETTERS}
    if isinstance(options, str) and options.strip()[:1] in ("[", "{"):  # a list in a cell of a table
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            options = ast.literal_eval(options)
    if isinstance(options, str):
        text = options.replace("\\n", "\n").replace("|", "\n")
        lines = [line for line in text.split("\n") if line.strip()]
        options = options_in(text)[1] or (lines if len(lines) > 1 else {})
    if isinstance(options, dict) and isinstance(options.get("text"), list) and options.get("label"):  # ARC
        options = dict(zip(map(str, options["label"]), options["text"]))
    if isinstance(options, list) and all(isinstance(option, dict) for option in options):
        pairs = [
            next(iter(option.items())) if len(option) == 1 else _key_and_text(option) for option in options
        ]
        texts = [text for _, text in pairs]
        options = texts if None in [key for key, _ in pairs] else {str(key): text for key, text in pairs}
    lettered = isinstance(options, dict)
    if isinstance(options, list) and len(options) <= len(LETTERS):
        options = dict(zip(LETTERS, _without_letters(options)))
    given = options if isinstance(options, dict) else {"": options}
    given = {str(key).strip().upper(): text for key, text in given.items() if not is_empty(text)}
    if not all(isinstance(text, str) for text in given.values()):
        raise Reject("wrong type", "the options are not texts by letter")
    if given and all(re.fullmatch(r"\d{1,2}", key) for key in given):  # numbered, from 0 or 1
        low = min(map(int, given))
        given = {LETTERS[(int(key) - low) % len(LETTERS)]: text for key, text in given.items()}
    return {letter: text.strip() for letter, text in given.items()}, lettered


def _key_and_text(option):
    """(letter or None, text or None) of an option that is an object."""
    held = {name: value for name, value in option.items() if not is_empty(value)}
    return tuple(next((held[name] for name in names if name in held), None) for names in (_KEYS, _TEXTS))


def _without_letters(options):
    """The options of a list without the letters or numbers that all begin with ("A. 麻黄", "A 麻黄", "1. 麻黄")."""
    begins = [
        isinstance(option, str) and re.match(rf"\s*[(（]?(?:{letter}(?:{_SIGN}|\s+)|{number}{_SIGN})", option)
        for number, (letter, option) in enumerate(zip(LETTERS, options), 1)
    ]
    return [option[begin.end() :] for begin, option in zip(begins, options)] if all(begins) else options


def _answer(given, options, first):
    """The right letters in order, as one text: of "c", 2 (counted from `first`), "C. 经闭", "经闭", "opc", ["C"], "A,B,D"."""
    if isinstance(given, list):
        return "".join(sorted({letter for part in given for letter in _answer(part, options, first)}))
    is_number = isinstance(given, str) and re.fullmatch(r"\s*\d{1,2}\s*", given)
    if is_number and given.strip() not in options.values():
        given = int(given)
    if isinstance(given, int | float) and not isinstance(given, bool):
        if given - first not in range(len(options)):
            raise Reject("answer not among the options", f"{given} of {len(options)}, the first is {first}")
        return list(options)[int(given) - first]
    given = str(given) if isinstance(given, bool) else given
    text = unicodedata.normalize("NFKC", text_of(Fields({"answer": given}), "answer", "answer"))
    field = _OPTION_FIELD.fullmatch(text.lower())
    if field and field[1]:  # the name of the right option's field: opc, option3
        text = field[2].upper() if field[2].isalpha() else LETTERS[int(field[2]) - 1]
    for letters in (re.sub(r"[\s,、;]", "", text).upper(), letters_alone(text)):
        if letters and set(letters) <= set(options):
            return "".join(sorted(set(letters)))
    text = _plain(text)
    alike = next((words for words in (RIGHT, WRONG) if text in words), {text})
    plain = {letter: _plain(option) for letter, option in options.items()}
    joined = re.sub(r"^([A-J])[.、:)]?\s*", r"\1", text)  # of "C. 经闭"
    same = [letter for letter in plain if plain[letter] in alike]
    same = same or [letter for letter in plain if joined == letter + plain[letter]]
    if len(same) == 1:
        return same[0]
    raise Reject("answer not among the options", f"{text[:40]} of {', '.join(options)}")


def _plain(text):
    return unicodedata.normalize("NFKC", text).strip().upper()


def subject_of(row: Fields) -> str:
    """The subject that the row names, or ""."""
    return next((row.get(name) for name in SUBJECTS if isinstance(row.peek(name), str)), "")


def as_conversation(item: dict, explanation: str) -> list[dict]:
    """An exam item with its explanation as messages: the options listed, the explanation as reasoning."""
    listed = [f"{letter}. {text}" for letter, text in item["options"].items()]
    right = [line for line in listed if line[0] in item["answer"]]
    return [
        {"role": "user", "content": "\n".join([item["question"], *listed])},
        {"role": "assistant", "content": "\n".join(right), "reasoning_content": explanation},
    ]


def exam_in(row: Fields, asked: str, answered: str) -> dict | None:
    """The exam item of a question that lists its options and is answered with letters alone (Monor/hwtcm); else None."""
    letters = letters_alone(answered)
    stem, listed = options_in(asked if "\n" in asked else asked.replace("\\n", "\n")) if letters else ("", {})
    if listed:
        item, _ = exam_item(Fields({"question": stem, "options": listed, "answer": letters}))
        return item | {"subject": subject_of(row)}
    if letters and list(letters) == sorted(letters):
        raise Reject("an option letter without its options", f"the answer is {answered}")
    return None
