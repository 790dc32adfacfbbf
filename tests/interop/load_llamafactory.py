"""Load a data set with LLaMA-Factory's own loader: python load_llamafactory.py DATA_DIR sft|dpo FOLDER

Prints the token ids and labels of every row as JSON: [{"input_ids", "labels"} or {"chosen_input_ids", "chosen_labels", ...}, ...].
"""

import json
import sys

import yaml
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

data_dir, kind, folder = sys.argv[1:]
stage = {"sft": "sft", "dpo": "rm"}[kind]
given = yaml.safe_load(open(f"{data_dir}/settings.yaml", encoding="utf-8"))
if kind == "dpo":
    given.pop("mask_history")  # as docs/other_tools.md says
given |= {"dataset_dir": data_dir, "dataset": f"{kind}_train", "stage": stage, "model_name_or_path": folder}
given |= {"do_train": True, "finetuning_type": "lora", "output_dir": "output", "overwrite_cache": True}
model_args, data_args, training_args = get_train_args(given)[:3]
tokenizer = load_tokenizer(model_args)["tokenizer"]
template = get_template_and_fix_tokenizer(tokenizer, data_args)
rows = get_dataset(template, model_args, data_args, training_args, stage=stage, tokenizer=tokenizer)
rows = rows["train_dataset"]
columns = [column for column in rows.column_names if column.endswith(("input_ids", "labels"))]
print(json.dumps([{column: row[column] for column in columns} for row in rows]))
