"""Time chat on the exact shape of Qwen3-0.6B: our decode loop against transformers' `generate`, and against the memory's speed.

    python tests/benchmarks/bench_chat.py
    python tests/benchmarks/bench_chat.py --model model_download/Qwen3-0.6B

One process, all in turn in every round, medians over the rounds; "ours is" is the median of the ratios within a round. Greedy, no
end token, so that all give the same number of tokens; the answers are compared. Generate is called as usual, with a streamer
that notes when tokens come. Where chat holds its weights in float16, ours is timed with those and without. The bound: to
make one token, every weight is read once (the embedding, tied to the LM head, too), so that no loop is faster than the
memory's bandwidth over the bytes of the weights; the bandwidth is that of a sum over 1 GiB.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]


def ours(model, prompt, count):
    """[seconds from the question to each token], and the tokens."""
    from utils.model.generate import Decoding, TokenStream

    began, times, tokens = time.perf_counter(), [], []
    for token in TokenStream(model, set()).answer(prompt, Decoding(), count):
        tokens.append(token)
        times.append(time.perf_counter() - began)
    return times, tokens


def generate(model, prompt, count):
    """The same of model.generate with a streamer."""
    import torch

    class Streamer:
        def __init__(self):
            self.times, self.tokens = [], []

        def put(self, value):
            if value.numel() == 1:  # the first call hands over the prompt
                self.tokens.append(int(value))
                self.times.append(time.perf_counter() - began)

        def end(self):
            pass

    streamer, began = Streamer(), time.perf_counter()
    model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        streamer=streamer,
    )
    return streamer.times, streamer.tokens


def bandwidth():
    """Bytes a second of summing 1 GiB, the best of five."""
    import torch

    block, times = torch.ones(2**28), []
    for _ in range(5):
        began = time.perf_counter()
        block.sum().item()
        times.append(time.perf_counter() - began)
    return block.numel() * 4 / min(times)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder; default: the shape with random weights")
    parser.add_argument("--context", type=int, default=200, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--output", default=str(ROOT / "trainer_output/bench/chat.json"))
    options = parser.parse_args()

    import torch
    from bench_training import shape_of_qwen3

    from utils.device import pick_device
    from utils.model.load import load_for_answers, load_model

    place = ROOT / "trainer_output/bench"
    place.mkdir(parents=True, exist_ok=True)
    device = pick_device("auto", options.precision)
    folder = options.model or str(shape_of_qwen3(place / "qwen3_0_6b_shape"))
    model = load_model(folder, device.dtype).to(device.name).eval()
    bytes_read = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    ways = {"generate": (generate, model), "ours": (ours, model)}
    if device.half_weights:
        ways = {
            "generate": ways["generate"],
            "ours, fp32": ways["ours"],
            "ours": (ours, load_for_answers(folder, device)),
        }
        bytes_read /= 2
    prompt = torch.randint(
        1000, 3000, (options.context,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    measured = {name: [] for name in ways}
    for number in range(options.rounds + 1):  # the first round warms up
        answers = []
        for name, (way, its_model) in ways.items():
            times, tokens = way(its_model, prompt, options.tokens)
            answers.append(tokens)
            if number:
                measured[name].append(
                    {"first_s": times[0], "tokens_per_second": (len(times) - 1) / (times[-1] - times[0])}
                )
    bound = bandwidth() / bytes_read if device.name == "cpu" else None
    table = {
        name: {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}
        for name, rounds in measured.items()
    }
    for name, row in table.items():
        row["of_generate"] = round(
            statistics.median(
                one["tokens_per_second"] / other["tokens_per_second"]
                for one, other in zip(measured[name], measured["generate"])
            ),
            2,
        )
    print("| | first token | tokens/s | ours is |\n|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| {name} | {row['first_s']:.2f} s | {row['tokens_per_second']:.1f} | {row['of_generate']:.2f} x |"
        )
    if bound:
        print(f"| bound of the memory | | {bound:.1f} | |")
    same = all(answer == answers[0] for answer in answers)
    print(
        f"same tokens: {same}; {device.name}, {device.answers}; {options.context} tokens of context, {options.tokens} of answer"
    )
    record = {
        "command": " ".join(["python", "tests/benchmarks/bench_chat.py", *sys.argv[1:]]),
        "device": f"{device.name}, {device.answers}",
        "table": table,
        "memory_bound_tokens_per_second": bound,
        "same_tokens": same,
        "rounds": measured,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
