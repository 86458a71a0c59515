import assert from "node:assert/strict";
import { test } from "node:test";

import { trustedKey } from "../src/bundle.ts";
import { BundleError } from "../src/errors.ts";
import { haltsOf, readRollout } from "../src/rollout.ts";
import { vectors } from "./vectors.ts";

const { told, trust, halts } = vectors.rollout;

test("a gateway's rollout is read as Python reads it, whatever a later one says beside", () => {
  const { default: version, canary } = readRollout(told, "meals");
  assert.deepEqual([version, canary], [7, { version: 9, share: 0.05 }]);
  assert.equal(readRollout(JSON.stringify({ model: "meals", default: 7, later: [1] }), "meals").canary, null);
});

test("what is no rollout of the model is refused", () => {
  const wrong = [
    ["", /no JSON/],
    ["null", /model/],
    [told.replace("meals", "parking"), /meals/],
    [told.replace('"default":7', '"default":0'), /default/],
    [told.replace('"share":0.05', '"share":5'), /share/],
    [JSON.stringify({ model: "meals", default: 7, halted: Array(17).fill("") }), /16/],
  ] as const;
  for (const [text, why] of wrong) {
    assert.throws(() => readRollout(text, "meals"), (error: Error) => error instanceof BundleError && why.test(error.message));
  }
});

test("of what was taken back counts what the trusted key signed, of this model, and nothing else", async () => {
  assert.deepEqual([...(await haltsOf(readRollout(told, "meals"), await trustedKey(trust)))], halts);
  assert.deepEqual(halts, [[5, "recall fell – a lot"], [6, "recall fell – a lot"]]);
});
