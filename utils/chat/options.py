"""How answers are made: what /set and the flags of the chat script take, and what holds for every answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.errors import UserError

if TYPE_CHECKING:  # torch takes seconds, and wrong flags are told before
    import torch


LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Kind(NamedTuple):
    """A setting's type, and its limits in words and as a test."""

    type: type
    wanted: str
    allowed: Any  # a function of the value


KINDS = {
    # below 0.01 the scores overflow; 0 means greedy
    "temperature": Kind(float, "0 (greedy) or a number from 0.01 to 10", lambda v: v == 0 or 0.01 <= v <= 10),
    "top_p": Kind(float, "a number above 0, up to 1", lambda v: 0 < v <= 1),
    "top_k": Kind(int, "a whole number, 0 for no limit", lambda v: v >= 0),
    "repetition_penalty": Kind(float, "a number from 0.1 to 10", lambda v: 0.1 <= v <= 10),
    "max_new_tokens": Kind(int, "a whole number from 1", lambda v: v > 0),
    "seed": Kind(int, "a whole number from 0", lambda v: 0 <= v < 2**63),
}


def read_value(name: str, value: str | float, where: str) -> float:
    """`value` as setting `name` takes it. UserError, with `where` it was given, for any other."""
    kind = KINDS[name]
    try:
        number = kind.type(value)
    except (ValueError, TypeError, OverflowError):
        number = None
    if number is None or not kind.allowed(number):
        raise UserError(f"{where}: wanted {kind.wanted}, got {value!r}")
    return number


@dataclass
class Options:
    """What holds for every answer. `thinking`: True, False or None (the folder's own mode); `decoding`: changes to its
    generation_config, by name."""

    thinking: bool | None
    max_new_tokens: int
    show_thinking: bool
    generator: torch.Generator
    decoding: dict = field(default_factory=dict)

    def apply(self, name: str, value: float) -> None:
        """Change one setting to a value that read_value has passed."""
        if name == "max_new_tokens":
            self.max_new_tokens = value
        elif name == "seed":
            self.generator.manual_seed(value)
        elif name == "temperature":  # 0 would divide by zero; its limit is greedy decoding
            self.decoding |= {"do_sample": True, "temperature": value} if value else {"do_sample": False}
        else:
            self.decoding[name] = value
