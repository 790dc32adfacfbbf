"""Turns of a conversation, in whatever form a data set has them, as messages: {"role", "content"[, "reasoning_content"]}.

An assistant message that the data set marks with weight 0 (OpenAI's fine-tuning form) carries "weight": 0 on its way through
here; no output row does.
"""

from collections.abc import Sequence

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class Reject(Exception):
    """Why a row is set aside: `reason` is one of few, to count by, `detail` about this row, `row` what was read of it."""

    def __init__(self, reason: str, detail: str = "", row: object = None):
        super().__init__(reason, detail)
        self.reason, self.detail, self.row = reason, detail, row


def text_of(row: dict, field: str, what: str, optional: bool = False) -> str:
    """The text of a field, ends trimmed and line ends as \\n; Reject where it is no text, or empty and not `optional`."""
    value = row.get(field)
    if value is None:
        value = ""
    elif isinstance(value, list):
        value = _joined_parts(value, field)
    elif not isinstance(value, str):
        raise Reject("wrong type", f"{field} is {type(value).__name__}, wanted text")
    value = value.strip()
    if "\r" in value:
        value = value.replace("\r\n", "\n")
    if not value and not optional:
        raise Reject(f"missing or empty {what}", f"{field} is {'missing' if field not in row else 'empty'}")
    return value


def _joined_parts(parts, field):
    """The text of [{"type": "text", "text": ...}, ...]; images and sounds cannot be learnt from."""
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise Reject("wrong type", f"{field} is a list, wanted text or parts of type text")
    return "\n".join(text_of(part, "text", "text", optional=True) for part in parts)


def turns_of(value: object, field: str) -> list[dict]:
    """Messages (role/content) or ShareGPT turns (from/value) as messages."""
    if value is None or value == []:
        raise Reject("missing or empty question", f"{field} is empty")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Reject("wrong type", f"{field} is not a list of turns")
    turns = []
    for number, turn in enumerate(value, 1):
        said = turn.get("role", turn.get("from"))
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            wanted = ", ".join(ROLES)
            raise Reject("roles out of order", f"{field}, turn {number}: role {said!r}; wanted {wanted}")
        name = "content" if "content" in turn else "value"
        text = text_of(turn, name, "answer" if role == "assistant" else "question", role == "system")
        if role == "assistant":
            message = assistant_message(text, text_of(turn, "reasoning_content", "reasoning", optional=True))
            turns.append(message | ({"weight": 0} if turn.get("weight") == 0 else {}))
        elif text:
            turns.append({"role": role, "content": text})
    return turns


def trimmed(messages: list[dict]) -> list[dict]:
    """The messages from the first turn of the user to the last of the assistant, after the system text, if any."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    spoken = messages[len(system) :]
    while spoken and spoken[0]["role"] == "assistant":
        spoken = spoken[1:]
    while spoken and spoken[-1]["role"] == "user":
        spoken = spoken[:-1]
    return system + spoken if spoken else messages


def in_order(messages: list[dict], last: str) -> list[dict]:
    """The messages, if they are: an optional system text, then user and assistant in turn, ending with `last`."""
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"] * (len(spoken) % 2):
        raise Reject("roles out of order", " ".join(roles))
    if spoken[-1] != last:
        raise Reject("roles out of order", f"ends with a turn of the {spoken[-1]}, wanted {last}")
    return messages


def system_message(row: dict, turns: Sequence[dict] = ()) -> list[dict]:
    """[the row's system text as a message], or [] where it has none or the turns have their own."""
    text = text_of(row, "system", "system text", optional=True) if "system" in row else ""
    if not text or turns and turns[0]["role"] == "system":
        return []
    return [{"role": "system", "content": text}]


def history_of(row: dict) -> list[dict]:
    """LLaMA-Factory's `history`: [[question, answer], ...]."""
    history = row.get("history")
    if not history:
        return []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise Reject("wrong type", "history is not a list of [question, answer]")
    turns = []
    for question, answer in history:
        turns.append({"role": "user", "content": text_of({"history": question}, "history", "question")})
        turns.append(assistant_message(text_of({"history": answer}, "history", "answer")))
    return turns


def assistant_message(text: str, reasoning: str = "") -> dict:
    """An assistant message; a think block at the start of its text becomes its reasoning."""
    if "think>" in text:
        thought, closed, rest = text.partition("</think>")
        thought = thought.strip().removeprefix("<think>").strip()
        if not closed or "think>" in rest or "<think>" in thought:
            raise Reject("think block out of place", "wanted one closed <think> block before the answer")
        text, reasoning = rest.strip(), reasoning or thought
        if not text:
            raise Reject("missing or empty answer", "nothing after the think block")
    message = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    return message
