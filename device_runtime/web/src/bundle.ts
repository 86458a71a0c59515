// The signed device bundle, as `hybrid.bundle` writes it: read, verified, and installed in IndexedDB.
//
// A device trusts the public key of its host app, never one that comes with a bundle, and reads nothing of a bundle
// before its signature holds but where its files lie.

import * as check from "./checks.ts";
import { BundleError, ConfigError } from "./errors.ts";
import { Features, type Transform } from "./features.ts";
import { committed, openDatabase, reply } from "./idb.ts";

export const MAX_BYTES = 32 << 20;
const MAX_MANIFEST = 4 << 20;
/** What this package can run, as `device_runtime.RUNTIME` counts: a bundle says the least that it needs. */
export const RUNTIME = 4;
const FORMAT = 2;
const MOST_REMEMBERED = 1000; // versions that were taken back
const UTF8 = 0x800; // a zip's flag for a name in UTF-8, the only one that a bundle's may have

export type Release =
  | { readonly kind: "clear"; readonly reason: string }
  | { readonly kind: "noised"; readonly clip: number; readonly sigma: number };

export type Fallback = "error" | "device-only" | "constant";

/** What a device that merges answers by itself; see `hybrid.bundle.Alone`. */
export interface Alone {
  readonly unavailable: Fallback;
  readonly stale_features: Fallback;
  readonly missing_server: readonly number[];
  readonly constant: number | null;
}

/** What a device keeps; see `hybrid.bundle.Keeping`. */
export interface Keeping {
  readonly label_window_s: number | null;
  readonly label_absent: number | null;
  readonly seconds: number;
  readonly bytes: number;
  readonly max_examples: number;
  readonly max_seconds: number;
  readonly max_memory_mb: number;
}

/** How the training program is fed, which a browser does not run; see `hybrid.bundle.TrainProgram`. */
export interface Train {
  readonly rows: number;
  readonly server: number;
  readonly missing: boolean;
  readonly parameters: readonly { readonly name: string; readonly shape: readonly number[] }[];
}

/** What a bundle is and promises; see `hybrid.bundle.Manifest`. */
export interface Manifest {
  readonly format: number;
  readonly model: string;
  readonly version: number;
  readonly definition_hash: string;
  readonly features: Features;
  readonly request: ReadonlyMap<string, "text" | "number">;
  readonly server_embedding: number;
  readonly device_embedding: number;
  readonly merge: "server" | "device";
  readonly release: Release | null;
  readonly programs: ReadonlyMap<string, { readonly sha256: string; readonly bytes: number }>;
  readonly alone: Alone | null;
  readonly train: Train | null;
  readonly keeping: Keeping;
  readonly created_ms: number;
  readonly expires_ms: number | null;
  readonly minimum_runtime: number;
}

/** A bundle whose signature and programs were verified. */
export interface Bundle {
  readonly manifest: Manifest;
  readonly programs: ReadonlyMap<string, Uint8Array<ArrayBuffer>>;
}

const constants = { mean: check.number(), std: check.number(Number.MIN_VALUE), clip: check.number(Number.MIN_VALUE) };
const normal = { mean: 0, std: 1, clip: 10 };
const transform: check.Check<Transform> = check.kinds<Transform>({
  numeric: check.object<Transform & { kind: "numeric" | "log1p" }>({ kind: check.oneOf("numeric"), ...constants }, normal),
  log1p: check.object<Transform & { kind: "numeric" | "log1p" }>({ kind: check.oneOf("log1p"), ...constants }, normal),
  bucketize: check.object<Transform & { kind: "bucketize" }>({
    kind: check.oneOf("bucketize"),
    edges: check.list(check.number(), 1),
  }),
  categorical: check.object<Transform & { kind: "categorical" }>({
    kind: check.oneOf("categorical"),
    vocabulary: check.list(check.text, 1),
  }),
  hash: check.object<Transform & { kind: "hash" }>(
    { kind: check.oneOf("hash"), buckets: check.integer(2, 1 << 20), seed: check.integer(0, 2 ** 32 - 1) },
    { seed: 0 },
  ),
});
const features: check.Check<Features> = (value, where) =>
  new Features(check.object({ transforms: check.mapping(transform) })(value, where).transforms);
