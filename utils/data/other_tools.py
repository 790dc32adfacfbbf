"""Training rows in the two forms that other trainers read: one row per assistant turn, in the context that chat would give it.

docs/other_tools.md has the lines of configuration with which LLaMA-Factory, Axolotl, mlx-lm and TRL train them.
"""

from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.files import read_jsonl, show_path, write_jsonl

# messages: LLaMA-Factory, Axolotl, mlx-lm. prompt-completion: TRL, which trains each row in its own thinking mode.
FORMS = ("messages", "prompt-completion")


def save_training_data(data_dir: Path, place: Path, form: str) -> list[Path]:
    """Write the rows of sft_*.jsonl and dpo_*.jsonl in `data_dir` to `place` under the same names; returns their paths.

    UserError if there are none, or if `messages`, which hold no thinking mode, would need two.
    """
    names = [f"{kind}_{split}.jsonl" for kind in ("sft", "dpo") for split in ("train", "eval")]
    found = [data_dir / name for name in names if (data_dir / name).is_file()]
    if not found:
        raise UserError(
            f"{show_path(data_dir)} holds no sft_*.jsonl or dpo_*.jsonl; make them with: "
            "python data_prepare/convert_to_qwen3_format.py"
        )
    modes = {bool(replies[0].get("reasoning_content")) for path in found for _, replies in read_turns(path)}
    if form == "messages" and len(modes) > 1:
        raise UserError(
            f"{show_path(data_dir)} has rows with reasoning and rows without, and a tool trains all messages in one "
            "thinking mode; --form prompt-completion (TRL) keeps each row's own"
        )
    for path in found:
        write_jsonl(place / path.name, (row_of(form, *turn) for turn in read_turns(path)))
    return [place / path.name for path in found]


def read_turns(path: Path) -> Iterator[tuple[list[dict], list[dict]]]:
    """(messages up to a question, [its answer] or [chosen, rejected]), one for every turn that is trained.

    Earlier answers carry no reasoning, as in Qwen3's own history.
    """

    def plain(messages):
        return [{"role": message["role"], "content": message["content"]} for message in messages]

    for row in read_jsonl(path, ["id"]):
        if "messages" not in row:
            yield plain(row["prompt"]), [row["chosen"][-1], row["rejected"][-1]]
            continue
        for index, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                yield plain(row["messages"][:index]), [message]


def row_of(form: str, prompt: list[dict], replies: list[dict]) -> dict:
    """A row of `form`: messages, of which the one with "train" is trained on, or prompt and completion with the thinking mode
    for the chat template; of a pair the context, and the two answers beside it."""
    thinks = bool(replies[0].get("reasoning_content"))
    if form == "messages":
        replies = [{"role": "assistant", "content": _as_text(reply)} for reply in replies]
        if len(replies) == 1:
            return {"messages": [*prompt, replies[0] | {"train": True}]}
        return {"messages": prompt, "chosen": replies[0], "rejected": replies[1]}
    names = ("completion",) if len(replies) == 1 else ("chosen", "rejected")
    answers = {name: [reply] for name, reply in zip(names, replies)}
    modes = {"enable_thinking": thinks, "force_thinking": thinks}
    return {"prompt": prompt, **answers, "chat_template_kwargs": modes}


def _as_text(reply):
    """The text of a reply, its reasoning in the tags that the template would put around it."""
    reasoning, content = reply.get("reasoning_content", "").strip("\n"), reply["content"].lstrip("\n")
    return f"<think>\n{reasoning}\n</think>\n\n{content}" if reasoning else content
