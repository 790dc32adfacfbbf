"""Chat with a model folder: the base model, a finetuned or merged one, a LoRA adapter, or a checkpoint.

    python model_download/load_local_model.py                                  # the newest finished run
    python model_download/load_local_model.py trainer_output/sft_finetuned     # /help lists the commands, Ctrl-D leaves
    python model_download/load_local_model.py trainer_output/sft_finetuned --prompt "四君子汤由哪些药组成？"
    python model_download/load_local_model.py trainer_output/sft_finetuned --json < questions.txt > answers.jsonl
    python model_download/load_local_model.py trainer_output/sft_finetuned --serve    # a page, and an API

With --prompt or piped questions (one a line, each a conversation of its own) stdout holds the answers and nothing else.
Nothing is written but what /save FILE.jsonl appends in a chat: the conversation, as a row to train on.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.chat.terminal import LOOPBACK, AnswerPrinter, note, prepare_terminal
from utils.errors import UserError, run
from utils.files import show_path
from utils.model.chat_format import THINKING_MODES
from utils.model.folder import check_model, find_models, quiet_offline
from utils.settings import Settings, read_settings
from utils.text import localized

# fmt: off
# ---- Settings: edit here, or override on the command line (--max-new-tokens 512) ----
MODEL = ""                # model folder, or the Hub id of one that was downloaded, also without the flag; empty: the newest that is here
PROMPT = ""               # answer this one question and leave; empty: the questions on stdin, or a chat
JSON = False              # one object a line: question, answer, tokens, seconds
SYSTEM = "auto"           # system text in front of every conversation; auto: the one that the rows of its training shared
THINKING = "auto"         # [auto | on | off] auto: as the folder was trained (its chat template's default)
GREEDY = False            # always the likeliest token: repeatable; with thinking on it tends to go round in circles
TEMPERATURE = -1.0        # [-1 or 0 to 10] of the sampling, 0 for greedy; this and the next three: -1 as the model folder says
TOP_P = -1.0              # [-1 or > 0, at most 1] draw from the likeliest tokens that make up this share
TOP_K = -1                # [-1, 0, ...] draw from this many, 0 for no limit
REPETITION_PENALTY = -1.0 # [-1 or 0.1 to 10] above 1: tokens that were there already become less likely
SEED = -1                 # [-1, 0, ...] of the sampling; the same seed gives the same answers, -1 different ones every time
MAX_NEW_TOKENS = 2048     # [1, 2, ...] longest answer in tokens, thinking included
SERVE = False             # a chat page, and OpenAI's chat completions for apps on this machine
BESIDE_MODEL = ""         # of --serve: a second model, whose answers the page shows beside those of the first; "": none
HOST = "127.0.0.1"        # of --serve; any other than the loopback needs a key
PORT = 8000               # [0, 1, ... 65535] of --serve, 0 for any free one
API_KEY = ""              # what clients of --serve have to send; empty: none
FILE_PAGES = False        # of --serve: pages opened from a file may ask (Origin: null, which a sandboxed frame of any site has, too)
DEVICE = "auto"           # [auto | cuda | mps | cpu] auto: CUDA, else MPS, else CPU
PRECISION = "auto"        # [auto | bf16 | fp16 | fp32 | int8] auto: bf16 where the hardware has it, fp16 weights elsewhere; int8: x86 CPUs
# ----
# fmt: on

NO_ADVICE = ("For study and research only, not medical advice.", "仅供学习和研究，不能代替医生的诊断和建议。")


def main(argv: list[str] | None = None) -> None:
    # 1. Settings
    settings = read_settings(globals(), argv, positional="MODEL")
    check_settings(settings)

    # 2. Which model: checked before torch is imported, which takes seconds
    names = [settings.MODEL or choose_model(), settings.BESIDE_MODEL]
    folders = [check_model(name) for name in names if name]
    quiet_offline()

    # 3. Load it
    if sys.stderr.isatty():
        note(f"loading {' and '.join(map(show_path, folders))} ...")
    from utils.chat.model import ChatModel, Options
    from utils.device import pick_device

    numbers = "TEMPERATURE TOP_P TOP_K REPETITION_PENALTY SEED MAX_NEW_TOKENS".split()
    numbers = {name.lower(): getattr(settings, name) for name in numbers if getattr(settings, name) != -1}
    greedy = {"temperature": 0} if settings.GREEDY else {}
    options = Options(THINKING_MODES[settings.THINKING], numbers=numbers | greedy)
    device = pick_device(settings.DEVICE, settings.PRECISION, answering=True)
    system = None if settings.SYSTEM == "auto" else settings.SYSTEM

    def load(folder):
        return ChatModel(folder, device, system)

    note(localized(*NO_ADVICE))
    models = [load(folder) for folder in folders]

    # 4. Chat
    if sys.stdin.isatty() and not (settings.SERVE or settings.PROMPT or settings.JSON):
        from utils.chat.session import TYPED, Chat

        prepare_terminal(TYPED)
        chat = Chat(models[0], options, load)
        note(localized("/help lists the commands, Ctrl-D leaves.", "/help 列出命令，Ctrl-D 离开。"))
        return chat.run()

    # 5. Or answer over HTTP, or the questions given
    for model in models:
        note(model.describe(options))
    if settings.SERVE:
        from utils.chat.serve import Server

        place = settings.HOST, settings.PORT
        return Server(models, options, *place, settings.API_KEY, settings.FILE_PAGES).run()
    questions = [("--prompt", settings.PROMPT)] if settings.PROMPT else read_questions(sys.stdin.buffer)
    for place, question in questions:
        answer_once(models[0], options, place, question, settings.JSON)


def choose_model() -> str:
    """The newest finished run of trainer_output/, else a folder of model_download/, which is said."""
    found = find_models()
    if not found:
        raise UserError("no model is here yet; download one with: python model_download/download_model.py")
    note(f"no model named, taking {show_path(found[0])} (/model lists all)")
    return str(found[0])


def check_settings(settings: Settings) -> None:
    """UserError for settings that exclude one another."""
    if settings.GREEDY and settings.TEMPERATURE > 0:
        raise UserError("--greedy and --temperature exclude each other")
    if "PROMPT" in settings.overridden and not settings.PROMPT.strip():
        raise UserError("--prompt: wanted a question, got an empty text")
    if settings.SERVE and (settings.PROMPT or settings.JSON or settings.SEED >= 0):
        raise UserError("--serve takes no --prompt, --json or --seed: a request brings its own")
    if settings.SERVE and settings.HOST not in LOOPBACK and not settings.API_KEY:
        others = f"--host {settings.HOST}: others could ask there"
        raise UserError(f"{others}; a key is wanted too: --api-key TEXT")
    if settings.BESIDE_MODEL and not settings.SERVE:
        raise UserError("--beside-model is for --serve, whose page shows two models side by side")


def read_questions(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    """Yield ("stdin, line 3", question) for every line of a binary stream that is not blank; UserError if all are."""
    found = False
    for number, line in enumerate(stream, 1):
        try:
            question = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"stdin, line {number}: not UTF-8 ({error.reason})") from None
        if question:
            found = True
            yield f"stdin, line {number}", question
    if not found:
        raise UserError('no question on stdin, wanted one a line; or ask with --prompt "..."')


def answer_once(chat_model, options, place: str, question: str, as_json: bool) -> None:
    """Answer one question that came from `place` by itself, its cache new: on stdout the answer and nothing else."""
    chat_model.stream.reset()
    prompt = chat_model.encode([{"role": "user", "content": question}], options)
    try:
        chat_model.check_length(prompt)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    reply = chat_model.answer(prompt, options, (lambda *_: None) if as_json else AnswerPrinter())
    if reply.end == "Ctrl-C":
        raise KeyboardInterrupt
    row = {"question": question, "answer": reply.content, "tokens": reply.tokens}
    row["seconds"] = round(reply.seconds, 3)
    # Without --json the answer has been printed as it came.
    print(json.dumps(row, ensure_ascii=False) if as_json else "", flush=True)
    note(f"[{place}: {reply}]")


if __name__ == "__main__":
    sys.exit(run(main))
