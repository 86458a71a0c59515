import assert from "node:assert/strict";
import { test } from "node:test";

import { MAX_BYTES, readBundle, readManifest, trustedKey } from "../src/bundle.ts";
import { BundleError, ConfigError } from "../src/errors.ts";
import { vectors } from "./vectors.ts";

const encoder = new TextEncoder();
const pair = (await crypto.subtle.generateKey("Ed25519", true, ["sign", "verify"])) as CryptoKeyPair;
const program = encoder.encode("a program");

/** A zip of stored files, as Python's zipfile writes it; `change` alters one field of a directory entry. */
function zip(files: readonly (readonly [string, Uint8Array])[], change?: (entry: DataView) => void): Uint8Array<ArrayBuffer> {
  const [locals, directory]: [Uint8Array[], Uint8Array[]] = [[], []];
  let at = 0;
  for (const [name, data] of files) {
    const key = encoder.encode(name);
    const local = new DataView(new ArrayBuffer(30));
    const entry = new DataView(new ArrayBuffer(46));
    local.setUint32(0, 0x04034b50, true);
    entry.setUint32(0, 0x02014b50, true);
    for (const [view, size, length] of [[local, 18, 26], [entry, 20, 28]] as const) {
      view.setUint32(size, data.length, true);
      view.setUint32(size + 4, data.length, true);
      view.setUint16(length, key.length, true);
    }
    entry.setUint32(42, at, true);
    change?.(entry);
    locals.push(new Uint8Array(local.buffer), key, data);
    directory.push(new Uint8Array(entry.buffer), key);
    at += 30 + key.length + data.length;
  }
  const end = new DataView(new ArrayBuffer(22));
  end.setUint32(0, 0x06054b50, true);
  end.setUint16(8, files.length, true);
  end.setUint16(10, files.length, true);
  end.setUint32(12, directory.reduce((sum, part) => sum + part.length, 0), true);
  end.setUint32(16, at, true);
  return Uint8Array.from([...locals, ...directory, new Uint8Array(end.buffer)].flatMap((part) => [...part]));
}

async function signed(fields: object = {}): Promise<[string, Uint8Array][]> {
  const sha256 = Buffer.from(await crypto.subtle.digest("SHA-256", program)).toString("hex");
  const programs = { "predict.onnx": { sha256, bytes: program.length } };
  const text = encoder.encode(JSON.stringify({ ...vectors.manifest, programs, ...fields }));
  const signature = new Uint8Array(await crypto.subtle.sign("Ed25519", pair.privateKey, text));
  return [["manifest.json", text], ["manifest.sig", signature], ["predict.onnx", program]];
}

const read = (data: Uint8Array<ArrayBuffer>) => readBundle(data, pair.publicKey);

test("every field of Python's manifest is read", () => {
  const manifest = readManifest(JSON.stringify(vectors.manifest));
  assert.equal(manifest.version, 7);
  assert.deepEqual(manifest.features.names, [0, 1, 2, 3, 4, 5, 6].map((place) => `feature ${place}`));
  assert.deepEqual([...manifest.request], [["time", "text"], ["distance", "number"]]);
  assert.equal(manifest.keeping.label_window_s, 60);
});

test("a bundle that the trusted key signed is read; one of another key is refused", async () => {
  const bundle = await read(zip(await signed()));
  assert.deepEqual(bundle.programs.get("predict.onnx"), program);
  const other = (await crypto.subtle.generateKey("Ed25519", false, ["sign", "verify"])) as CryptoKeyPair;
  await assert.rejects(readBundle(zip(await signed()), other.publicKey), /not signed by the key/);
});

test("every byte of a bundle that is flipped, and every length it is cut to, is refused", async () => {
  const data = zip(await signed());
  // Of a directory's entry readers need not agree on version, times, checksum and attributes: nothing is read from them.
  const ignored = new Set<number>();
  const view = new DataView(data.buffer);
  for (let at = view.getUint32(data.length - 6, true); view.getUint32(at, true) === 0x02014b50; ) {
    for (const place of [4, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19, 34, 35, 36, 37, 38, 39, 40, 41]) ignored.add(at + place);
    const local = view.getUint32(at + 42, true);
    for (let place = 4; place < 26; place++) ignored.add(local + place);
    at += 46 + view.getUint16(at + 28, true);
  }
  for (let place = data.length - 22 + 4; place < data.length - 22 + 10; place++) ignored.add(place);
  for (let place = data.length - 2; place < data.length; place++) ignored.add(place);
  for (let place = 0; place < data.length; place++) {
    if (!ignored.has(place)) {
      const flipped = data.slice();
      flipped[place]! ^= 0x02;
      await assert.rejects(read(flipped), BundleError, `byte ${place}`);
    }
    await assert.rejects(read(data.slice(0, place)), BundleError, `cut to ${place}`);
  }
});

test("compressed, encrypted, repeated and oversize files are refused before the signature is looked at", async () => {
  const files = await signed();
  await assert.rejects(read(zip(files, (entry) => entry.setUint16(10, 8, true))), /without compression/);
  await assert.rejects(read(zip(files, (entry) => entry.setUint32(24, 1 << 30, true))), /without compression/);
  await assert.rejects(read(zip(files, (entry) => entry.setUint16(8, 1, true))), /encrypted/);
  await assert.rejects(read(zip([...files, files[0]!])), /distinct names/);
  await assert.rejects(read(new Uint8Array(MAX_BYTES + 1)), /at most/);
  await assert.rejects(read(zip(files.slice(0, 2))), /'predict.onnx' is missing/);
});

test("a signed manifest that this runtime does not understand is refused, and the reason says why", async () => {
  const refused: [object, RegExp][] = [
    [{ format: 3 }, /newer.*update the app/],
    [{ minimum_runtime: 99 }, /needs runtime 99.*update the app/],
    [{ surprise: 1 }, /surprise/],
    [{ features: { transforms: { x: { kind: "quantile" } } } }, /features\.transforms\.x\.kind/],
    [{ features: { transforms: { x: { kind: "numeric", power: 2 } } } }, /power/],
    [{ features: { transforms: { a: { kind: "numeric" }, "7": { kind: "numeric" } } } }, /whole numbers/],
    [{ alone: { unavailable: "device-only" } }, /missing_server/],
    [{ version: "7" }, /version/],
    [{ merge: "sideways" }, /merge/],
  ];
  for (const [fields, why] of refused) {
    await assert.rejects(async () => read(zip(await signed(fields))), (error: Error) => {
      assert.ok(error instanceof BundleError);
      assert.match(error.message, why);
      return true;
    });
  }
});

test("a key that is none is a sentence", async () => {
  await assert.rejects(trustedKey("no key"), ConfigError);
});
