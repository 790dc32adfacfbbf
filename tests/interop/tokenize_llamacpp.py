"""Tokens of texts by llama.cpp: python tokenize_llamacpp.py FILE TEXTS.json -> [[token ids], ...] as JSON."""

import json
import sys
import urllib.request

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx = 512
parameters.n_parallel = 1
server = xllamacpp.Server(parameters)
ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # it listens on the loopback
results = []
for text in json.load(open(sys.argv[2], encoding="utf-8")):
    asked = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", asked, {"Content-Type": "application/json"}
    )
    results.append(json.load(ask(request, timeout=60))["tokens"])
print(json.dumps(results))
