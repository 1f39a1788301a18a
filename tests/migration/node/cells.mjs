// What the rows share. A row runs its cells one after the other and prints a JSON line for each:
// {"cell": "chat", "got": {...}}. What a cell throws becomes its line; the tests decide what is right.

import { z } from "zod";

export const url = process.env.BASE_URL;
export const key = process.env.DEEPSEEK_API_KEY;
export const model = "deepseek-v3";
export const PARIS = "What is the capital of France?";
export const WEATHER = "What is the weather in Paris?";
export const SAY_JSON = 'Say this again: {"capital": "Paris"}';
export const ASK_PERSON = "Invent a person. Answer in JSON with name and age.";

export const City = z.object({ city: z.enum(["Paris", "Rome"]) });
export const Capital = z.object({ capital: z.string() });
export const Person = z.object({ name: z.string().max(12), age: z.number().int().min(1).max(99) });

export async function run(cells) {
  for (const [cell, ask] of Object.entries(cells)) {
    let got;
    try {
      got = await ask();
    } catch (error) {
      got = { unexpected: `${error.name}: ${error.message}`, cause: String(error.cause ?? "") };
    }
    console.log(JSON.stringify({ cell, got }));
  }
}

// What `ask` throws, described by `describe`; that it throws nothing is told too.
export async function thrown(ask, describe) {
  try {
    await ask();
  } catch (error) {
    return describe(error);
  }
  return { thrown: null };
}
