// What became of a request: what a gateway's bytes say, as `device_runtime.answers` has it.

import type { Manifest } from "./bundle.ts";

export const BAD_ANSWER = "bad_answer";
export const EXPIRED = "expired";
export const TIMEOUT = "timeout";
export const UNREACHABLE = "unreachable";
const FALLBACKS = ["none", "device-only", "server-only", "cached", "constant"];

/** A prediction, or why there is none. */
export interface Answer {
  /** "ok"; why a side was missing: a code of the gateway; or, where it gave no answer for use, one of the four above. */
  readonly status: string;
  /** Of the last answer; 0 without one. */
  readonly httpStatus: number;
  /** Probability; NaN unless the status is "ok" or a fallback answered. */
  readonly prediction: number;
  /** That predicted; -1 without a prediction. */
  readonly version: number;
  /** Of the server's features when merged; -1 where there were none. */
  readonly featureAgeMs: number;
  /** Where the embeddings met: "server", "device"; "" without a prediction. */
  readonly merged: string;
  readonly latencyMs: number;
  readonly attempts: number;
  /** One sentence; "" where ok. */
  readonly error: string;
  /** What answered in place of both sides; "none": nothing had to, or nothing did. */
  readonly fallback: string;
  /** Unix time in UTC after which the server's embedding may not be used; -1 where nothing ages. */
  readonly expiresMs: number;
  /** What the server contributed; empty where it was not asked for, or nothing of the kind was merged. */
  readonly serverEmbedding: Float32Array;
  /** What went into the server tower, NaN where a value is missing; of versions whose server tower devices train too. */
  readonly serverSlots: Float32Array;
  /** Seconds after which the gateway says to ask again; null where it does not say. */
  readonly retryAfterS: number | null;
}

export const NO_ANSWER: Answer = {
  status: UNREACHABLE,
  httpStatus: 0,
  prediction: NaN,
  version: -1,
  featureAgeMs: -1,
  merged: "",
  latencyMs: 0,
  attempts: 0,
  error: "",
  fallback: "none",
  expiresMs: -1,
  serverEmbedding: new Float32Array(),
  serverSlots: new Float32Array(),
  retryAfterS: null,
};

/** Whether there is a prediction, or what a device predicts from. */
export function answered(answer: Pick<Answer, "status" | "fallback">): boolean {
  return answer.status === "ok" || answer.fallback !== "none";
}

class Unusable extends Error {}

function expect(held: boolean, what: string): asserts held {
  if (!held) throw new Unusable(what);
}

/**
 * The fields that a gateway's answer holds; one that cannot be used is "bad_answer".
 *
 * Where the device merges they hold no prediction yet, but the server's side of it.
 *
 * @param status of HTTP.
 * @param body the text.
 * @param contribution whether what the server contributed was asked for: its slots, where the bundle's training program
 * takes those, else its embedding.
 */
export function readAnswer(status: number, body: string, manifest: Manifest, contribution = false): Partial<Answer> {
  try {
    const document = JSON.parse(body) as Record<string, unknown>;
    if (status !== 200) {
      expect(document["error"] !== undefined, "no error");
      return { status: plain(document["code"] ?? "internal"), error: plain(document["error"]) };
    }
    const outputs = outputsOf(document["outputs"]);
    const found = manifest.merge === "server" ? predicted(outputs) : served(outputs);
    const { merge, server_embedding: size } = manifest;
    const { fallback, ...said } = about(outputs, manifest);
    const slots = contribution ? slotsOf(manifest) : 0;
    const all: Partial<Answer> = { ...found, ...said, fallback };
    return {
      ...all,
      ...(slots ? { serverSlots: serverSlots(outputs, fallback, slots) } : {}),
      ...(merge === "device" || (contribution && !slots) ? { serverEmbedding: serverEmbedding(outputs, fallback, size) } : {}),
    };
  } catch (error) {
    if (!(error instanceof Unusable || error instanceof SyntaxError || error instanceof TypeError)) throw error;
    // Nothing of it: the text could quote what was answered.
    return { status: BAD_ANSWER, error: "the gateway's answer cannot be read" };
  }
}

/** How many slots the server contributes to an example; 0: it is the embedding that it contributes. */
export function slotsOf({ train }: Manifest): number {
  return train?.parameters.some(({ name }) => name.startsWith("server_tower.")) ? train.server : 0;
}

type Outputs = ReadonlyMap<string, readonly unknown[]>;

function outputsOf(listed: unknown): Outputs {
  expect(Array.isArray(listed), "no outputs");
  return new Map(
    (listed as { name: string; data: unknown }[]).map(({ name, data }) => {
      expect(Array.isArray(data), "no data");
      return [name, data as readonly unknown[]];
    }),
  );
}

function first(outputs: Outputs, name: string): unknown {
  const value = outputs.get(name)?.[0];
  expect(value !== undefined, `no ${name}`);
  return value;
}

function whole(outputs: Outputs, name: string, least: number): number {
  const value = first(outputs, name);
  expect(Number.isSafeInteger(value) && (value as number) >= least, `no ${name}`);
  return value as number;
}

function predicted(outputs: Outputs): Partial<Answer> {
  const prediction = first(outputs, "prediction");
  expect(typeof prediction === "number" && prediction >= 0 && prediction <= 1, "not a probability");
  return { prediction, merged: plain(first(outputs, "merged")) };
}

function served(outputs: Outputs): Partial<Answer> {
  expect(first(outputs, "merged") === "device", "merged elsewhere");
  const expiresMs = whole(outputs, "expires_ms", -1);
  // Only features have a moment at which they expire.
  expect(expiresMs !== -1 || (outputs.get("fallback")?.[0] ?? "none") !== "none", "no expiry");
  return { expiresMs };
}

/** What every answer says of itself. */
function about(outputs: Outputs, manifest: Manifest) {
  const version = whole(outputs, "version", 0);
  const featureAgeMs = whole(outputs, "feature_age_ms", -1);
  const status = plain(outputs.get("status")?.[0] ?? "ok");
  const fallback = outputs.get("fallback")?.[0] ?? "none";
  expect(version === manifest.version, "another version than was asked");
  expect(typeof fallback === "string" && FALLBACKS.includes(fallback), "no fallback");
  expect(answered({ status, fallback }), "nothing answers, though it was said to be answered");
  return { status, fallback, version, featureAgeMs };
}

/** As float32 has it; empty where a constant answered, which is of no embedding. */
function serverEmbedding(outputs: Outputs, fallback: string, size: number): Float32Array {
  if (fallback === "constant") return new Float32Array();
  const data = outputs.get("server_embedding");
  expect(data !== undefined && data.length === size, "no embedding");
  const server = Float32Array.from(data, (value) => (typeof value === "number" ? value : NaN));
  expect(server.every(Number.isFinite), "not an embedding");
  return server;
}

/** As float32 has them; null, a missing value, is NaN. Empty where the server's side was missing. */
function serverSlots(outputs: Outputs, fallback: string, size: number): Float32Array {
  if (fallback === "constant" || fallback === "device-only") return new Float32Array();
  const data = outputs.get("server_slots");
  expect(data !== undefined && data.length === size, "no slots");
  expect(data.every((value) => value === null || typeof value === "number"), "not slots");
  const slots = Float32Array.from(data, (value) => (value === null ? NaN : (value as number)));
  expect(slots.every((value) => Math.abs(value) !== Infinity), "not slots");
  return slots;
}

/** What a gateway wrote, short, whatever it wrote. */
function plain(text: unknown): string {
  return String(text).slice(0, 500).toWellFormed();
}
