import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { test } from "node:test";

import { NO_ANSWER, readAnswer } from "../src/answers.ts";
import { readManifest } from "../src/bundle.ts";
import { download, outputsWithContribution, requestBody } from "../src/client.ts";
import { clipAndNoise, systemNoise } from "../src/mechanisms.ts";
import { mergeOnDevice } from "../src/merge.ts";
import type { PredictProgram } from "../src/program.ts";
import { bytesOf, vectors } from "./vectors.ts";

const device = readManifest(JSON.stringify(vectors.manifest));
const server = readManifest(
  JSON.stringify({ ...vectors.manifest, merge: "server", alone: null, release: { kind: "noised", clip: 2, sigma: 0.5 } }),
);
const kinds = new Map([
  ["time", "text"],
  ["distance", "number"],
] as const);

function outputs(values: Readonly<Record<string, unknown>>): string {
  return JSON.stringify({ outputs: Object.entries(values).map(([name, data]) => ({ name, data })) });
}

const about = { version: [7], feature_age_ms: [1000], status: ["ok"], fallback: ["none"] };
const served = { ...about, server_embedding: [0.5, 0.25], expires_ms: [2000], merged: ["device"] };

/** A program whose prediction is the sum of the server's embedding. */
const program = { predict: async (_: Float32Array, s: Float32Array) => [s[0]! + s[1]!] } as unknown as PredictProgram;

test("a request is the JSON that Python's client writes, and the same bytes after it", () => {
  for (const { entity, request, released, outputs: asked, json, raw } of vectors.requests) {
    const embedding = released && Float32Array.from(released);
    const { body, headerLength } = requestBody(entity, new Map(Object.entries(request)), kinds, embedding, asked);
    assert.deepEqual(JSON.parse(new TextDecoder().decode(body.subarray(0, headerLength))), json);
    assert.deepEqual(body.subarray(headerLength), bytesOf(raw));
  }
});

test("an embedding is clipped to its norm, and the noise has the declared standard deviation", () => {
  const none = (size: number) => new Float64Array(size);
  // (3, 4) has norm 5; clipped to 2.5 it is (1.5, 2).
  assert.deepEqual([...clipAndNoise(Float32Array.of(3, 4), 2.5, 1, none)], [1.5, 2]);
  assert.deepEqual([...clipAndNoise(Float32Array.of(0, 0), 2.5, 1, none)], [0, 0]);
  const drawn = systemNoise(40_000, 3);
  const mean = drawn.reduce((a, b) => a + b) / drawn.length;
  const sd = Math.sqrt(drawn.reduce((a, b) => a + (b - mean) ** 2, 0) / drawn.length);
  // Six standard errors: 3 / sqrt(40,000) = 0.015, and 3 / sqrt(80,000) = 0.0106.
  assert.ok(Math.abs(mean) < 0.09 && Math.abs(sd - 3) < 0.064, `${mean} ${sd}`);
});

test("an answer is read, and one that promises what it does not hold is bad", () => {
  const predicted = { ...about, prediction: [0.75], merged: ["server"] };
  assert.equal(readAnswer(200, outputs(predicted), server).prediction, 0.75);
  const bad = [
    "",
    "[]",
    "null",
    "{}",
    outputs({ ...predicted, version: [8] }),
    outputs({ ...predicted, prediction: [1.5] }),
    outputs({ ...predicted, prediction: [null] }),
    outputs({ ...predicted, prediction: [] }),
    outputs({ ...predicted, prediction: "0.5" }),
    outputs({ ...predicted, status: ["unavailable"] }),
    outputs({ ...predicted, fallback: ["made-up"] }),
    outputs({ ...predicted, feature_age_ms: [-2] }),
  ];
  for (const body of bad) assert.equal(readAnswer(200, body, server).status, "bad_answer", body);
  const others = [
    outputs({ ...served, server_embedding: [0.5] }),
    outputs({ ...served, server_embedding: [0.5, null] }),
    outputs({ ...served, server_embedding: [0.5, 1e39] }),
    outputs({ ...served, expires_ms: [-1] }),
    outputs({ ...served, merged: ["server"] }),
  ];
  for (const body of others) assert.equal(readAnswer(200, body, device).status, "bad_answer", body);
  assert.deepEqual(readAnswer(410, '{"error": "gone", "code": "update_required"}', server), {
    status: "update_required",
    error: "gone",
  });
});

