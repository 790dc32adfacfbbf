"""Exam items: single choice, multiple choice and true or false, in the forms in which exams are published."""

import re
import unicodedata

from utils.data.messages import Reject, text_of

LETTERS = "ABCDEFGHIJ"
SINGLE, MULTIPLE, TRUE_FALSE = "single", "multiple", "true_false"  # `kind` of an item; single is not written
RIGHT, WRONG = {"对", "正确", "是", "√", "T", "TRUE"}, {"错", "错误", "否", "×", "F", "FALSE"}
SUBJECTS = ("subject", "exam_subject", "subject_name", "exam_class")  # fields; the first that a row has

_SIGN = r"\s*[.．、:：)）]\s*"
OPTION_LINE = re.compile(rf"^\s*[(（]?([A-J]){_SIGN}", re.MULTILINE)
OPTION_IN_LINE = re.compile(rf"(?:(?<=[\s。；;，,？?：:)）])|^)[(（]?([A-J]){_SIGN}", re.MULTILINE)


def options_in(text: str) -> tuple[str, dict[str, str]]:
    """(the text before the first option, {letter: option}) of a question that lists its options; (text, {}) of another."""
    for pattern in (OPTION_LINE, OPTION_IN_LINE):
        found = list(pattern.finditer(text))
        letters = "".join(match[1] for match in found)
        start = max(letters.find("AB"), 0)  # before that, a letter such as that of "维生素 A." is no option
        found, letters = found[start:], letters[start:]
        if len(letters) > 1 and LETTERS.startswith(letters):
            ends = [match.start() for match in found[1:]] + [len(text)]
            options = {match[1]: text[match.end() : end].strip(" \t\n；;") for match, end in zip(found, ends)}
            return text[: found[0].start()].strip(), options
    return text, {}


def exam_item(row: dict) -> dict:
    """{"question", "options": {letter: text}, "answer", "subject"} and, unless it is single choice, "kind".

    Read are the project's own form, CMMLU and C-Eval (columns A to D), MMLU (choices, the answer's number), CMB (option:
    {A: ...}), CMExam (Options: [{key, value}, ...]), MedQA (the answer's text, and answer_idx) and options as a text.
    """
    question = text_of(row, "question", "question")
    options = _options(row)
    words = {_plain(option).upper() for option in options.values()}
    judged = len(options) == 2 and words & RIGHT and words & WRONG
    true_false = bool(judged) or "判断" in str(row.get("question_type") or "")
    if true_false and not options:
        options = {"A": "正确", "B": "错误"}
    if len(options) < 2:
        raise Reject("missing or empty options", f"{len(options)} options")
    answer = _answer(row, options)
    kind = TRUE_FALSE if true_false else SINGLE
    if len(answer) > 1 or "多" in str(row.get("question_type") or ""):
        kind = MULTIPLE
    item = {"question": question, "options": options, "answer": answer, **subject_of(row)}
    return item if kind == SINGLE else item | {"kind": kind}


def _options(row):
    options = row.get("options", row.get("option"))
    if options is None:
        options = {letter: row.get(letter.lower(), row.get(letter)) for letter in LETTERS}
    if isinstance(options, str):
        options = options_in(options)[1] or options_in(options.replace("|", "\n"))[1]
    if isinstance(options, list) and all(isinstance(option, dict) for option in options):
        options = {option.get("key"): option.get("value") for option in options}
    if isinstance(options, list) and len(options) <= len(LETTERS):
        options = dict(zip(LETTERS, map(_without_letter, options, LETTERS)))
    if not isinstance(options, dict) or not all(isinstance(text, str | None) for text in options.values()):
        raise Reject("wrong type", "the options are not texts by letter")
    given = {letter: text.strip() for letter, text in options.items() if text}
    return {str(letter).strip().upper(): text for letter, text in given.items() if text}


def _without_letter(option, letter):
    """An option of a list without the letter that it may begin with ("A. 麻黄")."""
    return re.sub(rf"^\s*{letter}{_SIGN}", "", option) if isinstance(option, str) else option


def _answer(row, options):
    """The right letters in order, as one text: of "c", 2, "C. 经闭", "经闭" or "A,B,D"."""
    given = row.get("answer_idx") if row.get("answer_idx") is not None else row.get("answer")
    if isinstance(given, list) and all(isinstance(part, str) for part in given):
        given = "".join(given)
    if isinstance(given, int):  # the answer's number, from 0, as MMLU has it; or true and false
        if isinstance(given, bool):
            given = str(given)
        elif 0 <= given < len(options):
            return list(options)[given]
        else:
            raise Reject("answer not among the options", f"number {given} of {len(options)}")
    text = unicodedata.normalize("NFKC", text_of({"answer": given}, "answer", "answer"))
    letters = re.sub(r"[\s,、;]", "", text).upper()
    if set(letters) <= set(options):
        return "".join(sorted(set(letters)))
    letter = text[:1].upper()
    if letter in options and re.fullmatch(r"[.、:)]?\s*", text[1:].replace(_plain(options[letter]), "")):
        return letter
    same = [letter for letter, option in options.items() if _means(text, option)]
    if len(same) == 1:
        return same[0]
    raise Reject("answer not among the options", f"{text[:40]} of {', '.join(options)}")


def _plain(text):
    return unicodedata.normalize("NFKC", text).strip()


def _means(answer, option):
    answer, option = _plain(answer).upper(), _plain(option).upper()
    return answer == option or any({answer, option} <= words for words in (RIGHT, WRONG))


def subject_of(row: dict) -> dict[str, str]:
    """{"subject": what the row says it is about, or ""}."""
    named = (row[name] for name in SUBJECTS if isinstance(row.get(name), str) and row[name].strip())
    return {"subject": next(named, "")}


def as_conversation(item: dict, explanation: str) -> list[dict]:
    """An exam item with its explanation as messages: the options listed, the explanation as reasoning."""
    listed = "\n".join(f"{letter}. {text}" for letter, text in item["options"].items())
    right = "\n".join(f"{letter}. {item['options'][letter]}" for letter in item["answer"])
    return [
        {"role": "user", "content": f"{item['question']}\n{listed}"},
        {"role": "assistant", "content": right, "reasoning_content": explanation},
    ]
