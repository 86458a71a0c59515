// What a device keeps of its own: each inference with the label that came later, in IndexedDB.
//
// A record's values (entity, request and device features, what the server contributed, prediction, label) are
// encrypted with AES-GCM under a key of the host app, which scripts cannot export; its id, its time and its size are
// not, since retention goes by them. They are bound to the values, so that records cannot be exchanged.

import { type Answer, slotsOf } from "./answers.ts";
import type { Manifest } from "./bundle.ts";
import type { Ask } from "./client.ts";
import { BadRequest, StoreError } from "./errors.ts";
import { isText, type Raw } from "./features.ts";
import { committed, deleteDatabase, openDatabase, reply } from "./idb.ts";

/** One inference as the person may see it. */
export interface Kept {
  readonly id: string;
  readonly at_ms: number;
  /** Of the pair that predicted: another version's embeddings mean something else. */
  readonly version: number;
  readonly entity: string;
  readonly request: Readonly<Record<string, string | number | null>>;
  readonly features: Readonly<Record<string, string | number | null>>;
  /**
   * What the server contributed: its embedding, or its slots, null where a value is missing, where devices train its
   * tower too. Empty where it did not say.
   */
  readonly server: readonly (number | null)[];
  readonly feature_age_ms: number;
  readonly prediction: number | null;
  readonly label: number | null;
}

/** What a training program is fed with: rows of this version with label and the server's part, the oldest first. */
export interface Examples {
  readonly server: readonly (readonly (number | null)[])[];
  readonly features: readonly Readonly<Record<string, string | number | null>>[];
  readonly labels: readonly number[];
}

interface Row {
  readonly id: string;
  readonly at_ms: number;
  readonly bytes: number;
  readonly iv: Uint8Array<ArrayBuffer>;
  readonly sealed: ArrayBuffer;
}

const ENFORCE_MS = 60_000;
const GENUINE = new Set(["none", "cached"]); // whose server side is the entity's own; what a fallback stands in for is not
const OVERHEAD = 160; // bytes of a record beside its values, roughly as browsers keep it

/** The store of one model. */
export class Store {
  private readonly database: IDBDatabase;
  private readonly key: CryptoKey;
  private readonly manifest: Manifest;
  private bytes = 0;
  private enforcedMs = -Infinity;

  private constructor(database: IDBDatabase, key: CryptoKey, manifest: Manifest) {
    this.database = database;
    this.key = key;
    this.manifest = manifest;
  }

  /** Name of the IndexedDB database of a model's store. */
  static database(model: string): string {
    return `hybrid-store-${model}`;
  }

  /**
   * Opens the model's store, made at first use, and deletes what is too old.
   *
   * @param key AES-GCM of the host app, not extractable: see `keptKey`.
   */
  static async open(manifest: Manifest, key: CryptoKey, now = Date.now()): Promise<Store> {
    if (key.extractable) throw new StoreError("the store's key must not be extractable: a script could send it away");
    const database = await openDatabase(Store.database(manifest.model), 1, (made) => {
      made.createObjectStore("inferences", { keyPath: "id" }).createIndex("age", ["at_ms", "bytes"]);
    });
    const store = new Store(database, key, manifest);
    await store.enforce(now);
    return store;
  }

  /**
   * Keeps one inference and returns its id.
   *
   * @throws BadRequest a value is of the wrong type for its feature. Nothing is kept.
   * @throws StoreError the browser has no room. Nothing is kept.
   */
  async inference(ask: Ask, answer: Answer, now = Date.now()): Promise<string> {
    const { features, request, keeping } = this.manifest;
    const kept: Kept = {
      id: crypto.randomUUID(),
      at_ms: now,
      version: this.manifest.version,
      entity: ask.entity,
      request: typed(ask.request, request),
      features: typed(
        ask.features,
        new Map([...features.transforms].map(([name, t]) => [name, isText(t) ? "text" : "number"])),
      ),
      server: GENUINE.has(answer.fallback) ? contributed(answer, this.manifest) : [],
      feature_age_ms: answer.featureAgeMs,
      prediction: Number.isNaN(answer.prediction) ? null : answer.prediction,
      label: null,
    };
    const row = await this.seal(kept);
    await this.write((rows) => void rows.add(row));
    this.bytes += row.bytes;
    if (this.bytes > keeping.bytes || now - this.enforcedMs > ENFORCE_MS) await this.enforce(now);
    return kept.id;
  }

