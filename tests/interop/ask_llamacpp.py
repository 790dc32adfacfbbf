"""Ask a GGUF file through llama.cpp's chat endpoint, with the template in the file: python ask_llamacpp.py FILE TEXTS.json

prints the answers as JSON; with a third argument, "tokens", the token ids of the texts.
"""

import json
import sys
import urllib.request

import xllamacpp

path, texts = sys.argv[1], json.load(open(sys.argv[2], encoding="utf-8"))
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = path, 1024, 1
server = xllamacpp.Server(parameters)


def answer(question):
    messages = [{"role": "user", "content": question}]
    reply = server.handle_chat_completions({"messages": messages, "max_tokens": 64, "temperature": 0})
    message = reply["choices"][0]["message"]
    thought = message.get("reasoning_content")
    return (f"<think>\n{thought.strip()}\n</think>\n\n" if thought else "") + message["content"]


def tokens(text):
    asked = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.listening_address}/tokenize", asked, headers)
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # it listens on the loopback
    return json.load(ask(request, timeout=60))["tokens"]


print(json.dumps([tokens(text) if sys.argv[3:] else answer(text) for text in texts]))
