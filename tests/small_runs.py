"""Small training runs for tests: a random tiny model, a few rows and pairs, and the arguments of the finetune scripts."""

import gc
import importlib
import signal

import torch
from safetensors.torch import load_file
from tiny_model import make_tiny_model

from utils.errors import run
from utils.files import write_jsonl

METHODS = ("sft", "lora", "dpo")
NAMES = "麻黄 桂枝 白芍 甘草 人参 白术 茯苓 当归 黄芪 川芎".split()


def make_place(folder):
    """Fill `folder` with a model (base/) and train and eval files of conversations (sft_*) and pairs (dpo_*)."""
    make_tiny_model(folder / "base")
    for split, count in (("train", 56), ("eval", 12)):
        rows, pairs = [], []
        for number in range(count):
            name = NAMES[number % len(NAMES)]
            prompt = [{"role": "user", "content": f"{name}是什么？{number}"}]
            good, bad = (
                [{"role": "assistant", "content": text}] for text in (f"{name}是一味中药。", "我不知道。")
            )
            rows.append({"id": f"{number}", "messages": prompt + good, "source": "test"})
            sides = {"prompt": prompt, "chosen": good, "rejected": bad}
            pairs.append({"id": f"{number}", **sides, "kind": "test"})
        write_jsonl(folder / f"sft_{split}.jsonl", rows)
        write_jsonl(folder / f"dpo_{split}.jsonl", pairs)
    return folder


def arguments(method, place, output, *more, precision="fp32"):
    data = "dpo" if method == "dpo" else "sft"
    words = ["--model", place / "base", "--output-dir", output]
    words += ["--train-file", place / f"{data}_train.jsonl", "--eval-file", place / f"{data}_eval.jsonl"]
    words += "--epochs 2 --max-length 256 --rows-per-step 2 --eval-rows 12 --evaluations 4".split()
    words += ["--learning-rate", "3e-3"]
    words += ["--device", "cpu", "--precision", precision]
    return [str(word) for word in (*words, *more)]


def no_picture(entries, path, *more):
    """In the place of plot_training: the curves of a hundred runs take minutes to draw. They are tested in tests/test_plots.py
    and by whole scripts in tests/faults."""
    path.write_bytes(b"\x89PNG\r\n\x1a\n")


def train(method, place, output, *more, precision="fp32"):
    """The finetune script in this process; its exit code. Afterwards its folder is free again, and so is Ctrl-C."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    main = importlib.import_module(f"model_finetune.finetune_{method}").main
    try:
        code = run(lambda: main(arguments(method, place, output, *more, precision=precision)))
    except SystemExit as ended:  # a test's stand-in for a kill
        code = ended.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.collect()  # a trainer and its callbacks hold one another, and the lock of the folder
    return code


def weights(folder):
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_run(one, other):
    """The same weights and the same log."""
    logs = [(folder / "training_log.jsonl").read_bytes() for folder in (one, other)]
    return same_weights(one, other) and logs[0] == logs[1]
