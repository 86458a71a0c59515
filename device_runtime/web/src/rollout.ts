// Which version this browser is to have: what the gateway tells all devices alike, and what the control plane took back.
//
// As `hybrid.rollout` and `device_runtime.download` in Python. The browser draws for a canary itself, and tells nobody. What
// a gateway says was taken back counts only where the host app's key signed it.

import { type Bundle, type Bundles, type Installed } from "./bundle.ts";
import * as check from "./checks.ts";
import { download, fetched, type Fetching } from "./client.ts";
import { BundleError } from "./errors.ts";

const MAX_BYTES = 64 << 10;
const MAX_HALTED = 16;
const SIGNATURE = 64;
const CONTEXT = new TextEncoder().encode("hybrid plan 1\0");

/** What a gateway tells devices to fetch; see `hybrid.rollout.Rollout`. */
export interface Rollout {
  readonly model: string;
  readonly default: number;
  readonly canary: { readonly version: number; readonly share: number } | null;
  /** Signed halts, in base64. */
  readonly halted: readonly string[];
}

interface Halt {
  readonly kind: string;
  readonly format: number;
  readonly model: string;
  readonly versions: readonly number[];
  readonly reason: string;
}

const versionNumber = check.integer(1, 2 ** 31 - 1);
const told = check.object<Rollout>(
  {
    model: check.text,
    default: versionNumber,
    canary: check.nullable(check.object({ version: versionNumber, share: check.number(Number.MIN_VALUE, 1) })),
    halted: check.list(check.text),
  },
  { canary: null, halted: [] },
);
const halt = check.object<Halt>({
  kind: check.oneOf("halt"),
  format: check.integer(1, 1),
  model: check.text,
  versions: check.list(versionNumber, 1),
  reason: check.text,
});

/**
 * Installs what the gateway has for this browser, if that is something else: the default, or a canary that it drew.
 *
 * A version that the control plane took back is left first: the bundle before it is current again, where there is one.
 *
 * @param trusted the host app's key.
 * @param options `runs` as in `Bundles.install`, the others as in `download`.
 * @returns what is installed now.
 * @throws BundleError it cannot be had or may not be installed; what was installed goes on: see `Bundles.current`.
 */
export async function update(
  bundles: Bundles,
  gateway: string | URL,
  model: string,
  trusted: CryptoKey,
  options: Fetching & { runs?: (bundle: Bundle) => Promise<unknown> } = {},
): Promise<Installed> {
  const { runs, ...fetching } = options;
  const version = await wanted(bundles, await rollout(gateway, model, fetching), trusted);
  const installed = await bundles.current(model, trusted).catch(() => null); // a damaged one is fetched anew
  const got = await download(gateway, model, installed?.etag ?? null, { ...fetching, version });
  if (got) return bundles.install(got.data, trusted, model, { etag: got.etag, ...(runs && { runs }) });
  return installed!; // 304 is for the tag of one that is there
}

/** The version to fetch; null: the default. */
async function wanted(bundles: Bundles, told: Rollout | null, trusted: CryptoKey): Promise<number | null> {
  if (!told) return null;
  const halts = await haltsOf(told, trusted);
  if (halts.size) await bundles.halt(told.model, [...halts.keys()]);
  const { canary } = told;
  if (!canary || (await bundles.halted(told.model)).includes(canary.version)) return null;
  return (await bundles.drawn(told.model, canary.version)) < canary.share ? canary.version : null;
}

/**
 * What devices of the model are to fetch; null: the gateway is older than rollouts.
 *
 * @throws BundleError the gateway does not answer, or says something else.
 */
export async function rollout(gateway: string | URL, model: string, fetching: Fetching = {}): Promise<Rollout | null> {
  const response = await fetched(gateway, `/v2/models/${encodeURIComponent(model)}/rollout`, MAX_BYTES, fetching);
  if (response === null) return null;
  return readRollout(new TextDecoder().decode(response), model);
}

/** @throws BundleError it is no rollout, or another model's. */
export function readRollout(text: string, model: string): Rollout {
  try {
    const document = JSON.parse(text) as Record<string, unknown> | null;
    const known = ["model", "default", "canary", "halted"]; // what a later gateway says beside it is not for this browser
    const kept = Object.entries(document ?? {}).filter(([name]) => known.includes(name));
    const read = told(Object.fromEntries(kept), "rollout");
    if (read.model !== model) throw new check.Mismatch(`rollout.model must be ${model}`);
    if (read.halted.length > MAX_HALTED) throw new check.Mismatch(`rollout.halted must be ${MAX_HALTED} at most`);
    return read;
  } catch (error) {
    const why = error instanceof check.Mismatch ? error.message : "it is no JSON";
    throw new BundleError(`the gateway's rollout is none: ${why}`);
  }
}

/** Version -> why it was taken back, where the host app's key says so; anybody else's word counts for nothing. */
export async function haltsOf(told: Rollout, trusted: CryptoKey): Promise<ReadonlyMap<number, string>> {
  const found = new Map<number, string>();
  for (const text of told.halted) {
    const message = await opened(text, trusted);
    if (message?.model !== told.model) continue;
    for (const version of message.versions) found.set(version, message.reason);
  }
  return found;
}

/** A signed halt as `hybrid.plan.sign` writes it: signature, length of the JSON as four bytes, JSON; null: it is none. */
async function opened(text: string, trusted: CryptoKey): Promise<Halt | null> {
  try {
    const data = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const signed = new Uint8Array(CONTEXT.length + data.length - SIGNATURE);
    signed.set(CONTEXT);
    signed.set(data.subarray(SIGNATURE), CONTEXT.length);
    if (!(await crypto.subtle.verify("Ed25519", trusted, data.subarray(0, SIGNATURE), signed))) return null;
    const body = data.subarray(SIGNATURE);
    const length = new DataView(body.buffer, body.byteOffset, body.byteLength).getUint32(0, true);
    if (body.length !== 4 + length) return null;
    return halt(JSON.parse(new TextDecoder().decode(body.subarray(4))), "halt");
  } catch {
    return null; // signed or not, no halt: a plan, or damaged
  }
}