  /**
   * Joins a label to the inference it is about: one by id, or the newest one about an entity.
   *
   * @param value 0 or 1.
   * @param atMs when the event happened; it counts if that is within the model's label window from the inference.
   * @returns id of the inference; null where there is none that it belongs to.
   */
  async label(value: 0 | 1, atMs: number, of: { inference: string } | { entity: string }): Promise<string | null> {
    if (value !== 0 && value !== 1) throw new BadRequest(`a label must be 0 or 1, got a ${typeof value}`);
    // Decrypting takes longer than a transaction lives; another tab must not write in between.
    return navigator.locks.request(Store.database(this.manifest.model), async () => {
      const windowMs = (this.manifest.keeping.label_window_s ?? Infinity) * 1000;
      const within = (row: { at_ms: number }) => row.at_ms <= atMs && atMs - row.at_ms <= windowMs;
      const candidates = (await this.rows()).filter(within).reverse();
      for (const row of candidates) {
        if ("inference" in of && row.id !== of.inference) continue;
        const kept = await this.unseal(row);
        if ("entity" in of && kept.entity !== of.entity) continue;
        const labelled = await this.seal({ ...kept, label: value });
        await this.write((rows) => void rows.put(labelled));
        return row.id;
      }
      return null;
    });
  }

  /** All that is kept, the oldest first. */
  async all(): Promise<Kept[]> {
    return Promise.all((await this.rows()).map((row) => this.unseal(row)));
  }

  /**
   * The newest examples of this version; those without an event in the label window count as the model declares.
   *
   * @param newest at most so many.
   */
  async examples(newest: number, now = Date.now()): Promise<Examples> {
    const { label_window_s, label_absent } = this.manifest.keeping;
    const labelOf = (kept: Kept): number | null => {
      if (kept.label !== null || label_window_s === null) return kept.label;
      return now - kept.at_ms > label_window_s * 1000 ? label_absent : null;
    };
    const usable = (await this.all()).filter((kept) => {
      const width = slotsOf(this.manifest) || this.manifest.server_embedding;
      const fits = kept.version === this.manifest.version && kept.server.length === width;
      return fits && labelOf(kept) !== null;
    });
    const chosen = newest > 0 ? usable.slice(-newest) : [];
    return {
      server: chosen.map((kept) => kept.server),
      features: chosen.map((kept) => kept.features),
      labels: chosen.map((kept) => labelOf(kept)!),
    };
  }

  /** Deletes what is older than the model keeps, and the oldest beyond its bytes; returns how many. */
  async enforce(now = Date.now()): Promise<number> {
    const { seconds, bytes } = this.manifest.keeping;
    const transaction = this.database.transaction("inferences", "readwrite", { durability: "strict" });
    const rows = transaction.objectStore("inferences");
    let [total, deleted] = [0, 0];
    await new Promise<void>((resolve, reject) => {
      const request = rows.index("age").openKeyCursor(null, "prev"); // the newest first
      request.onerror = () => reject(request.error);
      request.onsuccess = () => {
        const cursor = request.result;
        if (!cursor) return resolve();
        const [atMs, size] = cursor.key as [number, number];
        // As far in the future as it may be in the past: a clock that was wrong stamped it.
        if (Math.abs(now - atMs) > seconds * 1000 || total + size > bytes) {
          rows.delete(cursor.primaryKey);
          deleted++;
        } else {
          total += size;
        }
        cursor.continue();
      };
    });
    await committed(transaction);
    [this.bytes, this.enforcedMs] = [total, now];
    return deleted;
  }

  /** How many inferences are kept, and in about how many bytes. */
  async size(): Promise<{ inferences: number; bytes: number }> {
    const rows = await this.rows();
    return { inferences: rows.length, bytes: rows.reduce((sum, row) => sum + row.bytes, 0) };
  }

  /** For the person: all that is kept, readable. */
  async export(now = Date.now()): Promise<{ model: string; exported_ms: number; inferences: readonly Kept[] }> {
    return { model: this.manifest.model, exported_ms: now, inferences: await this.all() };
  }

  /** Deletes one inference, or all about an entity; returns how many. */
  async forgetOne(of: { inference: string } | { entity: string }): Promise<number> {
    const ids = "inference" in of ? [of.inference] : [];
    if ("entity" in of) {
      for (const kept of await this.all()) if (kept.entity === of.entity) ids.push(kept.id);
    }
    await this.write((rows) => ids.forEach((id) => rows.delete(id)));
    return ids.length;
  }

