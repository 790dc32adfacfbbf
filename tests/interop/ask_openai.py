"""Ask the server of our chat with OpenAI's own client: python ask_openai.py PORT KEY QUESTION

Prints as JSON: {"models", "whole": the answer at once, "pieces": the same streamed, "usage": tokens, "refused": what a wrong key is told}.
"""

import json
import sys

import openai

port, key, question = sys.argv[1:]
client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key)
models = [model.id for model in client.models.list()]
asked = {
    "model": models[0],
    "messages": [{"role": "system", "content": "你是中医。"}, {"role": "user", "content": question}],
    "temperature": 0,
    "max_tokens": 32,
}
whole = client.chat.completions.create(**asked)
stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
pieces, usage = [], None
for chunk in stream:
    pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
    usage = chunk.usage.total_tokens if chunk.usage else usage
refused = ""
try:
    client.with_options(api_key="wrong").models.list()
except openai.AuthenticationError as error:
    refused = error.message
print(
    json.dumps(
        {
            "models": models,
            "whole": [whole.choices[0].message.content, whole.choices[0].finish_reason],
            "pieces": pieces,
            "usage": [whole.usage.total_tokens, usage],
            "refused": refused,
        }
    )
)
