import assert from "node:assert/strict";
import { test } from "node:test";

import { decide, POLICY, REASONS } from "../src/eligibility.ts";
import { vectors } from "./vectors.ts";

test("every row of the policy table gives Python's reasons, in its order", () => {
  const said = new Set<string>();
  for (const { policy, readings, history, now_ms, reasons } of vectors.eligibility) {
    assert.deepEqual(decide(policy, readings, history, now_ms), reasons, JSON.stringify({ policy, readings, history }));
    for (const reason of reasons) said.add(reason);
  }
  // Each reason that there is was given, and each has words for a person.
  assert.deepEqual([...said].sort(), Object.keys(REASONS).sort());
});

test("the policy that a page shows is the one that a plan has by default", () => {
  assert.deepEqual(POLICY, vectors.eligibility[0]!.policy);
});