const release = check.kinds<Release>({
  clear: check.object<Release & { kind: "clear" }>({ kind: check.oneOf("clear"), reason: check.text }),
  noised: check.object<Release & { kind: "noised" }>({
    kind: check.oneOf("noised"),
    clip: check.number(Number.MIN_VALUE),
    sigma: check.number(Number.MIN_VALUE),
  }),
});
const fallback = check.oneOf<Fallback>("error", "device-only", "constant");
const alone = check.object<Alone>(
  {
    unavailable: fallback,
    stale_features: fallback,
    missing_server: check.list(check.number()),
    constant: check.nullable(check.number(0, 1)),
  },
  { unavailable: "error", stale_features: "error", missing_server: [], constant: null },
);
const KEEPING: Keeping = {
  label_window_s: null,
  label_absent: null,
  seconds: 30 * 86_400,
  bytes: 16 << 20,
  max_examples: 1024,
  max_seconds: 60,
  max_memory_mb: 512,
};
const keeping = check.object<Keeping>(
  {
    label_window_s: check.nullable(check.number(0)),
    label_absent: check.nullable(check.oneOf(0, 1)),
    seconds: check.number(0),
    bytes: check.integer(1 << 16),
    max_examples: check.integer(1),
    max_seconds: check.number(0),
    max_memory_mb: check.integer(1),
  },
  KEEPING,
);
const train = check.object<Train>({
  rows: check.integer(1),
  server: check.integer(),
  missing: check.boolean,
  parameters: check.list(check.object({ name: check.text, shape: check.list(check.integer()) })),
});
const manifest = check.object<Manifest>(
  {
    format: check.integer(FORMAT, FORMAT),
    model: check.text,
    version: check.integer(),
    definition_hash: check.text,
    features,
    request: check.mapping(check.oneOf("text", "number")),
    server_embedding: check.integer(),
    device_embedding: check.integer(),
    merge: check.oneOf("server", "device"),
    release: check.nullable(release),
    programs: check.mapping(
      check.object({ sha256: check.matching(/^[0-9a-f]{64}$/), bytes: check.integer(0, MAX_BYTES) }),
      /^[a-z][a-z0-9_]{0,30}\.[a-z]{1,8}$/,
    ),
    alone: check.nullable(alone),
    train: check.nullable(train),
    keeping,
    created_ms: check.integer(),
    expires_ms: check.nullable(check.integer()),
    minimum_runtime: check.integer(1),
  },
  {
    format: FORMAT,
    request: new Map(),
    alone: null,
    train: null,
    keeping: KEEPING,
    created_ms: 0,
    expires_ms: null,
    minimum_runtime: 1,
  },
);

/**
 * The public key (PEM) that a host app gives its devices.
 *
 * @throws ConfigError it holds no Ed25519 public key, or this browser cannot verify with one.
 */
export async function trustedKey(pem: string): Promise<CryptoKey> {
  const body = /-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----/.exec(pem)?.[1];
  try {
    const der = Uint8Array.from(atob((body ?? "").replace(/\s/g, "")), (letter) => letter.charCodeAt(0));
    return await crypto.subtle.importKey("spki", der, "Ed25519", false, ["verify"]);
  } catch (error) {
    const why = error instanceof DOMException ? error.name : "no PEM";
    throw new ConfigError(`the trusted key must be an Ed25519 public key that this browser can use (${why})`);
  }
}

/**
 * Verifies a bundle against the host app's key.
 *
 * @throws BundleError too large, damaged, wrongly signed, of another format or for a newer runtime, or a program that
 *   is not the one the manifest signed.
 */
