"""Ask a model folder with mlx-lm, as its server and chat do, which always ask the template for thinking: python ask_mlx.py FOLDER QUESTIONS.json"""

import json
import sys

from mlx_lm import generate, load

folder, questions = sys.argv[1], json.load(open(sys.argv[2], encoding="utf-8"))
(model, tokenizer), answers = load(folder), []
for question in questions:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=True)
    answers.append(generate(model, tokenizer, prompt=prompt, max_tokens=64))
print(json.dumps(answers))
