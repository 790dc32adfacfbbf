"""Ask a model folder with vLLM: python ask_vllm.py FOLDER QUESTIONS.json"""

import json
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file
    folder, questions = sys.argv[1], json.load(open(sys.argv[2], encoding="utf-8"))
    model = LLM(folder, dtype="float32", max_model_len=1024, enforce_eager=True)
    chats = [[{"role": "user", "content": question}] for question in questions]
    replies = model.chat(chats, SamplingParams(temperature=0, max_tokens=64), use_tqdm=False)
    print(json.dumps([reply.outputs[0].text for reply in replies]))
