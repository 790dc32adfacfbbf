"""Rows that are questions and answers, conversations or preference pairs, as messages.

Every reader takes the row's Fields and the name of its schema, and returns (kind, schema, body): a conversation ("sft"), a
preference pair ("dpo"), an answer that is marked as bad ("bad"), or the exam item ("exam") that a question turns out to be.
"""

import re

from utils.data.exams import exam_item, letters_alone, options_in, subject_of
from utils.data.messages import (
    LEARNT_MARKS,
    MASKS,
    Fields,
    Reject,
    assistant_message,
    history_of,
    in_order,
    marked_turns,
    not_learnt,
    question_of,
    system_message,
    text_of,
    trimmed,
    turns_of,
)


def read_question_answer(row, schema, options, named):
    question, context, answer = named
    value = row.peek(question)
    if isinstance(value, list) and all(isinstance(turn, dict) and "type" not in turn for turn in value):
        turns = turns_of(row.get(question), question, row)  # TRL's prompt/completion in message form
        turns += turns_of(row.get(answer), answer, row)
        return _trained_or_bad(row, schema, in_order(system_message(row, turns) + turns, "assistant"))
    asked = text_of(row, question, "question", optional=bool(context))
    if context:
        more = text_of(row, context, "question", optional=True)
        asked = "\n".join(filter(None, [asked if asked not in more else "", more]))
        if not asked:
            raise Reject("missing or empty question", f"{question} and {context} are empty")
    answered = text_of(row, answer, "answer")
    said = marked_turns(asked, both=False) + marked_turns(answered, both=False)
    if [turn["role"] for turn in said] == ["user", "assistant"]:  # "问：..." and "答：..."
        asked, answered = (turn["content"] for turn in said)
    item = _exam_in(row, asked, answered)
    if item:
        return "exam", "exam in the question", item
    asking = marked_turns(asked) or [{"role": "user", "content": asked}]
    messages = [*system_message(row), *history_of(row), *asking]
    messages.append(assistant_message(answered, text_of(row, "reasoning", "reasoning", optional=True)))
    columns = f"question={row.field(question)},answer={row.field(answer)}"
    kept = in_order(trimmed(messages), "assistant") if len(asking) > 1 else messages
    return _trained_or_bad(row, schema, kept, columns)


def _exam_in(row, asked, answered):
    """The exam item of a question that lists its options, where the answer is nothing but letters (Monor/hwtcm); else None."""
    letters = letters_alone(answered)
    stem, listed = options_in(asked if "\n" in asked else asked.replace("\\n", "\n")) if letters else ("", {})
    if listed:
        item = exam_item(Fields({"question": stem, "options": listed, "answer": letters}))
        return item | {"subject": subject_of(row)}
    if letters and list(letters) == sorted(letters):
        raise Reject("an option letter without its options", f"the answer is {answered}")
    return None


def read_conversation(row, schema, options, name):
    value = row.get(name)
    turns = turns_of([value] if isinstance(value, str) else value, name, row)
    for mark in (*LEARNT_MARKS, *MASKS):  # one sign for each turn
        if isinstance(mask := row.peek(mark), list):
            row.get(mark)
            learnt = [sign for sign, turn in zip(mask[-len(turns) :], turns) if turn["role"] == "assistant"]
            if mark in MASKS or len(mask) != len(value) or not all(learnt):
                raise Reject("marked as not to be learnt", f"{row.field(mark)} is {mask}")
    messages = system_message(row, turns) + turns
    kept = in_order(trimmed(messages), "assistant")
    item = _exam_in(row, kept[-2]["content"], kept[-1]["content"])
    if item and len(kept) > 2 + (kept[0]["role"] == "system"):
        raise Reject("an exam question inside a conversation", f"the answer is {item['answer']}")
    if item:
        return "exam", "exam in the question", item
    reasoning = text_of(row, "reasoning", "reasoning", optional=True)
    if reasoning and "reasoning_content" not in kept[-1]:
        kept[-1]["reasoning_content"] = reasoning
    kind, schema, body = _trained_or_bad(row, schema or name, kept)
    return kind, schema, body | {"trimmed": len(kept) < len(messages)}


