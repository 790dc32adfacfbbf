"""OpenAI's chat completions: what a request asks for, and an answer as clients expect it.

A field that would change the answer and that is not done here is refused by its name. Fields and their meaning:
https://platform.openai.com/docs/api-reference/chat/create; top_k, repetition_penalty and chat_template_kwargs are vLLM's.
"""

import json
import time
import uuid
from dataclasses import asdict, replace

import torch

from utils.chat.model import RULES, ChatModel, Options, Reply
from utils.errors import UserError
from utils.files import is_text
from utils.settings import read_number

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Settings that a request may change: the name in the request, and ours.
SETTINGS = {name: name for name in RULES} | {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
}
INSIDE = (
    "stream_options",
    "chat_template_kwargs",
)  # objects, whose fields are read as stream_options.include_usage
THINKING = ("enable_thinking", "chat_template_kwargs.enable_thinking")
FLAGS = {"stream", "stream_options.include_usage", *THINKING}
# Who asks, and what is to be kept or measured beside an answer: these change none.
WITHOUT_EFFECT = set(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention parallel_tool_calls "
    "cache_prompt timings_per_token id chat_id session_id stream_options.include_obfuscation".split()
)
KNOWN = {"model", "messages", "stop"} | SETTINGS.keys() | FLAGS | WITHOUT_EFFECT
IN_MESSAGES = {"role", "content", "name", "reasoning_content", "reasoning", "refusal"}
# Values with which a field that is not done asks for nothing; so do null, {} and [].
NEUTRAL = {
    "n": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "min_p": [0],
    "tool_choice": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
}


def read_request(body: bytes, options: Options) -> tuple[dict, list[dict], Options]:
    """(its fields, its messages, its options) of a request in JSON; what it does not set is as in `options`. UserError if it
    cannot be answered."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise UserError('wanted {"messages": [...]}')
    for name in INSIDE:
        if isinstance(request.get(name), dict):
            request |= {f"{name}.{inner}": value for inner, value in request.pop(name).items()}
    _refuse_unknown(request, KNOWN)
    for name in FLAGS:
        if not isinstance(request.get(name), bool | None):
            raise UserError(f"{name}: wanted true or false")
    messages = [_read_message(message) for message in request["messages"]]
    if not messages or messages[-1]["role"] != "user":
        raise UserError("the last message has to be the user's")
    own = replace(options, decoding=dict(options.decoding), generator=torch.Generator())
    own.apply("seed", -1)  # another one every time, unless the request brings its own
    for name, ours in SETTINGS.items():
        if request.get(name) is not None:
            own.apply(ours, read_number(name, request[name], RULES[ours]))
    stops = [request["stop"]] if isinstance(request.get("stop"), str) else request.get("stop") or []
    if not isinstance(stops, list) or not all(is_text(stop) and stop for stop in stops):
        raise UserError("stop: wanted a text, or a list of texts")
    own.stop = tuple(stops)
    own.thinking = next((request[name] for name in THINKING if request.get(name) is not None), own.thinking)
    return request, messages, own


def _refuse_unknown(fields, known):
    for name, value in fields.items():
        if name not in known and value not in (None, [], {}, *NEUTRAL.get(name, [])):
            raise UserError(f"{name} is not supported here, and would change the answer; leave it out")


def _read_message(message):
    role = ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
    content = message.get("content") if role else None
    if isinstance(content, list):  # OpenAI's parts; only texts are understood
        parts = [part if isinstance(part, dict) else {} for part in content]
        if other := next((part["type"] for part in parts if part.get("type", "text") != "text"), ""):
            raise UserError(f"content parts of type {other!r} are not supported here, only text")
        texts = [part.get("text") for part in parts]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not is_text(content):
        raise UserError(
            'every message is wanted as {"role": "system", "user" or "assistant", "content": text}'
        )
    _refuse_unknown(message, IN_MESSAGES)
    return {"role": role, "content": content}


class Answer:
    """The JSON of one answer, whole or as the events of a stream."""

    def __init__(self, chat_model: ChatModel, prompt: list[int]):
        self.prompt_tokens, self.model, self.created = len(prompt), chat_model.name, int(time.time())
        self.id = f"chatcmpl-{uuid.uuid4().hex}"

    def whole(self, reply: Reply) -> dict:
        reasoning = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
        message = {"role": "assistant", "content": reply.content, **reasoning}
        choice = {"index": 0, "message": message, "finish_reason": self.reason(reply)}
        return self._about("chat.completion", [choice], usage=self.usage(reply))

    def event(self, delta: dict | None, **more) -> bytes:
        """One event of a stream: what comes next of the message, if anything, and why it has ended, or the usage."""
        reason = more.pop("finish_reason", None)
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
        event = self._about("chat.completion.chunk", choices, **more)
        return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()

    def _about(self, kind, choices, **more):
        about = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**about, "choices": choices, **more}

    def usage(self, reply: Reply) -> dict:
        tokens = {"prompt_tokens": self.prompt_tokens, "completion_tokens": reply.tokens}
        return {**tokens, "total_tokens": self.prompt_tokens + reply.tokens}

    def reason(self, reply: Reply) -> str:
        return "stop" if reply.ended else "length"


def describe_model(chat_model: ChatModel, options: Options, system: str) -> dict:
    """An entry of the list of models. `meta` is for the page: the values that hold unless a request sets others."""
    meta = asdict(chat_model.decoding(options))
    meta["temperature"] *= meta["do_sample"]
    meta |= {"thinking": chat_model.thinks(options), "max_tokens": options.max_new_tokens, "system": system}
    meta["single_questions"] = chat_model.record.get("conversations") == "single"
    return {"id": chat_model.name, "object": "model", "created": 0, "owned_by": "local", "meta": meta}
