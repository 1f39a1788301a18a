// node openai.mjs PACKAGE: every cell with the openai package of that name.

import { z } from "zod";

import { ASK_PERSON, City, PARIS, Person, SAY_JSON, WEATHER, key, model, run, thrown, url } from "./cells.mjs";

const [, , name] = process.argv;
const { default: OpenAI } = await import(name);
const { zodResponseFormat } = await import(`${name}/helpers/zod`);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const completions = client.chat.completions;
const asked = (content) => ({ model, temperature: 0, messages: [{ role: "user", content }] });
const parameters = z.toJSONSchema(City);
const tools = [{ type: "function", function: { name: "get_weather", description: "Today's weather", parameters } }];

const described = (error) => ({
  class: error.constructor.name,
  apiError: error instanceof OpenAI.APIError,
  status: error.status,
  code: error.code,
  param: error.param,
  type: error.type,
  message: error.message,
  requestID: error.requestID,
});

await run({
  async chat() {
    const answer = await completions.create({ ...asked(PARIS), max_tokens: 24 });
    const [{ message, finish_reason }] = answer.choices;
    return { text: message.content, role: message.role, finish: finish_reason, model: answer.model, object: answer.object };
  },

  async stream() {
    const parts = [];
    const finishes = [];
    for await (const chunk of await completions.create({ ...asked(PARIS), max_tokens: 24, stream: true })) {
      parts.push(chunk.choices[0].delta.content ?? "");
      if (chunk.choices[0].finish_reason) finishes.push(chunk.choices[0].finish_reason);
    }
    const helper = completions.stream({ ...asked(PARIS), max_tokens: 24 });
    return { parts: parts.length, text: parts.join(""), finishes, helper: await helper.finalContent() };
  },

  async tools() {
    const question = asked(WEATHER);
    const forced = { tools, tool_choice: { type: "function", function: { name: "get_weather" } }, max_tokens: 48 };
    const first = await completions.create({ ...question, ...forced });
    const { message, finish_reason } = first.choices[0];
    const [call] = message.tool_calls;
    const result = { role: "tool", tool_call_id: call.id, content: "Sunny, 21 degrees." };
    const messages = [...question.messages, message, result];
    const second = await completions.create({ ...question, messages, tools, tool_choice: "none", max_tokens: 8 });
    const streamed = await completions.stream({ ...question, ...forced }).finalChatCompletion();
    return {
      name: call.function.name,
      args: JSON.parse(call.function.arguments),
      id: call.id,
      finish: finish_reason,
      answer: second.choices[0].message.content,
      streamed: JSON.parse(streamed.choices[0].message.tool_calls[0].function.arguments),
    };
  },

  // The helper calls the function, sends its result back, and goes on until there is an answer.
  async runTools() {
    const given = [];
    const parse = JSON.parse;
    const get_weather = ({ city }) => (given.push(city), "Sunny, 21 degrees.");
    const runner = completions.runTools(
      {
        ...asked(WEATHER),
        max_tokens: 48,
        tools: [{ ...tools[0], function: { ...tools[0].function, parse, function: get_weather } }],
        tool_choice: { type: "function", function: { name: "get_weather" } },
      },
      { maxChatCompletions: 1 },
    );
    await runner.done();
    return { given, roles: runner.messages.map((message) => message.role) };
  },

  async json() {
    const object = await completions.create({
      ...asked(SAY_JSON),
      max_tokens: 40,
      response_format: { type: "json_object" },
    });
    const schema = await completions.parse({
      ...asked(ASK_PERSON),
      max_tokens: 60,
      response_format: zodResponseFormat(Person, "person"),
    });
    const [{ message, finish_reason }] = object.choices;
    return { object: JSON.parse(message.content), finish: finish_reason, schema: schema.choices[0].message.parsed };
  },

  async errors() {
    const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "sk-wrong", maxRetries: 0 });
    return {
      key: await thrown(() => stranger.chat.completions.create(asked(PARIS)), described),
      model: await thrown(() => completions.create({ ...asked(PARIS), model: "gpt-nothing" }), described),
      parameter: await thrown(() => completions.create({ ...asked(PARIS), temperature: 3 }), described),
      stream: await thrown(() => completions.create({ ...asked(PARIS), top_p: 2, stream: true }), described),
    };
  },

  async usage() {
    const request = { ...asked(PARIS), max_tokens: 4 };
    const whole = await completions.create(request);
    let streamed;
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await completions.create({ ...request, ...options })) streamed = chunk.usage ?? streamed;
    return { whole: whole.usage, streamed };
  },

  async models() {
    const ids = [];
    for await (const { id } of client.models.list()) ids.push(id);
    return { ids, one: (await client.models.retrieve(model)).id };
  },
});
