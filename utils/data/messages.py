"""Fields and turns of a row, in whatever form a data set has them, as messages: {"role", "content"[, "reasoning_content"]}."""

import functools
import re
from collections.abc import Sequence


def by_alias(names: dict[str, str]) -> dict[str, str]:
    """{alias without _ : name} of {name: "alias alias ..."}."""
    return {alias.replace("_", ""): name for name, aliases in names.items() for alias in aliases.split()}


ROLES = by_alias(
    {
        "system": "system developer",
        "user": "user human patient 用户 患者 病人 问",
        "assistant": "assistant gpt bot chatbot chatgpt bing ai llm model doctor 助手 医生 大夫 答",
        "tool": "tool function observation function_call tool_call tool_response",
    }
)
# The names that fields have in other data sets, in whatever case and with or without _, by the name they are read under.
ALIASES = by_alias(
    {
        "question": "问题 提问 题目 题干 试题 题目内容 questions qtext question_text question_stem stem",
        "answer": "答案 回答 回复 answers",
        "instruction": "指令",
        "input": "输入",
        "output": "输出",
        "system": "系统 系统提示 系统提示词 系统指令 system_prompt system_message system_msg system_instruction sys_prompt "
        "system_text system_content sys 角色设定",
        "reasoning": "reasoning_content reasoning_text think thinking thought thoughts cot complex_cot chain_of_thought "
        "reasoning_process reasoning_steps reasoning_chain thinking_content thinking_process think_content 思路 思考 思考过程 推理 推理过程 推理链 思维链 思考链",
        "options": "option choices option_list options_list 选项 备选答案 选项列表",
        "question_type": "type qtype 题型 题目类型",
        "subject": "科目 学科",
        "explanation": "解析 parse analysis exp rationale",
        "score": "reward rating",
        "chosen": "chosen_response chosen_answer chosen_output response_chosen accepted preferred",
        "rejected": "rejected_response rejected_answer rejected_output response_rejected rejected_messages dispreferred",
        "answer_idx": "answer_index answer_idx answer_id",
        "correct_answer": "correct_option right_answer right_option answer_key 正确答案 正确选项 标准答案 参考答案",
        "loss_mask": "loss_mask train_mask weights loss_weights",
        "tools": "functions tool_calls function_call",
    }
)
TURN_ALIASES = ALIASES | by_alias({"role": "from speaker", "content": "value text sentence utterance"})

# Fields of a turn or row that say if it is learnt, and what they say; of MASKS it is not known what is meant.
LEARNT_MARKS = ("loss", "train", "trainable", "loss_mask", "weight", "loss_weight")
MASKS = ("mask", "masked", "ignore")
SIGNS = {"false": False, "0": False, "0.0": False, "true": True, "1": True, "1.0": True}

EMPTY_TEXTS = {"", *"nan none null n/a #n/a <na> <noinput> noinput <nooutput> [] {}".split()}

# The two speakers' marks of dialogues that stand in one text; those of the last two lines only where a line
# begins, and the very last, which options may have too, only in a list of texts.
_MARKS = (
    (r"<(?:user|human|用户)>\s*[:：]?", r"<(?:bot|assistant|gpt|助手)>\s*[:：]?"),
    (r"#{2,}\s*(?:human|user)\s*[:：]", r"#{2,}\s*(?:assistant|bot|gpt)\s*[:：]"),
    (r"^\s*(?:human|user|用户|患者|病人|问)\s*[:：]", r"^\s*(?:assistant|bot|ai|助手|医生|大夫|答)\s*[:：]"),
    (r"^\s*(?:q|question|提问)\s*[:：]", r"^\s*(?:a|answer|回答|回复)\s*[:：]"),
)
_SPEAKERS = [re.compile(f"(?P<user>{user})|(?P<assistant>{bot})", re.M | re.I) for user, bot in _MARKS]

# Text that no tokenizer or file can carry, and control tokens of models, which would forge a turn; a group's name is the reason.
_UNFIT = re.compile(
    "(?P<control_characters>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f])|(?P<lone_surrogate>[\ud800-\udfff])"
    r"|(?P<undecodable_bytes>\ufffd)|(?P<control_tokens><[|｜][\w▁ ]{2,30}[|｜]>|</s>|^\s*<s>|\[/?INST\]|<</?SYS>>"
    r"|</?tool_(?:call|response)s?>|<(?:start|end)_of_turn>|<(?:[be]os|eo[adhm]|pad|unk|reserved_\d+)>"
    r"|\[(?:gMASK|SEP|CLS|EOS|BOS|PAD|UNUSED_TOKEN_\d+)\])"
    r"|(?P<marks_of_a_dialogue_inside_a_text><(?:user|bot|human|assistant)>\s*[:：]"
    r"|^\s*#{2,}\s*(?:Human|Assistant|Response|Instruction|回答|指令)\s*[:：]"
    r"|^\s*\[Round \d+\]|^\s*(?:Human|Assistant)\s*[:：])",
    re.MULTILINE,
)
_PERHAPS_UNFIT = ("\ufffd", "<", "[", "##", "Human", "Assistant")  # printable text without these is fit


