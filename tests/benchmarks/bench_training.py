"""Time training steps on the exact shape of Qwen3-0.6B against TRL's public options, on the same rows.

    make bench
    python tests/benchmarks/bench_training.py --methods sft --rounds 1

Rows: those of the built-in sample, several joined to a conversation's length of 100 to 200 tokens. Model: random weights of that
shape and the tiny model's tokenizer, made once under trainer_output/bench/ (git-ignored); or --model FOLDER.

Every measurement is a process of its own, one at a time, all of a round in turn; the first step of each is left out. A token
is a real one, as each document alone would have it: padding does not count, a prompt that two answers share counts twice. Ours
for DPO includes the time of the reference log-probabilities of the pairs that were stepped on. "of peak": 6 x parameters FLOP a
token (4 x for LoRA) against the machine's own matrix product, measured beside. Medians over the rounds; "ours is" is the median of
the ratios within a round.
"""

import argparse
import functools
import json
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PLACE = ROOT / "trainer_output/bench"
STEPS, MAX_LENGTH, ROWS = 6, 512, 200  # steps of a measurement, tokens a packed row, conversations or pairs

# (method, variant). TRL packs no pairs: those are padded, two at a time.
VARIANTS = [
    ("sft", "ours"),
    ("sft", "TRL packed"),
    ("lora", "ours"),
    ("lora", "TRL packed"),
    ("lora", "TRL packed, base in bf16"),
    ("dpo", "ours"),
    ("dpo", "TRL"),
]