  /** Deletes the store and closes it. The host deletes its key besides: what a disk may still hold says nothing then. */
  async forget(): Promise<void> {
    await this.write((rows) => void rows.clear());
    this.close();
    await deleteDatabase(Store.database(this.manifest.model));
  }

  close(): void {
    this.database.close();
  }

  private async rows(): Promise<Row[]> {
    const rows = this.database.transaction("inferences").objectStore("inferences");
    return (await reply(rows.index("age").getAll())) as Row[];
  }

  private async write(change: (rows: IDBObjectStore) => void): Promise<void> {
    try {
      const transaction = this.database.transaction("inferences", "readwrite", { durability: "strict" });
      change(transaction.objectStore("inferences"));
      await committed(transaction);
    } catch (error) {
      const name = error instanceof DOMException ? error.name : "";
      if (name === "QuotaExceededError") throw new StoreError("the browser has no room for the store: nothing was kept");
      throw new StoreError(`the store cannot be written (${name || "closed"})`);
    }
  }

  private async seal(kept: Kept): Promise<Row> {
    const { id, at_ms, ...values } = kept;
    const iv = crypto.getRandomValues(new Uint8Array(12));
    const plain = new TextEncoder().encode(JSON.stringify(values));
    const additionalData = this.bound(id, at_ms);
    const sealed = await crypto.subtle.encrypt({ name: "AES-GCM", iv, additionalData }, this.key, plain);
    return { id, at_ms, bytes: sealed.byteLength + OVERHEAD, iv, sealed };
  }

  private async unseal(row: Row): Promise<Kept> {
    const { id, at_ms, iv, sealed } = row;
    try {
      const additionalData = this.bound(id, at_ms);
      const plain = await crypto.subtle.decrypt({ name: "AES-GCM", iv, additionalData }, this.key, sealed);
      return { id, at_ms, ...(JSON.parse(new TextDecoder().decode(plain)) as Omit<Kept, "id" | "at_ms">) };
    } catch {
      throw new StoreError("the store was written with another key, or was changed: forget it to begin anew");
    }
  }

  private bound(id: string, atMs: number): Uint8Array<ArrayBuffer> {
    return new TextEncoder().encode(JSON.stringify([this.manifest.model, id, atMs]));
  }
}

/**
 * A key for hosts that have no keystore: AES-GCM, made at first use and kept in IndexedDB, from where scripts can use
 * it but not read it. Whoever has the browser's files has it too, so a host with a better place uses that.
 */
export async function keptKey(database: string): Promise<CryptoKey> {
  const made = await crypto.subtle.generateKey({ name: "AES-GCM", length: 256 }, false, ["encrypt", "decrypt"]);
  const keys = await openDatabase(database, 1, (opened) => void opened.createObjectStore("keys"));
  try {
    const transaction = keys.transaction("keys", "readwrite", { durability: "strict" });
    const store = transaction.objectStore("keys");
    const found = (await reply(store.get("store"))) as CryptoKey | undefined;
    if (!found) store.put(made, "store"); // in the same transaction: of two tabs one makes it
    await committed(transaction);
    return found ?? made;
  } finally {
    keys.close();
  }
}

/** Deletes it. */
export function forgetKey(database: string): Promise<void> {
  return deleteDatabase(database);
}

/** As JSON has it; where slots are what trains, never an embedding in their place. */
function contributed({ serverEmbedding, serverSlots }: Answer, manifest: Manifest): (number | null)[] {
  if (!slotsOf(manifest)) return [...serverEmbedding];
  return [...serverSlots].map((value) => (Number.isNaN(value) ? null : value));
}

function typed(
  values: ReadonlyMap<string, Raw>,
  kinds: ReadonlyMap<string, "text" | "number">,
): Record<string, string | number | null> {
  const unknown = [...values.keys()].filter((name) => !kinds.has(name));
  if (unknown.length) throw new BadRequest(`features ${unknown.join(", ")} are none of the bundle's`);
  return Object.fromEntries(
    [...kinds].map(([name, kind]) => {
      const raw = values.get(name);
      if (raw === null || raw === undefined || Number.isNaN(raw)) return [name, null];
      const value = typeof raw === "boolean" ? Number(raw) : raw;
      if (typeof value !== (kind === "text" ? "string" : "number")) {
        throw new BadRequest(`feature '${name}' must be ${kind === "text" ? "text" : "a number"}, got ${typeof raw}`);
      }
      return [name, value];
    }),
  );
}