class Reject(Exception):
    """A row is set aside: `reason` is one of few, to count by, `detail` about this row, `row` the row as far as it was read."""

    def __init__(self, reason: str, detail: str = "", row: object = None):
        super().__init__(reason, detail)
        self.reason, self.detail, self.row = reason, detail, row


def is_empty(value: object) -> bool:
    """True if a field holds nothing: null, NaN, no element, or a text such as "nan" that says so."""
    if isinstance(value, str):
        return len(value) < 16 and value.strip().lower() in EMPTY_TEXTS
    return value is None or value != value or isinstance(value, list | dict) and not value


@functools.lru_cache(maxsize=4096)
def plain_names(fields: tuple, of_turn: bool = False) -> dict[str, tuple]:
    """{name that a field is read under: the fields of a row (or turn) that have it}, those that have it without an alias first."""
    names = {}
    aliases = TURN_ALIASES if of_turn else ALIASES
    lower = [(str(field).strip().lower(), field) for field in fields]
    lower = [(aliases.get(re.sub(r"[_\s-]", "", name), name), name, field) for name, field in lower]
    for plain, _, field in sorted(lower, key=lambda found: found[0] != found[1]):
        names[plain] = (*names.get(plain, ()), field)
    return names


class Fields:
    """The fields of a row or turn under their plain names, and which of them were used."""

    def __init__(self, row: dict, names: dict[str, tuple] | None = None, of_turn: bool = False):
        self.row, self.names = row, names or plain_names(tuple(row), of_turn)
        self.used, self.unused_in_turns = set(), {}

    def field(self, name: str) -> object:
        """The row's own name of the field: of several the first that is not empty."""
        fields = self.names.get(name, (name,))
        return next((field for field in fields if not is_empty(self.row.get(field))), fields[0])

    def peek(self, name: str) -> object:
        """The field's value, or None if it is empty or missing."""
        value = self.row.get(self.field(name)) if name in self.names else None
        return None if is_empty(value) else value

    def get(self, name: str) -> object:
        """The field's value, or None if it is empty or missing; the field counts as used."""
        value = self.peek(name)
        if value is not None:
            self.used.add(self.field(name))
        return value

    def unused(self) -> dict[str, object]:
        """{name: value} of all fields that hold something and were not used, those of turns as "messages[].name"."""
        held = {str(field): value for field, value in self.row.items() if field not in self.used}
        return {field: value for field, value in held.items() if not is_empty(value)} | self.unused_in_turns


def text_of(row: Fields, name: str, what: str, optional: bool = False) -> str:
    """The text of a field, ends trimmed and line ends as \\n; Reject if it is no text, or empty and not `optional`.

    A list of one text is this text, and [{"type": "text", "text": ...}, ...] the texts of its parts.
    """
    value, field = row.get(name), row.field(name)
    if isinstance(value, list):
        parts = [isinstance(part, dict) and part.get("type") == "text" and part.get("text") for part in value]
        texts = value if len(value) == 1 and isinstance(value[0], str) else parts
        if not all(isinstance(text, str) for text in texts):
            raise Reject("wrong type", f"{field} is a list, wanted one text, or parts of type text")
        value = "\n".join(map(str.strip, texts))
    if not isinstance(value, str | None):
        raise Reject("wrong type", f"{field} is {type(value).__name__}, wanted text")
    value = (value or "").strip().replace("\r\n", "\n")
    if not value and not optional:
        raise Reject(f"missing or empty {what}", f"{field} is {'empty' if name in row.names else 'missing'}")
    return value


def question_of(row: Fields, names: Sequence[str], optional: bool = False) -> str:
    """The text of the first of these fields that holds something; an instruction with its input."""
    name = next((name for name in names if row.peek(name) is not None), names[0])
    more = text_of(row, "input", "question", optional=True) if name == "instruction" else ""
    return "\n".join(filter(None, [text_of(row, name, "question", optional), more]))


