"""Ask a model folder with plain transformers (4.57 or 5.x), an adapter with PEFT, which finds the base by adapter_config.json:
python ask_transformers.py FOLDER QUESTIONS.json -> answers as JSON."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, questions = sys.argv[1], json.load(open(sys.argv[2], encoding="utf-8"))
tokenizer, loader, limits = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM, {}
if (Path(folder) / "adapter_config.json").is_file():
    from peft import AutoPeftModelForCausalLM as loader

    limits = {"eos_token_id": tokenizer.eos_token_id}
model, answers = loader.from_pretrained(folder, dtype=torch.float32), []
form = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
for question in questions:
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": question}], **form)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False, **limits)
    answers.append(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(json.dumps(answers))