test("slots are asked for and read where devices train the server tower, null being a missing value", () => {
  const parameters = [{ name: "server_tower.0.weight", shape: [2, 3] }];
  const federated = (of: object) => ({ ...of, train: { rows: 8, server: 3, missing: false, parameters } });
  const merging = readManifest(JSON.stringify(federated({ ...vectors.manifest })));
  const both = readAnswer(200, outputs({ ...served, server_slots: [0.5, null, 2] }), merging, true);
  assert.deepEqual([...both.serverSlots!], [0.5, NaN, 2]);
  assert.deepEqual([...both.serverEmbedding!], [0.5, 0.25]);
  assert.equal(readAnswer(200, outputs(served), merging).serverSlots, undefined);
  for (const slots of [[0.5, 1], [0.5, 1, 1e39], [0.5, 1, "2"], [0.5, 1, [2]], undefined]) {
    const answer = readAnswer(200, outputs({ ...served, ...(slots ? { server_slots: slots } : {}) }), merging, true);
    assert.equal(answer.status, "bad_answer", JSON.stringify(slots));
  }
  const alone = outputs({ ...served, expires_ms: [-1], status: ["unavailable"], fallback: ["device-only"] });
  assert.equal(readAnswer(200, alone, merging, true).serverSlots!.length, 0);
  assert.ok(outputsWithContribution(merging).includes("server_embedding"));
  assert.equal(outputsWithContribution(merging).at(-1), "server_slots");
  assert.equal(outputsWithContribution(server).at(-1), "server_embedding");
  const predicted = { ...about, prediction: [0.75], merged: ["server"], server_slots: [0.5, null, 2] };
  const read = readAnswer(200, outputs(predicted), { ...server, train: merging.train }, true);
  assert.deepEqual([read.prediction, read.serverSlots!.length, read.serverEmbedding], [0.75, 3, undefined]);
});

test("the device predicts from what the server sent, until that expires", async () => {
  const answer = { ...NO_ANSWER, ...readAnswer(200, outputs(served), device) };
  const fresh = await mergeOnDevice(device, program, answer, Float32Array.of(), 2000);
  assert.deepEqual([fresh.prediction, fresh.merged, fresh.fallback], [0.75, "device", "none"]);
  // One millisecond later the bundle's own answer stands in: stale_features="constant", 0.25.
  const late = await mergeOnDevice(device, program, answer, Float32Array.of(), 2001);
  assert.deepEqual([late.prediction, late.status, late.fallback], [0.25, "expired", "constant"]);
  assert.equal(late.serverEmbedding.length, 0);
});

test("without a gateway the embedding learned for a missing server answers, as the bundle declares", async () => {
  const none = { ...NO_ANSWER, status: "unreachable" };
  // missing_server is (0.5, -1.25): the sum, -0.75, is no matter to this program.
  const answer = await mergeOnDevice(device, program, none, Float32Array.of(), 0);
  assert.deepEqual([answer.prediction, answer.fallback, answer.version], [-0.75, "device-only", 7]);
  const limited = await mergeOnDevice(device, program, { ...NO_ANSWER, status: "rate_limited" }, Float32Array.of(), 0);
  assert.ok(Number.isNaN(limited.prediction) && limited.fallback === "none");
});

test("only a tag that every device of these bytes is given is kept", async () => {
  const data = Buffer.from("a bundle's bytes");
  const common = `"${createHash("sha256").update(data).digest("hex")}"`;
  const tags = [common, '"device-4711"'];
  const server = createServer((_, response) => response.setHeader("ETag", tags.shift()!).end(data));
  await once(server.listen(0, "127.0.0.1"), "listening");
  try {
    const gateway = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    assert.equal((await download(gateway, "meals"))?.etag, common);
    assert.equal((await download(gateway, "meals"))?.etag, null);
  } finally {
    server.close();
    server.closeAllConnections();
  }
});

test("a gateway that says nothing, or nothing more, is given up", { timeout: 20_000 }, async () => {
  let asked = 0;
  const server = createServer((_, response) => {
    if (++asked > 3) response.writeHead(200, { "Content-Length": 100 }).write("PK");
  });
  await once(server.listen(0, "127.0.0.1"), "listening");
  try {
    const gateway = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    for (const requests of [3, 6]) {
      await assert.rejects(download(gateway, "meals", null, { timeoutMs: 100 }), /the gateway cannot be reached/);
      assert.equal(asked, requests);
    }
  } finally {
    server.closeAllConnections();
    server.close();
  }
});
