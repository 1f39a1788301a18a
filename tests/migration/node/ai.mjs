// node ai.mjs AI PROVIDER deepseek|compatible: every cell with those packages of the AI SDK.

import { ASK_PERSON, Capital, City, PARIS, Person, SAY_JSON, WEATHER, key, model as name, run, thrown, url } from "./cells.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false; // they would stand between the lines of JSON

const [, , aiPackage, providerPackage, kind] = process.argv;
const { APICallError, Output, generateObject, generateText, streamText, tool } = await import(aiPackage);
const provider = await import(providerPackage);

function providerWith(apiKey) {
  const baseURL = `${url}/v1`;
  if (kind === "deepseek") return provider.createDeepSeek({ baseURL, apiKey });
  return provider.createOpenAICompatible({
    name: "deepseek",
    baseURL,
    apiKey,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
}

const model = providerWith(key)(name);
const common = { model, temperature: 0, maxRetries: 0 };
const weather = (given) =>
  tool({
    description: "Today's weather",
    inputSchema: City,
    execute: async ({ city }) => (given.push(city), "Sunny, 21 degrees."),
  });

const described = (error) => ({
  class: error.name,
  apiError: APICallError.isInstance(error),
  status: error.statusCode,
  message: error.message,
  retryable: error.isRetryable,
});

// The first step must call the function, the second must not.
const twoSteps = {
  stopWhen: ({ steps }) => steps.length === 2,
  prepareStep: ({ stepNumber }) => ({
    toolChoice: stepNumber === 0 ? { type: "tool", toolName: "get_weather" } : "none",
  }),
};

await run({
  async chat() {
    const answer = await generateText({ ...common, prompt: PARIS, maxOutputTokens: 24 });
    return { text: answer.text, finish: answer.finishReason, model: answer.response.modelId, id: answer.response.id };
  },

  async stream() {
    const parts = [];
    const answer = streamText({ ...common, prompt: PARIS, maxOutputTokens: 24 });
    for await (const part of answer.textStream) parts.push(part);
    return { parts: parts.length, text: parts.join(""), finishes: [await answer.finishReason] };
  },

  async tools() {
    const given = [];
    const tools = { get_weather: weather(given) };
    const answer = await generateText({ ...common, prompt: WEATHER, tools, maxOutputTokens: 32, ...twoSteps });
    const streamed = [];
    const streaming = { get_weather: weather(streamed) };
    const stream = streamText({ ...common, prompt: WEATHER, tools: streaming, maxOutputTokens: 32, ...twoSteps });
    await stream.consumeStream();
    const [call] = answer.steps[0].toolCalls;
    return {
      name: call.toolName,
      args: call.input,
      id: call.toolCallId,
      given,
      finish: answer.steps[0].finishReason,
      steps: answer.steps.length,
      answer: answer.text,
      streamed,
      streamedAnswer: await stream.text,
    };
  },

  // @ai-sdk/deepseek asks for a JSON object with the schema in words, the other has the schema enforced.
  async json() {
    const say = { ...common, prompt: SAY_JSON, maxOutputTokens: 40 };
    const free = await generateObject({ ...say, output: "no-schema" });
    const worded = await generateObject({ ...say, schema: Capital });
    const got = { object: free.object, finish: free.finishReason, worded: worded.object };
    if (kind === "deepseek") return got;
    const ask = { ...common, prompt: ASK_PERSON, maxOutputTokens: 60, output: Output.object({ schema: Person }) };
    const whole = await generateText(ask);
    const stream = streamText(ask);
    let partial = 0;
    for await (const _ of stream.partialOutputStream) partial += 1;
    return { ...got, schema: whole.output, streamed: await stream.output, partial };
  },

  async errors() {
    const ask = { ...common, prompt: PARIS };
    return {
      key: await thrown(() => generateText({ ...ask, model: providerWith("sk-wrong")(name) }), described),
      model: await thrown(() => generateText({ ...ask, model: providerWith(key)("gpt-nothing") }), described),
      parameter: await thrown(() => generateText({ ...ask, temperature: 3 }), described),
      stream: await thrown(async () => {
        let failed;
        await streamText({ ...ask, topP: 2, onError: ({ error }) => (failed = error) }).consumeStream();
        if (failed) throw failed;
      }, described),
    };
  },

  async usage() {
    const ask = { ...common, prompt: PARIS, maxOutputTokens: 4 };
    const { usage: whole } = await generateText(ask);
    const stream = streamText(ask);
    await stream.consumeStream();
    return { whole, streamed: await stream.usage };
  },
});
