"""Our exam by option text in lm-evaluation-harness: python ask_lm_eval.py FOLDER EXAM.jsonl INSTRUCTION

Prints, as JSON, the harness's metrics and the log-likelihood of every option of every question, in the order of the file.
"""

import json
import sys

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

folder, exam, instruction = sys.argv[1:]
task = {
    **{"task": "tcm_exam", "output_type": "multiple_choice", "target_delimiter": ""},
    **{"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": exam}}, "test_split": "test"},
    "doc_to_text": "{{question}}\n" + instruction,
    "doc_to_choice": "{{options.values() | list}}",
    "doc_to_target": "{{(options.keys() | list).index(answer)}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
model = HFLM(folder, device="cpu", dtype="float32", enable_thinking=False, batch_size=16)
how = {"apply_chat_template": True, "log_samples": True, "bootstrap_iters": 0}
results = lm_eval.simple_evaluate(model, tasks=[task], task_manager=TaskManager(), **how)
samples = sorted(results["samples"]["tcm_exam"], key=lambda sample: sample["doc_id"])
logps = [[option[0] for option in sample["filtered_resps"]] for sample in samples]
print(json.dumps({"metrics": results["results"]["tcm_exam"], "logps": logps}, default=str))
