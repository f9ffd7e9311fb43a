// The AI SDK with its openai-compatible provider: text, stream, tools, thought, errors, leaving.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const [baseURL, apiKey] = process.argv.slice(2);
const provider = (key) =>
  createOpenAICompatible({ name: "fathom", baseURL, apiKey: key, includeUsage: true });
const model = provider(apiKey)("deepseek-r1");
const hello = { model, temperature: 0, prompt: "hi", maxRetries: 0 };
const said = { node: process.version };

const plain = await generateText(hello);
said.plain = [plain.text, plain.reasoningText, plain.finishReason, plain.usage.totalTokens];
const stream = streamText({ ...hello, onError() {} });
const kinds = new Set();
for await (const part of stream.fullStream) kinds.add(part.type);
said.streamed = [
  await stream.text, await stream.reasoningText, await stream.finishReason,
  (await stream.usage).totalTokens,
];
said.kinds = [...kinds];

const parameters = {
  type: "object", properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"], additionalProperties: false,
};
const cities = [];
const weather = tool({
  description: "The weather of a city",
  inputSchema: jsonSchema(parameters),
  execute: async ({ city }) => { cities.push(city); return { degrees: 20 }; },
});
const options = { ...hello, tools: { weather }, maxOutputTokens: 400, stopWhen: stepCountIs(2) };
const withTools = await generateText({
  ...options,
  toolChoice: "required",
  prepareStep: ({ stepNumber }) => (stepNumber > 0 ? { toolChoice: "auto" } : {}),
});
said.tools = {
  cities: [...cities], steps: withTools.steps.map((step) => step.finishReason),
  text: withTools.text,
};
cities.length = 0;
const toolStream = streamText({ ...options, toolChoice: "required", stopWhen: stepCountIs(1) });
await toolStream.consumeStream();
said.tools.streamed = [[...cities], await toolStream.finishReason];

async function errorOf(changes) {
  try {
    await generateText({ ...hello, ...changes });
    return null;
  } catch (error) {
    return [error.name, error.statusCode, error.message];
  }
}
said.errors = [
  await errorOf({ model: provider("sk-wrong")("deepseek-r1") }),
  await errorOf({ model: provider(apiKey)("gpt-5") }),
  await errorOf({ temperature: 3 }),
];

const endless = createOpenAICompatible({
  name: "fathom", baseURL, apiKey,
  transformRequestBody: (body) => ({ ...body, ignore_eos: true, max_tokens: 7000 }),
})("deepseek-r1");
for (let turn = 0; turn < 70; turn += 1) {
  const leaving = new AbortController();
  const left = streamText({
    model: endless, prompt: "hi", abortSignal: leaving.signal, onError() {}, maxRetries: 0,
  });
  for await (const part of left.fullStream) {
    if (part.type === "reasoning-delta" || part.type === "text-delta") {
      leaving.abort();
      break;
    }
  }
}
const last = await generateText({ ...hello, maxOutputTokens: 3, abortSignal: AbortSignal.timeout(60_000) });
said.afterLeaving = last.finishReason;
console.log(JSON.stringify(said));
