"""What has been said: questions and answers in plain text, the part that a model is shown, and the file to keep them in.

Every prompt is rendered from the text anew, by the path that training uses (utils/model/chat_format.py), so the model sees the
conversation as it was trained to see one.
"""

import bisect
import functools
import json
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from utils.chat.model import ChatModel
from utils.chat.options import Options
from utils.errors import UserError
from utils.files import read_jsonl, show_path


@dataclass
class Turn:
    """A question and its answer; `whole` is False where Ctrl-C or the token limit cut the answer."""

    question: str
    answer: str
    reasoning: str
    whole: bool

    def messages(self) -> list[dict]:
        reasoning = {"reasoning_content": self.reasoning} if self.reasoning else {}
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer, **reasoning},
        ]


class History:
    """The system text and the turns. `start` is the first turn that still fits into the context window."""

    def __init__(self, system: str = ""):
        self.system, self.start = system, 0
        self.turns: list[Turn] = []

    def messages(self, turns: list[Turn], question: str = "") -> list[dict]:
        """The system text, some turns, and a question, as a model's messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        last = [{"role": "user", "content": question}] if question else []
        return [*system, *(message for turn in turns for message in turn.messages()), *last]

    def prompt(self, chat_model: ChatModel, options: Options, question: str, count: int) -> list[int]:
        """The ids that ask `question` after the first `count` turns, of which the oldest are left out, whole ones only, until
        an answer has room. UserError where the question alone is too long.

        At most 2 + log2(turns) renderings: a long conversation takes a tenth of a second for each.
        """
        room = min(options.max_new_tokens, chat_model.context // 2)

        @functools.cache
        def render(start):
            return chat_model.encode(self.messages(self.turns[start:count], question), options)

        def fits(start):
            return len(render(start)) + room <= chat_model.context

        chat_model.check_length(render(count))
        start = min(self.start, count)
        if not fits(start):
            start += bisect.bisect_left(range(start, count), True, key=fits)
        self.start = start
        return render(start)

    def save(self, path: Path) -> int:
        """Append the turns that came to their end to a JSONL file, as one row to train on; return how many they are."""
        whole = [turn for turn in self.turns if turn.whole]
        if not whole:
            raise UserError("nothing to save: no answer that came to its end")
        row = json.dumps({"messages": self.messages(whole)}, ensure_ascii=False).encode()
        with open(path, "a+b") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            # a file edited by hand may lack its last line break
            line_break = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(line_break + row + b"\n")
        return len(whole)


def load_history(path: Path) -> History:
    """The conversation in the last row of a JSONL file, as History.save writes it. UserError where it is none."""
    [row] = deque(read_jsonl(path, ["messages"]), maxlen=1)
    messages = row["messages"]
    history = History(messages.pop(0)["content"] if messages[0]["role"] == "system" else "")
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"{show_path(path)}, last line: wanted questions and answers in turn")
    for question, answer in zip(messages[::2], messages[1::2]):
        reasoning = answer.get("reasoning_content")
        reasoning = reasoning if isinstance(reasoning, str) else ""
        history.turns.append(Turn(question["content"], answer["content"], reasoning, True))
    return history
