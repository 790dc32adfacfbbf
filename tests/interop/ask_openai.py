"""Ask the server of our chat with OpenAI's own client: python ask_openai.py PORT KEY QUESTION

Prints as JSON: {"models", "whole": [the answer at once, why it ended], "pieces": the same streamed, "usage": tokens, "stopped": the
answer up to a stop text, "refused": what a wrong key and a field that is not done are told}. ask_openai.cjs does the same.
"""

import json
import sys

import openai

port, key, question = sys.argv[1:]
client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key)
models = [model.id for model in client.models.list()]
messages = [{"role": "system", "content": "你是中医。"}, {"role": "user", "content": question}]
asked = {"model": models[0], "messages": messages, "temperature": 0, "max_completion_tokens": 32}
whole = client.chat.completions.create(**asked)
pieces, usage = [], None
for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
    pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
    usage = chunk.usage.total_tokens if chunk.usage else usage
content = whole.choices[0].message.content
stopped = client.chat.completions.create(**asked, stop=content[2:4], n=1, seed=1, user="test").choices[0]
refused = []
for other, more in ((client.with_options(api_key="wrong"), {}), (client, {"logprobs": True})):
    try:
        other.chat.completions.create(**asked, **more)
    except openai.APIStatusError as error:
        refused.append([error.status_code, error.message])
found = {"models": models, "pieces": pieces, "usage": [whole.usage.total_tokens, usage], "refused": refused}
found |= {"whole": [content, whole.choices[0].finish_reason]}
print(json.dumps(found | {"stopped": [stopped.message.content, stopped.finish_reason]}))