export async function readBundle(data: Uint8Array<ArrayBuffer>, trusted: CryptoKey): Promise<Bundle> {
  if (data.length > MAX_BYTES) throw new BundleError(`a bundle has at most ${MAX_BYTES} bytes, got ${data.length}`);
  const files = entries(data);
  const [text, signature] = [file(files, "manifest.json"), file(files, "manifest.sig")];
  if (!(await crypto.subtle.verify("Ed25519", trusted, signature, text))) {
    throw new BundleError("the bundle is not signed by the key this device trusts");
  }
  if (text.length > MAX_MANIFEST) throw new BundleError(`a bundle's manifest has at most ${MAX_MANIFEST} bytes`);
  const read = readManifest(new TextDecoder().decode(text));
  const programs = new Map<string, Uint8Array<ArrayBuffer>>();
  for (const [name, program] of read.programs) {
    const bytes = file(files, name);
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (bytes.length !== program.bytes || hex !== program.sha256) throw new BundleError(`program '${name}' is not the one that was signed`);
    programs.set(name, bytes);
  }
  return { manifest: read, programs };
}

/** @throws BundleError it is of another format, or needs a newer runtime. */
export function readManifest(text: string): Manifest {
  let read: Manifest;
  try {
    const document: unknown = JSON.parse(text);
    const { format, minimum_runtime: needed } = (document ?? {}) as { format?: unknown; minimum_runtime?: unknown };
    // Asked first: what a newer bundle's other fields mean is not for this runtime to say.
    if (typeof format === "number" && format > FORMAT) {
      throw new check.Mismatch(`format ${format} is newer than ${FORMAT}, which this runtime reads: update the app`);
    }
    if (typeof needed === "number" && needed > RUNTIME) {
      throw new check.Mismatch(`it needs runtime ${needed}, this one is ${RUNTIME}: update the app`);
    }
    read = manifest(document, "manifest");
    consistent(read);
  } catch (error) {
    if (error instanceof check.Mismatch || error instanceof SyntaxError) {
      const why = error instanceof check.Mismatch ? error.message : "it is no JSON";
      throw new BundleError(`the bundle's manifest cannot be used: ${why}`);
    }
    throw error;
  }
  return read;
}

function consistent(read: Manifest): void {
  const own = read.alone;
  if (read.merge === "server" && own) throw new check.Mismatch("alone must be left out where merge='server'");
  if (!own) return;
  if (own.missing_server.length && own.missing_server.length !== read.server_embedding) {
    throw new check.Mismatch(`alone.missing_server must have ${read.server_embedding} numbers or none`);
  }
  const declared = [own.unavailable, own.stale_features];
  if (declared.includes("device-only") && !own.missing_server.length) {
    throw new check.Mismatch("alone.missing_server must be an embedding where 'device-only' is declared");
  }
  if (declared.includes("constant") && own.constant === null) {
    throw new check.Mismatch("alone.constant must be a probability where 'constant' is declared");
  }
}

/**
 * The files of a zip, whose directory is all that is read of it.
 *
 * Stored ones only: some kB of compressed zeros are gigabytes, and the signature is not checked yet. Stricter than a
 * zip must be (no comment, nothing before or between), so that two readers cannot see two bundles in one file.
 *
 * Source: PKWARE APPNOTE.TXT 6.3.10, sections 4.3.7, 4.3.12 and 4.3.16.
 */
