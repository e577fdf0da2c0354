// The official OpenAI client for Node against the front door at argv[2]; prints what it saw.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "rbee-tiny";
const messages = [{ role: "user", content: "A job is an event stream:" }];
const ask = { model, messages, max_tokens: 8, temperature: 0 };

const told = {};
told.whole = (await client.chat.completions.create(ask)).choices[0].message.content;
told.pieces = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  told.pieces += chunk.choices[0]?.delta?.content ?? "";
}

const schema = {
  type: "object",
  properties: { colour: { enum: ["red", "green"] } },
  required: ["colour"],
  additionalProperties: false,
};
const answer = await client.chat.completions.create({
  ...ask,
  max_tokens: 40,
  response_format: { type: "json_schema", json_schema: { name: "c", schema } },
});
told.colour = JSON.parse(answer.choices[0].message.content).colour;
told.vectors = (await client.embeddings.create({ model: "rbee-embed", input: ["A job", "A hive"] })).data.length;
told.models = (await client.models.list()).data.map((entry) => entry.id);

const failure = (promise) => promise.then(() => null, (error) => error);
const missing = await failure(client.chat.completions.create({ ...ask, model: "rbee-tin" }));
told.missing = { status: missing.status, code: missing.code, name: missing.constructor.name };
const bad = await failure(client.chat.completions.create({ ...ask, temperature: -1 }));
told.bad = { status: bad.status, param: bad.param };

const { data: stream, response } = await client.chat.completions
  .create({ ...ask, temperature: 1, max_tokens: 1900, n: 32, ignore_eos: true, stream: true })
  .withResponse();
told.left = response.headers.get("x-job-id");
for await (const _ of stream) break;
stream.controller.abort();

console.log(JSON.stringify(told));
