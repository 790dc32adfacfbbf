"""Export training rows as other trainers read them. One row an assistant turn, in the context that chat would give it.

All of them render the chat template themselves. The tokens that they train are those that we train, and one final line break;
Axolotl leaves out that line break, and of an answer with reasoning its opening `<think>`, which it counts as prompt.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.files import atomic_write, read_jsonl, show_path, write_json, write_jsonl

TOOLS = ("llamafactory", "axolotl", "mlx", "trl")


class Turn(NamedTuple):
    """A question in its context (messages), and what answers it: a reply to train on, or a chosen and a rejected one."""

    prompt: list[dict]
    replies: list[dict]


def read_turns(path: Path) -> Iterator[Turn]:
    """The turns of an sft_*.jsonl or dpo_*.jsonl file. Earlier answers carry no reasoning, as in Qwen3's own history."""
    for row in read_jsonl(path, ["id"]):
        if "messages" in row:
            for index, message in enumerate(row["messages"]):
                if message["role"] == "assistant":
                    yield Turn(_plain(row["messages"][:index]), [message])
        else:
            yield Turn(_plain(row["prompt"]), [row["chosen"][-1], row["rejected"][-1]])


def _plain(messages):
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def save_training_data(data_dir: Path, place: Path, tool: str) -> list[str]:
    """Write the rows of sft_*.jsonl and dpo_*.jsonl in `data_dir` for `tool`, with a config; return lines that say what."""
    found = [data_dir / f"{kind}_{split}.jsonl" for kind in ("sft", "dpo") for split in ("train", "eval")]
    found = [path for path in found if path.is_file()]
    if not found:
        raise UserError(
            f"{show_path(data_dir)} holds no sft_*.jsonl or dpo_*.jsonl; make them with: "
            "python data_prepare/convert_to_qwen3_format.py"
        )
    thinking = {path.stem: _reasoning_share(path) for path in found}
    if set(thinking.values()) not in ({0.0}, {1.0}) and tool != "trl":
        raise UserError(
            f"{show_path(data_dir)} has rows with reasoning and rows without; of these tools only trl trains each in its own mode"
        )
    return WRITERS[tool](found, place, thinking)


def _reasoning_share(path):
    turns = list(read_turns(path))
    return sum(bool(turn.replies[0].get("reasoning_content")) for turn in turns) / len(turns)


def _chat_row(turn, **mark):
    """The messages of a turn, and the two answers of a pair. `mark`: further fields of the message to train on."""
    replies = [_with_reasoning(reply) for reply in turn.replies]
    if len(replies) == 1:
        return {"messages": [*turn.prompt, replies[0] | mark]}
    return {"messages": turn.prompt, "chosen": replies[0], "rejected": replies[1]}


def _with_reasoning(message):
    """The message as text alone, its reasoning in the tags that the template would put around it."""
    reasoning = message.get("reasoning_content", "").strip("\n")
    content = message["content"].lstrip("\n")
    if reasoning:
        content = f"<think>\n{reasoning}\n</think>\n\n{content}"
    return {"role": "assistant", "content": content}


# ---- LLaMA-Factory: rows in its "sharegpt" form, a dataset_info.json, and the settings that fit


def _for_llamafactory(found, place, thinking):
    info = {}
    tags = {f"{name}_tag": name for name in ("role", "content", "user", "assistant", "system")}
    for path in found:
        ranking = path.stem.startswith("dpo")
        columns = ("messages", "chosen", "rejected") if ranking else ("messages",)
        info[path.stem] = {
            "file_name": path.name,
            "formatting": "sharegpt",
            **({"ranking": True} if ranking else {}),
            "columns": {name: name for name in columns},
            "tags": tags,
        }
        write_jsonl(place / path.name, map(_chat_row, read_turns(path)))
    write_json(place / "dataset_info.json", info)
    mode = "true" if thinking[found[0].stem] else "false"
    with atomic_write(place / "settings.yaml") as file:
        file.write(
            "# add to your training configuration; the prompt is then the one that these scripts train and chat with\n"
            f"dataset_dir: .\ndataset: {found[0].stem}\ntemplate: qwen3\nenable_thinking: {mode}\n"
        )
    return [f"llamafactory-cli train, with the lines of {show_path(place)}/settings.yaml"]


