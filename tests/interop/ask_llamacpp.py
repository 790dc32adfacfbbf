"""Ask a GGUF file through llama.cpp's chat endpoint, with the template in the file: python ask_llamacpp.py FILE QUESTIONS.json"""

import json
import sys

import xllamacpp

path, questions = sys.argv[1], json.load(open(sys.argv[2], encoding="utf-8"))
parameters = xllamacpp.CommonParams()
parameters.model.path = path
parameters.n_ctx = 1024
parameters.n_parallel = 1
server = xllamacpp.Server(parameters)
answers = []
for question in questions:
    reply = server.handle_chat_completions(
        {"messages": [{"role": "user", "content": question}], "max_tokens": 64, "temperature": 0}
    )
    message = reply["choices"][0]["message"]
    thought = message.get("reasoning_content")
    answers.append((f"<think>\n{thought.strip()}\n</think>\n\n" if thought else "") + message["content"])
print(json.dumps(answers))
