"""What the number format of chat costs in answers: bfloat16, float16 weights and 8-bit weights against float32, on a trained model.

    python tests/benchmarks/bench_forms.py
    python tests/benchmarks/bench_forms.py --model trainer_output/sft_finetuned --rows 300

The default is what `make demo` has trained. Greedy answers to held-out questions: how many are float32's, token for token, and how
many state the facts of the reference (as compare_models.py counts them). KL: the Kullback-Leibler divergence of the next-token
probabilities from float32's, in nats, mean over the tokens of float32's answers.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "trainer_output/demo/sft_finetuned"))
    parser.add_argument("--eval-file", type=Path, default=ROOT / "trainer_output/demo/qwen3/sft_eval.jsonl")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    options = parser.parse_args()

    # 1. The questions, and the terms that facts are told by
    from utils.data.terms import Terms
    from utils.device import Device
    from utils.evaluation.answers import same_facts, same_names
    from utils.files import read_jsonl, sample_by_id
    from utils.model.chat_format import encode_prompt
    from utils.model.folder import load_for_answers, load_tokenizer
    from utils.model.generate import generate_tokens, read_answer, stop_tokens

    tokenizer = load_tokenizer(options.model)
    terms = Terms(ROOT / "data_prepare/sample/terms.jsonl")
    rows = sample_by_id(list(read_jsonl(options.eval_file)), options.rows)
    prompts = [encode_prompt(tokenizer, row["messages"][:-1]) for row in rows]

    # 2. Each form answers; the first is the reference
    devices = [
        Device("cpu", False, "float32"),
        Device("cpu", True, "bf16"),
        Device("cpu", False, "float16 weights", "half"),
        Device("cpu", False, "int8", "int8"),
    ]
    print("| | answers as in float32 | facts stated right | KL |\n|---|---|---|---|")
    exact = None
    for device in devices:
        model = load_for_answers(options.model, device)
        answers = generate_tokens(model, prompts, stop_tokens(model, tokenizer), options.tokens)
        exact = exact or (answers, [next_token_logps(model, *each) for each in zip(prompts, answers)])
        same = sum(one == other for one, other in zip(exact[0], answers))
        right = asked = 0
        for row, prompt, answer in zip(rows, prompts, answers):
            *_, question, reference = (message["content"] for message in row["messages"])
            said = read_answer(tokenizer, prompt, answer).content
            facts = same_facts(terms, reference, said, question)
            asked += facts is not None
            right += bool(facts) and same_names(terms, reference, said, question) is not False
        kl = tokens = 0.0
        for prompt, answer, wanted in zip(prompts, *exact):
            logps = next_token_logps(model, prompt, answer)
            kl += (wanted.exp() * (wanted - logps)).sum().item()
            tokens += len(answer)
        print(
            f"| {device.reason} | {same} of {len(rows)} | {right / asked:.1%} | {kl / tokens:.1e} |",
            flush=True,
        )


def next_token_logps(model, prompt: list[int], answer: list[int]):
    """Log-probabilities (tokens of the answer, vocabulary), float64, where the answer's tokens are chosen, in chat's own pass."""
    import torch

    from utils.model.qwen3_answer import CachedModel

    cached = CachedModel(model)
    logits = [cached.feed(new) for new in (prompt, *([token] for token in answer[:-1]))]
    return torch.stack(logits).double().log_softmax(-1)


if __name__ == "__main__":
    sys.exit(main())
