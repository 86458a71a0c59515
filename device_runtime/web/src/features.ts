// Raw values -> inputs: the host-language half of the transforms, as `hybrid.features` has it in Python.
//
// Text becomes an index by tables, a number becomes float32; the rest of each transform is compiled into the
// programs. `vectors/features.json`, which Python writes, holds the two together.

import { BadRequest } from "./errors.ts";

/** What a person's feature may be; null, undefined and NaN are a missing value. */
export type Raw = string | number | boolean | null | undefined;

export type Transform =
  | { readonly kind: "numeric" | "log1p"; readonly mean: number; readonly std: number; readonly clip: number }
  | { readonly kind: "bucketize"; readonly edges: readonly number[] }
  | { readonly kind: "categorical"; readonly vocabulary: readonly string[] }
  | { readonly kind: "hash"; readonly buckets: number; readonly seed: number };

/** Whether the raw value of a feature is text, else a number. */
export function isText(transform: Transform): boolean {
  return transform.kind === "categorical" || transform.kind === "hash";
}

/** An ordered set of named features: the columns of a program's input. */
export class Features {
  readonly names: readonly string[];
  readonly transforms: ReadonlyMap<string, Transform>;
  private readonly tables: readonly ((raw: Raw) => number)[];

  constructor(transforms: ReadonlyMap<string, Transform>) {
    this.transforms = transforms;
    this.names = [...transforms.keys()];
    this.tables = [...transforms.values()].map(table);
  }

  /**
   * Raw values by name -> (features,) inputs, NaN where a number is missing.
   *
   * @throws BadRequest a feature is absent (a missing value is null), or of the wrong type.
   */
  inputs(values: ReadonlyMap<string, Raw>): Float32Array {
    const absent = this.names.filter((name) => !values.has(name));
    if (absent.length) throw new BadRequest(`features ${absent.join(", ")} are absent; a missing value is null`);
    return Float32Array.from(this.names, (name, column) => {
      try {
        return this.tables[column]!(values.get(name));
      } catch (error) {
        if (error instanceof BadRequest) throw new BadRequest(`feature '${name}': ${error.message}`);
        throw error;
      }
    });
  }
}

function table(transform: Transform): (raw: Raw) => number {
  if (transform.kind === "categorical") {
    const places = new Map(transform.vocabulary.map((word, place) => [word.normalize("NFC"), place]));
    const unseen = places.size;
    return (raw) => {
      const text = textOf(raw);
      return text === null ? unseen + 1 : (places.get(text) ?? unseen);
    };
  }
  if (transform.kind === "hash") {
    const { buckets, seed } = transform;
    return (raw) => {
      const text = textOf(raw);
      return text === null ? buckets : murmur3(new TextEncoder().encode(text), seed) % buckets;
    };
  }
  return numberOf;
}

/** NFC text, or null where missing. Half a surrogate pair has no UTF-8, which is what is hashed. */
export function textOf(raw: Raw): string | null {
  if (raw === null || raw === undefined || Number.isNaN(raw)) return null;
  if (typeof raw !== "string") throw new BadRequest(`must be text, got ${typeof raw}`);
  if (!raw.isWellFormed()) throw new BadRequest("text must be Unicode: it has half of a surrogate pair");
  return raw.normalize("NFC");
}

/** The nearest float32; past its range infinite, which counts as missing in the programs; NaN where missing. */
export function numberOf(raw: Raw): number {
  if (raw === null || raw === undefined) return NaN;
  if (typeof raw !== "number" && typeof raw !== "boolean") throw new BadRequest(`must be a number, got ${typeof raw}`);
  return Math.fround(Number(raw));
}

/**
 * MurmurHash3_x86_32: the one hash by which text becomes a bucket.
 *
 * Source: A. Appleby, smhasher, MurmurHash3.cpp (public domain).
 */
export function murmur3(data: Uint8Array, seed: number): number {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const body = data.length - (data.length % 4);
  let h = seed >>> 0;
  for (let at = 0; at < body; at += 4) {
    h ^= mix(view.getUint32(at, true));
    h = (Math.imul(rotate(h, 13), 5) + 0xe6546b64) >>> 0;
  }
  let tail = 0;
  for (let at = data.length - 1; at >= body; at--) tail = (tail << 8) | data[at]!;
  if (body < data.length) h ^= mix(tail);
  h ^= data.length;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

function mix(k: number): number {
  return Math.imul(rotate(Math.imul(k, 0xcc9e2d51), 15), 0x1b873593);
}

function rotate(x: number, by: number): number {
  return (x << by) | (x >>> (32 - by));
}
