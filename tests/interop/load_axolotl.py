"""Read the exported rows as Axolotl does, by its own check of the configuration: python load_axolotl.py DATA_DIR sft|dpo FOLDER

Prints the rows as JSON: [{"input_ids", "labels"}, ...] for sft, [{"chosen_input_ids", "rejected_input_ids"}, ...] for dpo.
"""

import json
import os
import sys

import yaml
from axolotl.prompt_strategies import load
from axolotl.prompt_strategies.dpo import load as load_dpo
from axolotl.utils.config import validate_config
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault
from transformers import AutoTokenizer

data_dir, kind, folder = sys.argv[1:]
os.chdir(data_dir)
given = yaml.safe_load(open(f"{kind}.yaml", encoding="utf-8")) | {"base_model": folder, "sequence_len": 512}
given |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-5, "num_epochs": 1}
machine = {"bf16": False, "n_gpu": 0, "compute_capability": "sm_80"}
settings = validate_config(DictDefault(given), machine, env_capabilities={"torch_version": "2.13.0"})
tokenizer, data = AutoTokenizer.from_pretrained(folder), settings.datasets[0]
rows = load_dataset_with_config(data, use_auth_token=False)
if kind == "sft":
    strategy = load(data.type, tokenizer, settings, data)
    read = [strategy.tokenize_prompt(row) for row in rows]
    read = [{name: row[name] for name in ("input_ids", "labels")} for row in read]
else:
    transform, _ = load_dpo(data.type, settings, dataset_idx=0)
    read = []
    for row in rows:
        texts = transform(row, tokenizer=tokenizer)
        ids = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
        read.append({f"{side}_input_ids": ids["prompt"] + ids[side] for side in ("chosen", "rejected")})
print(json.dumps(read))
