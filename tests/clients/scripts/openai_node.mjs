// openai for node: chat, stream, tools with a result, thought, error classes, leaving mid-stream.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const hello = { model: "deepseek-r1", temperature: 0, messages: [{ role: "user", content: "hi" }] };
const said = { node: process.version };
said.models = (await client.models.list()).data.map((model) => model.id);

const plain = (await client.chat.completions.create(hello)).choices[0];
said.plain = [plain.message.content, plain.message.reasoning_content, plain.finish_reason];
const pieces = { content: "", reasoning_content: "", finish_reason: null };
let usage = null;
const options = { ...hello, stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create(options)) {
  usage = chunk.usage ?? usage;
  for (const choice of chunk.choices) {
    pieces.content += choice.delta.content ?? "";
    pieces.reasoning_content += choice.delta.reasoning_content ?? "";
    pieces.finish_reason = choice.finish_reason ?? pieces.finish_reason;
  }
}
said.streamed = [pieces.content, pieces.reasoning_content, pieces.finish_reason];
said.total_tokens = usage.total_tokens;
const helper = await client.chat.completions.stream(hello).finalChatCompletion();
said.helper = helper.choices[0].message.content;

const Sum = z.object({ first: z.literal([7, 8, 9]), second: z.literal([5, 6]) });
const response_format = zodResponseFormat(Sum, "sum");
const parsed = await client.chat.completions.parse({ ...hello, response_format, max_tokens: 400 });
said.parsed = parsed.choices[0].message.parsed;

const parameters = {
  type: "object", properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"], additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const asked = { ...hello, tools, tool_choice: "required", max_tokens: 400 };
const called = (await client.chat.completions.create(asked)).choices[0];
said.tools = { finish_reason: called.finish_reason, calls: called.message.tool_calls ?? [] };
const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
said.tools.streamed = streamed.choices[0].message.tool_calls ?? [];
if (said.tools.calls.length) {
  const result = { role: "tool", tool_call_id: said.tools.calls[0].id, content: "20 degrees" };
  const messages = [...hello.messages, called.message, result];
  const after = await client.chat.completions.create({ ...hello, tools, messages });
  said.tools.after = after.choices[0].message.content;
}

async function errorOf(changes, own = client) {
  try {
    await own.chat.completions.create({ ...hello, ...changes });
    return null;
  } catch (error) {
    return [error.constructor.name, error.status, error.code, error.param];
  }
}
said.errors = [
  await errorOf({}, new OpenAI({ baseURL, apiKey: "sk-wrong", maxRetries: 0 })),
  await errorOf({ model: "gpt-5" }),
  await errorOf({ temperature: 3 }),
  await errorOf({ temperature: 3, stream: true }),
];

// More abandoned streams than the engine runs at once: if one went on, the last would wait long.
const endless = { ...hello, temperature: 1, stream: true, ignore_eos: true, max_tokens: 7000 };
for (let turn = 0; turn < 70; turn += 1) {
  const stream = await client.chat.completions.create(endless);
  for await (const _ of stream) break;
  stream.controller.abort();
}
const last = await client.chat.completions.create({ ...hello, max_tokens: 3 }, { timeout: 60_000 });
said.afterLeaving = last.choices[0].finish_reason;
console.log(JSON.stringify(said));
