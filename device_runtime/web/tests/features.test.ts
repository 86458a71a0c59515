import assert from "node:assert/strict";
import { test } from "node:test";

import { BadRequest } from "../src/errors.ts";
import { Features, murmur3, type Raw } from "../src/features.ts";
import { bytesOf, vectors } from "./vectors.ts";

const SPECIAL: Readonly<Record<string, number>> = { inf: Infinity, "-inf": -Infinity, nan: NaN };

test("MurmurHash3 gives what its author's verification and Python give", () => {
  assert.equal(murmur3(new TextEncoder().encode("hello"), 0), 0x248bfa47);
  assert.equal(murmur3(new Uint8Array(), 0), 0);
  assert.equal(murmur3(new Uint8Array(), 0xffffffff), 0x81f16f39);
  assert.ok(vectors.murmur3.length >= 80);
  for (const { utf8, seed, hash } of vectors.murmur3) assert.equal(murmur3(bytesOf(utf8), seed), hash, `${utf8} ${seed}`);
});

test("every transform turns a raw value into Python's float32, bit by bit", () => {
  for (const { transform, raw, float32 } of vectors.inputs) {
    const features = new Features(new Map([["x", transform]]));
    raw.forEach((written, place) => {
      const value = typeof written === "object" && written !== null ? SPECIAL[written.special]! : (written as Raw);
      const input = features.inputs(new Map([["x", value]]));
      const expected = float32[place] ?? null;
      const where = `${JSON.stringify(transform)} of ${JSON.stringify(written)}`;
      if (expected === null) assert.ok(Number.isNaN(input[0]), where);
      else assert.equal(Buffer.from(input.buffer).toString("hex"), expected, where);
    });
  }
});

test("what Python refuses is refused: numbers for text, text for numbers, half of a surrogate pair", () => {
  for (const { transform, raw } of vectors.refused) {
    const features = new Features(new Map([["x", transform]]));
    for (const value of raw) assert.throws(() => features.inputs(new Map([["x", value]])), BadRequest);
  }
});

test("an absent feature is an error that names it, and no value stands in a message", () => {
  const features = new Features(new Map([["mood", { kind: "numeric", mean: 0, std: 1, clip: 10 }]]));
  assert.throws(() => features.inputs(new Map()), /mood/);
  assert.throws(
    () => features.inputs(new Map([["mood", "Zufrieden-Glasklar"]])),
    (error: Error) => error.message.includes("mood") && !error.message.includes("Glasklar"),
  );
});
