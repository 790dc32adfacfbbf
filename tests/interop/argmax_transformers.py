"""The likeliest next token at every position: python argmax_transformers.py FOLDER IDS.json -> token ids as JSON."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.tensor(json.load(open(sys.argv[2], encoding="utf-8")))
print(json.dumps(model(ids).logits[0].argmax(-1).tolist()))
