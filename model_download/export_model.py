"""Export a finished folder for other tools, or the training rows for other trainers. Works offline, uploads nothing.

    python model_download/export_model.py trainer_output/sft_finetuned                    # bfloat16 folder: vLLM, mlx-lm, transformers
    python model_download/export_model.py trainer_output/sft_finetuned --format gguf      # Ollama, LM Studio, llama.cpp
    python model_download/export_model.py trainer_output/lora_finetuned --format adapter --base Qwen/Qwen3-0.6B
    python model_download/export_model.py --format training-data    # LLaMA-Factory, Axolotl, mlx-lm, TRL

A LoRA folder is merged, except for --format adapter. Each export gets a model card (README.md) from run.json and the comparison,
and is read back: its greedy answers and next-token probabilities are compared with those of the folder.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.errors import UserError, run
from utils.files import read_jsonl, require_file, sample_by_id, show_path, write_folder, write_jsonl
from utils.model.folder import check_model, quiet_offline
from utils.settings import ROOT, Settings, read_settings

# fmt: off
# ---- Settings: edit here, or override on the command line (--precision q8_0) ----
MODEL = "trainer_output/sft_finetuned"              # the finished folder, also without the flag
FORMAT = "folder"                                   # [folder | gguf | adapter | training-data] what is written
PRECISION = ""                                      # [bf16 | fp32 | f16 | q8_0 | empty] folder: bf16 (if empty) or fp32; gguf: f16, bf16 or q8_0 (if empty)
OUTPUT_DIR = ""                                     # empty: trainer_output/exports/<name>-<format>
NAME = ""                                           # of the exported model; empty: as the folder is called
BASE = ""                                           # Hub id of the base, for card and adapter; adapter, empty: its absolute path
EVAL_FILE = "data_prepare/qwen3/sft_eval.jsonl"     # whose questions compare the export with the folder; "": none
PROMPTS = 50                                        # [0, 1, ...] of these questions, so many
MAX_NEW_TOKENS = 64                                 # [1, 2, ...] longest answer to them, in tokens
FORM = "messages"                                   # [messages | prompt-completion] training-data: the form of the rows (docs/other_tools.md)
DATA_DIR = "data_prepare/qwen3"                     # training-data: where sft_*.jsonl and dpo_*.jsonl lie
# ----
# fmt: on


def main(argv: list[str] | None = None) -> None:
    # 1. Settings, checked before torch is imported
    settings = read_settings(globals(), argv, positional="MODEL")
    if settings.FORMAT == "training-data":
        return export_training_data(settings)
    folder = Path(check_model(settings.MODEL)).resolve()
    quiet_offline()
    name = settings.NAME or (folder.parent.name if folder.name == "merged" else folder.name)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name: wanted letters, digits, - _ and ., got {name!r}")
    place = export_folder(settings, f"{name}-{settings.FORMAT}")
    questions = read_questions(settings)

    # 2. Load the finished model, an adapter merged
    from utils.model.export import FORMATS
    from utils.model.export.card import compare_with_export, write_card

    export = FORMATS[settings.FORMAT](folder, place, name, settings.PRECISION, settings.BASE)
    export.check()
    print(f"exporting {show_path(folder)} to {show_path(place)}", flush=True)
    export.load()

    # 3. Write the export, each file whole or not at all
    write_folder(place, export.save)

    # 4. Read it as another tool would: what did it cost?
    cost, found = [], export.read() if questions else None
    if found:
        cost = [compare_with_export(export, *found, questions, settings.MAX_NEW_TOKENS)]
    elif questions:
        where = "is not on this machine under that name"
        cost = [f"not tried: {export.base} {where}, so nothing shows that the adapter fits it"]

    # 5. The model card, and what to do next
    write_card(export, [*cost, *export.commands(".")])
    print("\n".join([*cost, *export.commands(show_path(place))]))
    print(f"give it away (nothing is uploaded here): `hf upload YOUR-NAME/{name} {show_path(place)}`")


def export_training_data(settings: Settings) -> None:
    """Write the rows of DATA_DIR in the form FORM: one row per assistant turn, in the context that chat would give it."""
    names = [f"{kind}_{split}.jsonl" for kind in ("sft", "dpo") for split in ("train", "eval")]
    found = [settings.DATA_DIR / name for name in names if (settings.DATA_DIR / name).is_file()]
    data = show_path(settings.DATA_DIR)
    if not found:
        make = "make them with: python data_prepare/convert_to_qwen3_format.py"
        raise UserError(f"{data} holds no sft_*.jsonl or dpo_*.jsonl; {make}")
    modes = {bool(replies[0].get("reasoning_content")) for path in found for _, replies in read_turns(path)}
    if settings.FORM == "messages" and len(modes) > 1:
        raise UserError(
            f"{data} has rows with reasoning and rows without, and a tool trains all messages in one thinking mode; "
            "--form prompt-completion (TRL) keeps each row's own"
        )
    place = export_folder(settings, f"training-data-{settings.FORM}")
    for path in found:
        write_jsonl(place / path.name, (row_of(settings.FORM, *turn) for turn in read_turns(path)))
        print(f"written: {show_path(place / path.name)}")
    print("the lines of configuration for LLaMA-Factory, Axolotl, mlx-lm and TRL: docs/other_tools.md")


def read_turns(path: Path) -> Iterator[tuple[list[dict], list[dict]]]:
    """(messages up to a question, [its answer] or [chosen, rejected]), one for every turn that is trained.

    Earlier answers carry no reasoning, as in Qwen3's own history.
    """

    def plain(messages):
        return [{"role": message["role"], "content": message["content"]} for message in messages]

    for row in read_jsonl(path, ["id"]):
        if "messages" not in row:
            yield plain(row["prompt"]), [row["chosen"][-1], row["rejected"][-1]]
        for index, message in enumerate(row.get("messages", [])):
            if message["role"] == "assistant":
                yield plain(row["messages"][:index]), [message]


def row_of(form: str, prompt: list[dict], replies: list[dict]) -> dict:
    """A row of `form`: messages, of which the one with "train" is trained on, or prompt and completion with the thinking mode
    for the chat template; of a pair the context, and the two answers beside it."""
    names = ("completion",) if len(replies) == 1 else ("chosen", "rejected")
    if form == "prompt-completion":
        thinks = bool(replies[0].get("reasoning_content"))
        modes = {"enable_thinking": thinks, "force_thinking": thinks}
        answers = {name: [reply] for name, reply in zip(names, replies)}
        return {"prompt": prompt, **answers, "chat_template_kwargs": modes}
    told = []
    for reply in replies:  # the reasoning in the tags that the template would put around it
        reasoning, text = reply.get("reasoning_content", "").strip("\n"), reply["content"].lstrip("\n")
        text = f"<think>\n{reasoning}\n</think>\n\n{text}" if reasoning else text
        told.append({"role": "assistant", "content": text})
    if len(replies) == 1:
        return {"messages": [*prompt, told[0] | {"train": True}]}
    return {"messages": prompt, **dict(zip(names, told))}


def export_folder(settings: Settings, name: str) -> Path:
    """OUTPUT_DIR, or the folder `name` among the exports; UserError if it holds anything but an export of this kind."""
    place = settings.OUTPUT_DIR or ROOT / "trainer_output" / "exports" / name
    models = [*place.glob("*config.json"), *place.glob("*.gguf")]
    other = "config.json" if settings.FORMAT == "adapter" else "adapter_config.json"
    holds = ""
    if (place / "run.json").is_file():
        holds = "a training run"
    elif place.resolve() == settings.DATA_DIR.resolve() or (place / "README.md").is_file() and not models:
        holds = "files that would be lost"
    elif (place / other).is_file():  # tools would load both together
        holds = f"an export of another kind ({other})"
    if holds:
        raise UserError(f"{show_path(place)} holds {holds}; choose another --output-dir")
    return place


def read_questions(settings: Settings) -> list[list[dict]]:
    """PROMPTS conversations of EVAL_FILE, always the same, up to their last answer; [] where there is no such file."""
    if settings.EVAL_FILE and "EVAL_FILE" in settings.overridden:
        require_file(settings.EVAL_FILE, "python data_prepare/convert_to_qwen3_format.py")
    if not (settings.EVAL_FILE and settings.EVAL_FILE.is_file()):
        print("no EVAL_FILE: the export is not compared with the folder")
        return []
    rows = sample_by_id(read_jsonl(settings.EVAL_FILE, ["id", "messages"]), settings.PROMPTS)
    return [row["messages"][:-1] for row in rows]


if __name__ == "__main__":
    sys.exit(run(main))