function entries(data: Uint8Array<ArrayBuffer>): ReadonlyMap<string, Uint8Array<ArrayBuffer>> {
  const damaged = (what: string) => new BundleError(`the bundle is damaged or truncated (${what})`);
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const end = data.length - 22;
  if (end < 0 || view.getUint32(end, true) !== 0x06054b50) throw damaged("its end is missing");
  const count = view.getUint16(end + 10, true);
  const directory = view.getUint32(end + 16, true);
  if (directory + view.getUint32(end + 12, true) !== end) throw damaged("its directory is not where it says");
  const found = new Map<string, Uint8Array<ArrayBuffer>>();
  let [at, next] = [directory, 0];
  for (let entry = 0; entry < count; entry++) {
    if (at + 46 > end || view.getUint32(at, true) !== 0x02014b50) throw damaged("its directory");
    const [flags, method] = [view.getUint16(at + 8, true), view.getUint16(at + 10, true)];
    const [packed, size] = [view.getUint32(at + 20, true), view.getUint32(at + 24, true)];
    const [nameLength, extra] = [view.getUint16(at + 28, true), view.getUint16(at + 30, true)];
    const start = view.getUint32(at + 42, true);
    const name = data.subarray(at + 46, at + 46 + nameLength);
    if (method !== 0 || packed !== size) throw new BundleError("a bundle's files must be stored without compression");
    if (flags & ~UTF8) throw new BundleError("a bundle's files must not be encrypted, or marked otherwise");
    if (start !== next || start + 30 > directory || view.getUint32(start, true) !== 0x04034b50) throw damaged("a file");
    const body = start + 30 + view.getUint16(start + 26, true) + view.getUint16(start + 28, true);
    const local = data.subarray(start + 30, start + 30 + view.getUint16(start + 26, true));
    next = body + size;
    if (next > directory || !same(local, name)) throw damaged("a file");
    const key = new TextDecoder().decode(name);
    if (found.has(key)) throw new BundleError("a bundle's files must have distinct names");
    found.set(key, data.slice(body, next));
    at += 46 + nameLength + extra + view.getUint16(at + 32, true);
  }
  if (at !== end || next !== directory) throw damaged("there is more in it than its directory says");
  return found;
}

function file(files: ReadonlyMap<string, Uint8Array<ArrayBuffer>>, name: string): Uint8Array<ArrayBuffer> {
  const found = files.get(name);
  if (!found) throw new BundleError(`the bundle is damaged or truncated ('${name}' is missing)`);
  return found;
}

function same(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, place) => byte === b[place]);
}

interface Kept {
  readonly version: number;
  readonly created_ms: number;
  readonly etag: string | null;
  readonly data: Uint8Array<ArrayBuffer>;
}

interface Slot {
  readonly model: string;
  readonly current: Kept | null;
  readonly previous: Kept | null;
  /** Versions that the control plane took back, the latest last. */
  readonly halted: readonly number[];
  /** A canary's version, and this browser's number for it. */
  readonly draw: readonly [number, number] | null;
}

/** A verified bundle that this browser keeps. */
export interface Installed extends Bundle {
  /** Entity tag it was fetched by, for the next download's condition; null where there was none. */
  readonly etag: string | null;
}

/** The bundles of this browser: of each model the current one and the one before it. */
export class Bundles {
  private readonly database: IDBDatabase;

  private constructor(database: IDBDatabase) {
    this.database = database;
  }

  /** @param name of the IndexedDB database. */
  static async open(name = "hybrid-bundles"): Promise<Bundles> {
    return new Bundles(
      await openDatabase(name, 1, (database) => void database.createObjectStore("bundles", { keyPath: "model" })),
    );
  }

  /**
   * Verifies a bundle and makes it its model's current one; the present one becomes the previous.
   *
   * In one transaction: a tab that is closed half-way leaves what was there.
   *
   * @param data as downloaded.
   * @param trusted the host app's key.
   * @param model that was asked for: a signed bundle of another one is not what the host wants.
   * @param options `runs` loads its programs, and throws where this browser cannot run them.
   * @throws BundleError it may not be installed; what is installed goes on.
   */
  async install(
    data: Uint8Array<ArrayBuffer>,
    trusted: CryptoKey,
    model: string,
    options: { now?: number; etag?: string | null; runs?: (bundle: Bundle) => Promise<unknown> } = {},
  ): Promise<Installed> {
    const bundle = await readBundle(data, trusted);
    const { version, created_ms, expires_ms } = bundle.manifest;
    if (bundle.manifest.model !== model) {
      throw new BundleError(`the bundle must be of model '${model}', got one of '${bundle.manifest.model}'`);
    }
    if (expires_ms !== null && (options.now ?? Date.now()) > expires_ms) {
      throw new BundleError(`the bundle of version ${version} has expired`);
    }
    await options.runs?.(bundle);
    const etag = options.etag ?? null;
    const kept: Kept = { version, created_ms, etag, data };
    await this.change(model, (slot) => {
      const { current, previous, halted } = slot;
      if (halted.includes(version)) throw new BundleError(`version ${version} was taken back`);
      if (current && isOlder(kept, current)) {
        throw new BundleError(
          `the bundle of version ${version} is older than that of version ${current.version}, which is installed`,
        );
      }
      // The same promotion again must not push the one before out, whatever a zip that nobody signed has changed in.
      const again = current?.version === version && current.created_ms === created_ms;
      return { ...slot, current: kept, previous: again ? previous : current };
    });
    return { ...bundle, etag };
  }