# ---- Axolotl: conversations, of which one turn is marked for training; a configuration for SFT, another one for DPO

# docs.axolotl.ai, dataset formats: "chat_template" for conversations, "chat_template.default" for DPO.
AXOLOTL_SFT = """\
    type: chat_template
    field_messages: messages
    roles_to_train: []              # none but the turns marked with "train"
    message_field_training: train
    train_on_eos: turn
"""
AXOLOTL_DPO = """\
    type: chat_template.default
    field_messages: messages
    field_chosen: chosen
    field_rejected: rejected
"""


def _for_axolotl(found, place, thinking):
    lines = []
    for kind, settings, first in (("sft", AXOLOTL_SFT, ""), ("dpo", AXOLOTL_DPO, "rl: dpo\n")):
        files = {path.stem: path for path in found if path.stem.startswith(kind)}
        for path in files.values():
            write_jsonl(place / path.name, (_chat_row(turn, train=True) for turn in read_turns(path)))
        if f"{kind}_train" not in files:
            continue
        text = f"# add to your training configuration\n{first}chat_template: tokenizer_default\n"
        for split, name in (("train", "datasets"), ("eval", "test_datasets")):
            if f"{kind}_{split}" in files:
                text += f"{name}:\n  - path: {kind}_{split}.jsonl\n    ds_type: json\n    split: train\n{settings}"
        with atomic_write(place / f"{kind}.yaml") as file:
            file.write(text)
        lines.append(f"axolotl train CONFIG.yaml, with the lines of {show_path(place)}/{kind}.yaml")
    mode = "on" if thinking[found[0].stem] else "off"
    return [
        *lines,
        f"(start it in {show_path(place)}; base_model: a folder whose chat template has thinking {mode} by default, "
        "as a run of these scripts saves it)",
    ]


# ---- mlx-lm: a folder of train.jsonl and valid.jsonl; it has no DPO


def _for_mlx(found, place, thinking):
    names = {"sft_train": "train.jsonl", "sft_eval": "valid.jsonl"}
    sft = [path for path in found if path.stem in names]
    if not sft:
        raise UserError("mlx-lm trains on conversations alone (no DPO), and there is no sft_train.jsonl")
    for path in sft:
        write_jsonl(place / names[path.stem], map(_chat_row, read_turns(path)))
    mode = "on" if thinking["sft_train"] else "off"
    return [
        f"python -m mlx_lm lora --train --mask-prompt --data {show_path(place)} --model FOLDER",
        f"(FOLDER: one whose chat template has thinking {mode} by default, as a run of these scripts saves it)",
    ]


# ---- TRL: prompt and completion, so that the loss is on the answer alone


def _for_trl(found, place, thinking):
    for path in found:
        write_jsonl(place / path.name, map(_trl_row, read_turns(path)))
    trainer = "SFTTrainer" if found[0].stem.startswith("sft") else "DPOTrainer"
    return [
        f"train_dataset = load_dataset('json', data_files='{show_path(place)}/{found[0].name}', split='train')",
        f"{trainer}(model=FOLDER, train_dataset=train_dataset, ...)",
    ]


def _trl_row(turn):
    names = ("completion",) if len(turn.replies) == 1 else ("chosen", "rejected")
    thinks = bool(turn.replies[0].get("reasoning_content"))
    return {
        "prompt": turn.prompt,
        **{name: [reply] for name, reply in zip(names, turn.replies)},
        "chat_template_kwargs": {"enable_thinking": thinks, "force_thinking": thinks},
    }


WRITERS = {"llamafactory": _for_llamafactory, "axolotl": _for_axolotl, "mlx": _for_mlx, "trl": _for_trl}