def _trained_or_bad(row, schema, messages, columns=""):
    """The conversation to train on; a pair where the row has a rejected answer too; or a bad answer where the row (KTO) or
    its last turn (weight 0) is marked as one. `columns`: the setting that would read the row whatever judges its answer."""
    answers = [message for message in messages if message["role"] == "assistant"]
    weights = [answer.pop("weight", 1) for answer in answers]
    if 0 in weights[:-1]:
        raise Reject("marked as not to be learnt", "an answer that is not the last has weight 0")
    if not_learnt(row, "the row"):
        raise Reject("marked as not to be learnt", "the row has weight 0")
    if row.peek("rejected") is not None:
        return _pair(row, schema, messages[:-1], messages[-1:], _answer_turns(row, "rejected"))
    if any(name.startswith("rejected") and row.peek(name) is not None for name in row.names):
        raise Reject("a rejected answer of an unknown form", "beside the answer")
    judged = [row.get(mark) for mark in ("label", "kto_tag") if _truth(row.peek(mark)) is not None]
    if weights[-1] == 0 or any(_truth(mark) is False for mark in judged):
        return "bad", f"{schema}, marked as bad", {"prompt": messages[:-1], "rejected": messages[-1:]}
    by_hand = {"answer", "处方", "答"} & set(row.names)
    number = re.compile(r"\s*-?\d+(?:\.\d+)?\s*")
    mark = next((mark for mark in ("label", "score") if number.fullmatch(str(row.peek(mark)))), "")
    if mark and schema != "--columns" and (mark == "label" or not by_hand):
        unused = ", ".join(row.unused())
        way = f"; if it is right in every row: --columns {columns}" if columns else ""
        raise Reject("a label or score beside the answer", f"it may be a bad one; not used: {unused}{way}")
    return "sft", schema, {"messages": messages}


def _truth(value):
    """True or False as JSON has it, or as a table writes it; else None: 0 is a number of something else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def read_preference(row, schema, options):
    """TRL: prompt/chosen/rejected as text or messages, the prompt explicit or shared; LLaMA-Factory: both its forms."""
    chosen, rejected = _answer_turns(row, "chosen"), _answer_turns(row, "rejected")
    prompt = _preference_prompt(row)
    if len(chosen) > 1:  # whole conversations: what they share is the prompt
        if chosen[:-1] != rejected[:-1]:
            raise Reject("roles out of order", "chosen and rejected differ before their last turn")
        whole = chosen[0]["role"] == "system" or len(chosen) > len(prompt)
        prompt = chosen[:-1] if whole else prompt + chosen[:-1]
        chosen, rejected = chosen[-1:], rejected[-1:]
    if not prompt:
        raise Reject("missing or empty question", "prompt")
    return _pair(row, schema, system_message(row, prompt) + history_of(row) + prompt, chosen, rejected)


def _pair(row, schema, prompt, chosen, rejected):
    if len(rejected) > 1 and rejected[:-1] != prompt:
        raise Reject("roles out of order", "chosen and rejected differ before their last turn")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Reject("roles out of order", "chosen and rejected have to end with an assistant turn")
    if chosen[-1] == rejected[-1]:
        raise Reject("chosen equals rejected", "")
    if ("reasoning_content" in chosen[-1]) != ("reasoning_content" in rejected[-1]):
        raise Reject("reasoning on one side of a pair", "")
    kind = row.get("kind") if isinstance(row.peek("kind"), str) else "given"
    sides = {"chosen": chosen[-1:], "rejected": rejected[-1:]}
    return "dpo", schema, {"prompt": in_order(prompt, "user"), **sides, "kind": kind}


def _preference_prompt(row):
    """The turns before the two answers, as far as they have a field of their own."""
    for name in ("conversations", "messages", "prompt"):
        if name == "conversations" and name in row.names or isinstance(row.peek(name), list):
            return turns_of(row.get(name), name, row)
    asked = question_of(row, ("prompt", "question", "instruction", "query", "input"), optional=True)
    return [{"role": "user", "content": asked}] if asked else []


def _answer_turns(row, name):
    value = row.peek(name)
    if isinstance(value, str) and marked_turns(value):  # HH-RLHF: the whole dialogue in one text
        return marked_turns(row.get(name))
    if value is None or isinstance(value, str):
        return [assistant_message(text_of(row, name, "answer"))]
    return turns_of([row.get(name)] if isinstance(value, dict) else row.get(name), name, row)
