"""Answer through llama.cpp for bench_chat.py, in the environment of tests/interop: python time_llamacpp.py FILE.gguf THREADS

A line of stdin is a JSON request {"prompt": [token ids], "tokens": number of the answer's tokens}; for each, a line of stdout is
{"first_s": seconds to the first token, "tokens_per_second": of the others}, as llama.cpp's server times them.
"""

import json
import sys

import xllamacpp

path, threads = sys.argv[1], int(sys.argv[2])
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = path, 9216, 1
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(parameters)
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    request = {"prompt": asked["prompt"], "n_predict": asked["tokens"], "temperature": 0, "ignore_eos": True}
    timings = server.handle_completions({**request, "cache_prompt": False})["timings"]
    assert timings["prompt_n"] == len(asked["prompt"]) and timings["predicted_n"] == asked["tokens"], timings
    first, speed = timings["prompt_ms"] / 1000, timings["predicted_per_second"]
    print(json.dumps({"first_s": first, "tokens_per_second": speed}), flush=True)
