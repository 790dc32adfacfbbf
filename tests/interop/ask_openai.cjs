// What ask_openai.py does, with OpenAI's client in JavaScript: node ask_openai.cjs FOLDER PORT KEY QUESTION; FOLDER has the client.
const [folder, port, key, question] = process.argv.slice(2);
const { OpenAI } = require(require.resolve("openai", { paths: [folder] }));

async function main() {
  const client = new OpenAI({ baseURL: `http://127.0.0.1:${port}/v1`, apiKey: key });
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  const messages = [{ role: "system", content: "你是中医。" }, { role: "user", content: question }];
  const asked = { model: models[0], messages, temperature: 0, max_completion_tokens: 32 };
  const whole = await client.chat.completions.create(asked);
  const pieces = [];
  let usage = null;
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
    for (const choice of chunk.choices) if (choice.delta.content) pieces.push(choice.delta.content);
    usage = chunk.usage ? chunk.usage.total_tokens : usage;
  }
  const content = whole.choices[0].message.content;
  const stopped = await client.chat.completions.create({ ...asked, stop: content.slice(2, 4), n: 1, seed: 1, user: "test" });
  const refused = [];
  for (const [other, more] of [[client.withOptions({ apiKey: "wrong" }), {}], [client, { logprobs: true }]]) {
    await other.chat.completions.create({ ...asked, ...more }).catch((error) => refused.push([error.status, error.message]));
  }
  console.log(JSON.stringify({
    models, pieces, refused, whole: [content, whole.choices[0].finish_reason], usage: [whole.usage.total_tokens, usage],
    stopped: [stopped.choices[0].message.content, stopped.choices[0].finish_reason],
  }));
}
main();