def shape_of_qwen3(folder):
    """Qwen3-0.6B's architecture with random weights and the tiny model's tokenizer, in `folder`; made once."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    widths = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
    more = {"vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1_000_000}
    model = Qwen3ForCausalLM(Qwen3Config(**widths, **heads, **more))
    AutoTokenizer.from_pretrained(ROOT / "model_download/tiny_qwen3_tcm").save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def sample_files(folder):
    """(sft file, pairs file) of the built-in sample: six rows in one question and answer, the next six answers as rejected."""
    from utils.files import read_jsonl, write_jsonl

    rows = list(read_jsonl(ROOT / "data_prepare/sample/tcm_sample.jsonl"))
    texts = [
        tuple("\n".join(row[name] for row in rows[start : start + 6]) for name in ("instruction", "output"))
        for start in range(0, 2400, 6)
    ]
    conversations, pairs = [], []
    for number, (question, answer) in enumerate(texts):
        prompt = [{"role": "user", "content": question}]
        chosen, rejected = (
            [{"role": "assistant", "content": text}] for text in (answer, texts[number - 1][1])
        )
        conversations.append({"id": str(number), "messages": prompt + chosen})
        pairs.append({"id": str(number), "prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_jsonl(folder / "sft.jsonl", conversations)
    write_jsonl(folder / "pairs.jsonl", pairs)
    return folder / "sft.jsonl", folder / "pairs.jsonl"


def data_file(method):
    return PLACE / ("pairs.jsonl" if method == "dpo" else "sft.jsonl")


def ours(method, precision, options, folder):
    """(seconds of each step, real tokens of each, seconds of the reference pass for one token)."""
    import numpy
    import torch
    from accelerate import Accelerator
    from transformers import set_seed

    from utils.device import pick_device
    from utils.model.folder import load_for_lora, load_model, load_tokenizer
    from utils.model.logprobs import answer_logps
    from utils.model.lora import add_lora
    from utils.model.packing import PackedRows
    from utils.model.qwen3_train import prepare_packed
    from utils.settings import read_settings
    from utils.training.loop import Learner, step_batches
    from utils.training.losses import dpo_batch_loss, sft_loss
    from utils.training.memory import StepPlan
    from utils.training.rows import load_conversations, load_pairs

    words = ["--model", options.model, "--output-dir", folder, "--max-length", str(MAX_LENGTH)]
    words += ["--max-steps", str(STEPS), "--precision", precision, "--rows-per-step", "1"]
    script = runpy.run_path(str(ROOT / f"model_finetune/finetune_{method}.py"))
    settings = read_settings(script, words)
    device = pick_device("auto", precision)
    set_seed(0)
    tokenizer = load_tokenizer(options.model)
    if method == "lora":
        model = add_lora(prepare_packed(load_for_lora(options.model, device.dtype)), settings)
    else:
        model = prepare_packed(load_model(options.model, torch.float32))
    load = load_pairs if method == "dpo" else load_conversations
    rows = load(data_file(method), tokenizer, MAX_LENGTH, ROWS).rows
    reference, loss = 0.0, sft_loss
    if method == "dpo":
        few = PackedRows([rows.items[number] for number in range(min(8, len(rows.items)))], rows.max_length)
        answer_logps(model, PackedRows([rows.items[0]], rows.max_length), device)  # the first pass warms up
        began = time.perf_counter()
        answer_logps(model, few, device)
        reference = (time.perf_counter() - began) / few.tokens
        for side in ("chosen", "rejected"):
            rows.numbers[f"reference_{side}"] = numpy.full(len(rows.items), -100.0)
        loss = functools.partial(dpo_batch_loss, beta=0.1, sft_weight=0.2)
    accelerator, way = Accelerator(cpu=device.name == "cpu"), StepPlan(1, 1, False)
    parts = {"settings": settings, "device": device, "accelerator": accelerator}
    run = argparse.Namespace(**parts, processes=1, way=lambda step: way)
    plan = argparse.Namespace(train_rows=rows, steps_per_epoch=len(rows))
    learner, spent, tokens = Learner(run, model, loss), [], []
    for step in range(STEPS):
        batches, began = step_batches(run, plan, step), time.perf_counter()
        result = learner.backward(batches, way)
        learner.step(settings.LEARNING_RATE)
        result.losses[-1].item()  # waits for the device
        spent.append(time.perf_counter() - began)
        # a tree (shared tokens, tokens of each branch ...) stands for documents of shared + branch + the last token, each
        trees = [tree for batch in batches for tree in batch["layout"]]
        tokens.append(sum(tree[0] + branch + 1 for tree in trees for branch in tree[1:]))
    return spent, tokens, reference


def theirs(method, precision, options, folder):
    """The same of the script that TRL's documentation suggests, with its public options."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from utils.files import read_jsonl, sample_by_id

    rows = sample_by_id(read_jsonl(data_file(method)), ROWS)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = torch.bfloat16 if options.variant.endswith("base in bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=base)
    common = dict(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=2 if method == "dpo" else 1,
        max_length=MAX_LENGTH,
        bf16=precision == "bf16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    if method == "dpo":
        rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
        trainer, form, more = DPOTrainer, DPOConfig(**common), {}
    else:
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if method == "lora" else None
        trainer, form, more = SFTTrainer, SFTConfig(**common, packing=True), {"peft_config": lora}
    data, spent, tokens = Dataset.from_list(rows), [], []
    trainer = trainer(model, args=form, train_dataset=data, processing_class=tokenizer, **more)
    step = trainer.training_step

    def counted(model, inputs, *rest, **named):
        mask = inputs.get("attention_mask")
        tokens.append(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
        return step(model, inputs, *rest, **named)

    class Timed(TrainerCallback):
        def on_step_begin(self, *_, **__):
            spent.append(-time.perf_counter())

        def on_step_end(self, *_, **__):
            spent[-1] += time.perf_counter()

    trainer.training_step = counted
    trainer.add_callback(Timed())
    trainer.train()
    return spent, tokens, 0.0


def measure(options):
    """One measurement, in this process: a dict on the last line of stdout."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        trainer = ours if options.variant == "ours" else theirs
        spent, tokens, reference = trainer(options.method, options.precision, options, folder)
    seconds, tokens = sum(spent[1:]) + reference * sum(tokens[1:]), sum(tokens[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else peak
    print(json.dumps({"tokens_per_second": tokens / seconds, "peak_gib": memory}))


def matrix_peak(precision):
    """FLOP/s of a 4096 x 4096 x 4096 product, the median of seven."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        began = time.perf_counter()
        (one @ other).sum().item()
        times.append(time.perf_counter() - began)
    return 2 * 4096**3 / statistics.median(times[1:])


def write_record(path, script, **found):
    """What was measured, with command, commit, machine and versions, as JSON."""
    import torch

    git = ["git", "rev-parse", "--short", "HEAD"]
    record = {
        "command": " ".join(["python", f"tests/benchmarks/{script}", *sys.argv[1:]]),
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, encoding="utf-8").stdout.strip(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        **found,
    }
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{record['machine']}; written to {path}")


def parse_options():
    shown = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**shown)
    parser.add_argument("--model", help="a model folder; default: the shape with random weights")
    parser.add_argument("--methods", nargs="+", default=["sft", "lora", "dpo"])
    variants = ["ours", "TRL", "TRL packed", "TRL packed, base in bf16"]
    parser.add_argument("--variants", nargs="+", default=variants, help="of these")
    parser.add_argument("--precisions", nargs="+", help="default: fp32, and bf16 where the hardware has it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=str(ROOT / "trainer_output/bench/training.json"))
    for name in ("--method", "--variant", "--precision"):  # one measurement, called by the others
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parse_options()
    if options.variant:
        return measure(options)

    from utils.device import pick_device

    # 1. Make the rows and the model
    PLACE.mkdir(parents=True, exist_ok=True)
    sample_files(PLACE)
    options.model = options.model or str(shape_of_qwen3(PLACE / "qwen3_0_6b_shape"))
    precisions = options.precisions or (["fp32", "bf16"] if pick_device().bf16 else ["fp32"])

    # 2. Measure every case in every round, each in a process of its own; ours in the quickest format only
    results, peaks = {}, {precision: matrix_peak(precision) for precision in precisions}
    for number in range(options.rounds):
        for method, variant in VARIANTS:
            for precision in precisions[-1:] if variant == "ours" else precisions:
                if method not in options.methods or variant not in options.variants:
                    continue
                case = [f"--method={method}", f"--variant={variant}", f"--precision={precision}"]
                command = [sys.executable, __file__, f"--model={options.model}", *case]
                done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
                if done.returncode:
                    print(f"{method} {variant} {precision} failed:\n{done.stderr[-2000:]}", flush=True)
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                results.setdefault((method, variant, precision), []).append(found)
                speed, memory = found["tokens_per_second"], found["peak_gib"]
                told = f"round {number + 1}: {method} {variant} {precision}"
                print(f"{told}: {speed:.1f} tokens/s, {memory:.1f} GiB", flush=True)

    # 3. Print the medians, and keep everything
    table = [summary(case, rounds, results, peaks) for case, rounds in results.items()]
    print("\n| method | trainer | tokens/s | ours is | of peak | memory |\n|---|---|---|---|---|---|")
    for row in table:
        ratio = f"{row['ours_is']:.2f} x" if "ours_is" in row else ""
        print(
            f"| {row['method']} | {row['variant']}, {row['precision']} | {row['tokens_per_second']:.1f} | {ratio} | "
            f"{row['of_peak']:.0%} | {row['peak_gib']:.1f} GiB |"
        )
    every = [{"case": case, "rounds": rounds} for case, rounds in results.items()]
    gigaflops = {name: round(peak / 1e9) for name, peak in peaks.items()}
    write_record(options.output, "bench_training.py", matrix_peak_gflops=gigaflops, table=table, all=every)


def summary(case, rounds, results, peaks):
    """A row of the table: medians, and the median of the ratios of ours to this within a round."""
    method, variant, precision = case
    speed = statistics.median(one["tokens_per_second"] for one in rounds)
    flop = (4 if method == "lora" else 6) * 596_049_920
    row = {"method": method, "variant": variant, "precision": precision}
    row["tokens_per_second"], row["of_peak"] = round(speed, 1), round(speed * flop / peaks[precision], 3)
    row["peak_gib"] = round(max(one["peak_gib"] for one in rounds), 1)
    ours = [found for other, found in results.items() if other[:2] == (method, "ours")]
    if ours and variant != "ours":  # round by round: the machine may be slower in one than in another
        pairs = zip(ours[0], rounds)
        ratios = [own["tokens_per_second"] / one["tokens_per_second"] for own, one in pairs]
        row["ours_is"] = round(statistics.median(ratios), 2)
    return row


if __name__ == "__main__":
    sys.exit(main())