def turns_of(value: object, field: str, row: Fields) -> list[dict]:
    """Messages (role/content), ShareGPT turns (from/value) or marked texts as messages; `row` learns what is not used."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if is_empty(value):
        raise Reject("missing or empty question", f"{field} is empty")
    if isinstance(value, list) and all(isinstance(turn, str) for turn in value):
        turns = [turn for text in value for turn in marked_turns(text, both=False)]
        if len(turns) < len(value):
            raise Reject("wrong type", f"{field} is a list of texts that do not say who speaks")
        return turns
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Reject("wrong type", f"{field} is not a list of turns")
    turns = []
    for number, given in enumerate(value, 1):
        turn = Fields(given, of_turn=True)
        if {"human", "assistant"} <= set(given):  # Firefly: an exchange each
            turns.append({"role": "user", "content": text_of(turn, "human", "question")})
            turns.append(assistant_message(text_of(turn, "assistant", "answer")))
        else:
            turns += _turn(turn, f"{field}, turn {number}")
        for name, unused in turn.unused().items():
            row.unused_in_turns.setdefault(f"{field}[].{name}", unused)
    if not turns:
        raise Reject("missing or empty question", f"{field} holds no text")
    return turns


def _turn(turn, place):
    """[the message of one turn], or [] of an empty system text."""
    said = turn.get("role")
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role == "tool" or turn.peek("tools") is not None:
        raise Reject("tool calls are not trained", place)
    if role is None:
        wanted = "system, user (human), assistant (gpt)"
        raise Reject("roles out of order", f"{place}: role {said!r}; wanted {wanted}")
    text = text_of(turn, "content", "answer" if role == "assistant" else "question", role == "system")
    refuse_unlearnt(turn, f"{place}: ", answer=role == "assistant")
    if role == "assistant":
        return [assistant_message(text, text_of(turn, "reasoning", "reasoning", optional=True))]
    return [{"role": role, "content": text}] if text else []


def refuse_unlearnt(row: Fields, place: str = "", answer: bool = True, turns: Sequence[dict] = ()) -> None:
    """Reject of an `answer`, or a row, that is marked as not to be learnt; of a list of signs, one a turn, those of answers count."""
    for mark in (*LEARNT_MARKS, *MASKS):
        value = row.peek(mark)
        sign = SIGNS.get(str(value).strip().lower())
        if turns and isinstance(value, list):
            learnt = [mine for mine, turn in zip(value, turns) if turn["role"] == "assistant"]
            sign = len(value) == len(turns) and all(learnt)
        if sign is not None:
            row.get(mark)
        if answer and (sign is False or mark in MASKS and value is not None):
            raise Reject("marked as not to be learnt", f"{place}{row.field(mark)} is {value!r}")


def marked_turns(text: str, both: bool = True) -> list[dict]:
    """The turns of a dialogue that stands in one text, such as "<user>: ... <bot>: ..."; [] of any other text.

    It begins with a speaker's mark; an answer's mark at its end asks for the answer. `both`: both speakers have to speak.
    """
    text = text.strip()
    for speakers in _SPEAKERS[: 3 if both else 4]:
        if not speakers.match(text):
            continue
        marks = list(speakers.finditer(text))
        if both and len({mark.lastgroup for mark in marks}) < 2:
            continue
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        texts = [(mark.lastgroup, text[mark.end() : end].strip()) for mark, end in zip(marks, ends)]
        if texts[-1] == ("assistant", ""):
            texts.pop()
        if texts and all(said for _, said in texts):
            return [{"role": role, "content": said} for role, said in texts]
    return []


def exchanges(turns: list[dict]) -> list[dict]:
    """The turns from the first of the user to the last of the assistant, with the system text; Reject if they do not alternate."""
    roles = "".join(turn["role"][0] for turn in turns)  # s, u and a
    found = re.fullmatch("(s?)a*((?:ua)+)u*", roles)
    if not found:
        raise Reject("roles out of order", " ".join(turn["role"] for turn in turns))
    return turns[: found.end(1)] + turns[found.start(2) : found.end(2)]


def assistant_message(text: str, reasoning: str = "") -> dict:
    """An assistant message; a think block at the start of its text becomes its reasoning."""
    if "think>" in text:
        thought, closed, rest = text.partition("</think>")
        thought = thought.strip().removeprefix("<think>").strip()
        if not closed or "think>" in rest or "<think>" in thought:
            raise Reject("think block out of place", "wanted one closed <think> block before the answer")
        if thought and reasoning and thought != reasoning:
            raise Reject("reasoning given twice", "a think block, and a field of its own")
        text, reasoning = rest.strip(), reasoning or thought
        if not text:
            raise Reject("missing or empty answer", "nothing after the think block")
    message = {"role": "assistant", "content": text}
    return message | {"reasoning_content": reasoning} if reasoning else message


def check_text(text: str) -> None:
    """Reject of a text that is unfit to be trained; most texts are told to be fit without the slow pattern."""
    if not text.replace("\n", "").isprintable() or any(sign in text for sign in _PERHAPS_UNFIT):
        found = _UNFIT.search(text)
        if found:
            around = text[max(0, found.start() - 10) : found.start() + 20]
            raise Reject(found.lastgroup.replace("_", " "), f"{found.group()!r} in {around!r}")
