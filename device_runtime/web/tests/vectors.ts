// What Python wrote; see `vectors/write.py`.

import { readFileSync } from "node:fs";

import type { Policy, Readings } from "../src/eligibility.ts";
import type { Raw, Transform } from "../src/features.ts";

export interface Vectors {
  readonly murmur3: readonly { readonly utf8: string; readonly seed: number; readonly hash: number }[];
  readonly inputs: readonly {
    readonly transform: Transform;
    readonly raw: readonly (Raw | { readonly special: string })[];
    readonly float32: readonly (string | null)[];
  }[];
  readonly refused: readonly { readonly transform: Transform; readonly raw: readonly Raw[] }[];
  readonly manifest: Record<string, unknown>;
  readonly eligibility: readonly {
    readonly policy: Policy;
    readonly readings: Readings;
    readonly history: readonly number[];
    readonly now_ms: number;
    readonly reasons: readonly string[];
  }[];
  readonly requests: readonly {
    readonly entity: string;
    readonly request: Readonly<Record<string, Raw>>;
    readonly released: readonly number[] | null;
    readonly outputs: readonly string[];
    readonly json: unknown;
    readonly raw: string;
  }[];
  readonly rollout: {
    readonly trust: string;
    readonly told: string;
    readonly halts: readonly (readonly [number, string])[];
  };
}

export const vectors = JSON.parse(readFileSync(new URL("../vectors/device.json", import.meta.url), "utf8")) as Vectors;

export function bytesOf(hex: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}