  /** Leaves versions that the control plane took back: the one before is current again, and none of them is installed. */
  async halt(model: string, versions: readonly number[]): Promise<void> {
    await this.change(model, (slot) => {
      const halted = [...new Set([...slot.halted, ...versions])];
      if (halted.length === slot.halted.length) return slot;
      const [current = null, previous = null] = [slot.current, slot.previous].filter(
        (kept) => kept && !halted.includes(kept.version),
      );
      return { ...slot, current, previous, halted: halted.slice(-MOST_REMEMBERED) };
    });
  }

  /** Versions of a model that were taken back. */
  async halted(model: string): Promise<readonly number[]> {
    return (await this.slot(model)).halted;
  }

  /** This browser's number in [0, 1) for a canary, in thousandths, drawn when it is first asked for. */
  async drawn(model: string, version: number): Promise<number> {
    const slot = await this.change(model, (slot) => {
      if (slot.draw?.[0] === version) return slot;
      const [word = 0] = crypto.getRandomValues(new Uint32Array(1));
      return { ...slot, draw: [version, Math.floor((word / 2 ** 32) * 1000) / 1000] };
    });
    return slot.draw![1];
  }

  /** One model's slot, changed in one transaction; what `to` throws leaves it as it was. */
  private async change(model: string, to: (slot: Slot) => Slot): Promise<Slot> {
    const transaction = this.database.transaction("bundles", "readwrite", { durability: "strict" });
    const slots = transaction.objectStore("bundles");
    const before = whole(model, await reply(slots.get(model)));
    let after: Slot;
    try {
      after = to(before);
    } catch (error) {
      transaction.abort();
      throw error;
    }
    if (after !== before) slots.put(after);
    await committed(transaction);
    return after;
  }

  private async slot(model: string): Promise<Slot> {
    return whole(model, await reply(this.database.transaction("bundles").objectStore("bundles").get(model)));
  }

  /**
   * The model's bundle, verified again; the previous one where the current one no longer verifies; null without any.
   *
   * One that has expired meanwhile goes on: there is no other.
   *
   * @throws BundleError neither verifies.
   */
  async current(model: string, trusted: CryptoKey): Promise<Installed | null> {
    const slot = await this.slot(model);
    if (!slot.current) return null;
    try {
      return { ...(await readBundle(slot.current.data, trusted)), etag: slot.current.etag };
    } catch (error) {
      if (!(error instanceof BundleError) || !slot.previous) throw error;
      // Without its tag: the current one must be fetched again, not answered with "not modified".
      return { ...(await readBundle(slot.previous.data, trusted)), etag: null };
    }
  }

  /** Versions that are kept of a model, the current one first. */
  async versions(model: string): Promise<number[]> {
    const slot = await this.slot(model);
    return [slot.current, slot.previous].flatMap((kept) => (kept ? [kept.version] : []));
  }

  close(): void {
    this.database.close();
  }
}

/** A slot as it was kept: an earlier release's has fewer fields, and a model that nothing is kept of has none. */
function whole(model: string, kept: Partial<Slot> | undefined): Slot {
  return { model, current: null, previous: null, halted: [], draw: null, ...kept };
}

/** As `device_runtime.bundles` orders them: to go back, old weights are promoted as a new version. */
function isOlder(kept: Kept, installed: Kept): boolean {
  if (kept.version !== installed.version) return kept.version < installed.version;
  return kept.created_ms < installed.created_ms;
}
