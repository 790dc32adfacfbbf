"""Time chat on the exact shape of Qwen3-0.6B: our decode loop against transformers' `generate`, llama.cpp, and the memory's speed.

    python tests/benchmarks/bench_chat.py
    python tests/benchmarks/bench_chat.py --llamacpp .venv/interop/llamacpp/bin/python model-f16.gguf model-q8_0.gguf
    python tests/benchmarks/bench_chat.py --model model_download/Qwen3-0.6B

All ways in turn in every round, one at a time; medians over the rounds. "Of generate" is the median of the ratios within a round.
Answers are greedy and have no end token, so that all have the same number of tokens. Generate is called with a streamer that notes
when tokens come. llama.cpp runs in the environment that tests/interop/environments.py makes, on files of export_model.py, and
times itself.

The bound: one token reads every weight once, the embedding as well, which is also the LM head. No loop is faster than the
memory's bandwidth divided by the bytes of the weights. The bandwidth is that of a sum over 1 GiB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]


def ours(model, prompt: list[int], count: int) -> tuple[list[float], list[int]]:
    """Seconds from the question to each token, and the tokens, of our decode loop."""
    from utils.model.generate import Decoding, TokenStream

    began, times, tokens = time.perf_counter(), [], []
    for token in TokenStream(model, set()).answer(prompt, Decoding(), count):
        tokens.append(token)
        times.append(time.perf_counter() - began)
    return times, tokens


def generate(model, prompt: list[int], count: int) -> tuple[list[float], list[int]]:
    """The same of transformers' generate, with a streamer."""
    import torch

    times, tokens, began = [], [], time.perf_counter()

    def put(value):
        if value.numel() == 1:  # the first call hands over the prompt
            tokens.append(int(value))
            times.append(time.perf_counter() - began)

    ids = torch.tensor([prompt], device=model.device)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": count}
    model.generate(ids, **given, streamer=SimpleNamespace(put=put, end=lambda: None))
    return times, tokens


def bandwidth() -> float:
    """Bytes a second of summing 1 GiB, the best of five."""
    import torch

    block, times = torch.ones(2**28), []
    for _ in range(5):
        began = time.perf_counter()
        block.sum().item()
        times.append(time.perf_counter() - began)
    return block.numel() * 4 / min(times)


def llama_cpp(python: str, file: str, threads: int) -> Callable:
    """A function as `ours` and `generate` are, which asks a process that has loaded the GGUF file."""
    command = [python, ROOT / "tests/interop/time_llamacpp.py", file, str(threads)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **pipes, encoding="utf-8")
    process.stdout.readline()  # it is ready

    def answer(_, prompt: list[int], count: int) -> tuple[list[float], None]:
        process.stdin.write(json.dumps({"prompt": prompt, "tokens": count}) + "\n")
        process.stdin.flush()
        told = json.loads(process.stdout.readline())
        return [told["first_s"] + number / told["tokens_per_second"] for number in range(count)], None

    return answer


def ways_to_answer(folder: str, device, llamacpp: list[str]) -> dict[str, tuple]:
    """{name: (function, model)} of what is compared."""
    import torch

    from utils.device import Device
    from utils.model.folder import load_for_answers, load_model

    model = load_model(folder, device.dtype).to(device.name).eval()
    model.generation_config.eos_token_id = None  # generate would avoid the end token, ours may choose it
    ways = {
        "generate": (generate, model),
        f"ours, {device.answers}": (ours, load_for_answers(folder, device)),
    }
    if device.name == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines:
        for form in {"half", "int8"} - {device.weights}:
            other = Device("cpu", False, "to compare", form)
            ways[f"ours, {other.answers}"] = (ours, load_for_answers(folder, other))
    python, *files = llamacpp or [""]
    for file in files:
        ways[f"llama.cpp, {Path(file).name}"] = (llama_cpp(python, file, torch.get_num_threads()), None)
    return ways


def measure(ways: dict[str, tuple], prompt: list[int], tokens: int, rounds: int) -> tuple[dict, bool]:
    """{name: [{"first_s", "tokens_per_second"}, one a round]}, and whether all gave the same tokens."""
    measured = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first round warms up
        answers = []
        for name, (answer, model) in ways.items():
            times, ids = answer(model, prompt, tokens)
            answers.append(ids)
            speed = (len(times) - 1) / (times[-1] - times[0])
            if number:
                measured[name].append({"first_s": times[0], "tokens_per_second": speed})
    known = [answer for answer in answers if answer]
    return measured, all(answer == known[0] for answer in known)


def medians(measured: dict) -> dict[str, dict]:
    """{name: {"first_s", "tokens_per_second", "of_generate"}}: medians over the rounds, of the ratio within a round too."""
    table = {}
    for name, rounds in measured.items():
        table[name] = {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}
        ratios = [
            one["tokens_per_second"] / other["tokens_per_second"]
            for one, other in zip(rounds, measured["generate"])
        ]
        table[name]["of_generate"] = round(statistics.median(ratios), 2)
    return table


def print_table(table: dict[str, dict], bound: float | None) -> None:
    print("| | first token | tokens/s | of generate |\n|---|---|---|---|")
    for name, row in table.items():
        speed, ratio = f"{row['tokens_per_second']:.1f}", f"{row['of_generate']:.2f} x"
        print(f"| {name} | {row['first_s']:.2f} s | {speed} | {ratio} |")
    if bound:
        print(f"| bound of the memory, weights in 2 bytes | | {bound:.1f} | |")


def parse_options() -> argparse.Namespace:
    shown = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**shown)
    parser.add_argument("--model", help="a model folder; default: the shape with random weights")
    parser.add_argument("--context", type=int, default=200, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto", help="auto, bf16, fp32 or int8")
    parser.add_argument("--llamacpp", nargs="+", metavar=("PYTHON", "GGUF"), help="compare with llama.cpp")
    parser.add_argument("--output", default=str(ROOT / "trainer_output/bench/chat.json"))
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    import torch
    from bench_training import shape_of_qwen3, write_record

    from utils.device import pick_device

    place = ROOT / "trainer_output/bench"
    place.mkdir(parents=True, exist_ok=True)
    device = pick_device("auto", options.precision, answering=True)
    folder = options.model or str(shape_of_qwen3(place / "qwen3_0_6b_shape"))
    ways = ways_to_answer(folder, device, options.llamacpp)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1000, 3000, (options.context,), generator=generator).tolist()
    measured, same = measure(ways, prompt, options.tokens, options.rounds)
    bound = None
    if device.name == "cpu":
        elements = sum(weight.numel() for weight in ways["generate"][1].parameters())
        bound = bandwidth() / (elements * (4 if device.answers == "fp32" else 2))
    table = medians(measured)
    print_table(table, bound)
    print(f"same tokens: {same}; {options.context} tokens of context, {options.tokens} of answer")
    found = {"table": table, "memory_bound_tokens_per_second": bound, "same_tokens": same, "rounds": measured}
    write_record(options.output, "bench_chat.py", **found)


if __name__ == "__main__":
    sys.exit(main())
