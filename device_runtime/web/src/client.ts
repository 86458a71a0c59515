// The inference client: asks the gateway about one row, as the bundle's model declares where the embeddings meet.
//
// On the server: it embeds the row, releases the embedding and is told a prediction. On the device: it is told the
// server's embedding and predicts itself. What leaves is built in one place, `requestBody`: the entity, the request
// features and, where the server merges, the embedding as released. Nothing else of a row does. Beside it goes an API
// key, where there is one, and what a browser tells every site: its name, its languages, its address.

import { type Answer, NO_ANSWER, readAnswer, slotsOf, TIMEOUT, UNREACHABLE } from "./answers.ts";
import { type Bundle, type Manifest, MAX_BYTES } from "./bundle.ts";
import { BundleError, ConfigError, HybridError, Unauthenticated } from "./errors.ts";
import type { Raw } from "./features.ts";
import { clipAndNoise, type Noise, systemNoise } from "./mechanisms.ts";
import { mergeOnDevice } from "./merge.ts";
import { EmbedProgram, PredictProgram } from "./program.ts";

export const ATTEMPTS = 3;
export const TIMEOUT_MS = 10_000; // beyond a gateway's deadline of 5 s, whose answer says why
const BACKOFF_MS = 50; // before the second attempt; doubles
const HEADER_LENGTH = "Inference-Header-Content-Length";
const ALWAYS = ["version", "feature_age_ms", "merged", "status", "fallback"];
// What a retry may find gone. Stale features and drift, 503 as well, stay so; a rate limit does for longer than we wait.
const PASSING = new Set(["503 unavailable", "429 overloaded"]);
const API_KEY = /^[A-Za-z0-9._~+/-]+=*$/;

/** What a person's row is asked about with. */
export interface Ask {
  /** Join key of the server's features. */
  readonly entity: string;
  /** Request features, sent as they are; null where missing. */
  readonly request: ReadonlyMap<string, Raw>;
  /** Device features: they stay. */
  readonly features: ReadonlyMap<string, Raw>;
}

/** One request as it was given to the network, byte for byte. */
export interface Sent {
  readonly url: string;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: Uint8Array<ArrayBuffer>;
  /** Bytes of the JSON; raw float32 follow. */
  readonly headerLength: number;
}

export interface ClientOptions {
  /** For one attempt. */
  readonly timeoutMs?: number;
  /** For release "noised"; the browser's cryptographic generator unless a test says otherwise. */
  readonly noise?: Noise;
  /**
   * Whether to ask for what the server contributed; the model must declare it. That is its embedding, which a device
   * that merges has anyway, or its slots, where devices train the server tower too.
   */
  readonly contribution?: boolean;
  /** Shown to the gateway as bearer; over https, or on this machine. */
  readonly apiKey?: string;
  /** Unix time in milliseconds, UTC. */
  readonly now?: () => number;
  /** Told of each request before it leaves: what a person is shown. */
  readonly sending?: (sent: Sent) => void;
}

/** Asks a gateway for predictions of one version. */
export class InferenceClient {
  private readonly manifest: Manifest;
  private readonly program: EmbedProgram | PredictProgram;
  private readonly url: string;
  private readonly options: ClientOptions;
  private readonly authorization: Readonly<Record<string, string>>;
  private retries = 10; // a tenth of the requests, and a few to start with: retries must not multiply an outage

  /**
   * @param gateway base URL, absolute or of this origin.
   * @throws ConfigError a setting is wrong, or the program is not the one for the bundle's merge.
   */
  constructor(
    manifest: Manifest,
    program: EmbedProgram | PredictProgram,
    gateway: string | URL,
    options: ClientOptions = {},
  ) {
    if (program instanceof PredictProgram !== (manifest.merge === "device")) {
      throw new ConfigError(`program must be the one for merge='${manifest.merge}'`);
    }
    if (manifest.merge === "server" && !manifest.release) {
      throw new ConfigError("the bundle's release must be 'clear' or 'noised' for merge='server', got none");
    }
    if (manifest.merge === "device" && options.contribution && !slotsOf(manifest)) {
      throw new ConfigError(
        "contribution must be left out for merge='device' with this bundle: every answer is the server's embedding, " +
          "and devices train no server tower, which would need its slots",
      );
    }
    const base = new URL(gateway, globalThis.location?.href);
    if (!/^https?:$/.test(base.protocol)) throw new ConfigError("gateway must be an http:// or https:// URL");
    if (base.username || base.password) {
      throw new ConfigError("gateway must be a URL without user name and password; give an API key instead");
    }
    this.authorization = authorization(options.apiKey, base);
    this.manifest = manifest;
    this.program = program;
    this.options = options;
    const [model, version] = [encodeURIComponent(manifest.model), manifest.version];
    this.url = `${base.href.replace(/\/$/, "")}/v2/models/${model}/versions/${version}/infer`;
  }

  /**
   * Asks once; an answer always comes.
   *
   * @throws BadRequest a value is of the wrong type for its feature.
   * @throws BundleError the program does not give what its manifest says.
   * @throws Unauthenticated the gateway does not take the API key, or wants one.
   */
  async ask(ask: Ask): Promise<Answer> {
    const { manifest, program, options } = this;
    const started = performance.now();
    const inputs = manifest.features.inputs(ask.features);
    // Released once: fresh noise on a retry would be a second release of the same row.
    const released = program instanceof EmbedProgram ? this.release(await program.embed(inputs)) : null;
    const outputs = options.contribution ? outputsWithContribution(manifest) : [];
    const { body, headerLength } = requestBody(ask.entity, ask.request, manifest.request, released, outputs);
    let answer = await this.send(body, headerLength);
    if (program instanceof PredictProgram) {
      answer = await mergeOnDevice(manifest, program, answer, inputs, (options.now ?? Date.now)());
    }
    return { ...answer, latencyMs: performance.now() - started };
  }

  /** An embedding as the model declares that it leaves the device. */
  release(embedding: Float32Array): Float32Array {
    const { release } = this.manifest;
    if (release?.kind !== "noised") return embedding;
    return clipAndNoise(embedding, release.clip, release.sigma, this.options.noise ?? systemNoise);
  }

  private async send(body: Uint8Array<ArrayBuffer>, headerLength: number): Promise<Answer> {
    this.retries += 0.1;
    for (let attempt = 1; ; attempt++) {
      const answer = { ...(await this.attempt(body, headerLength)), attempts: attempt };
      const passing = PASSING.has(`${answer.httpStatus} ${answer.status}`);
      if (!passing || attempt === ATTEMPTS || this.retries < 1) return answer;
      this.retries -= 1;
      await new Promise((resolve) => setTimeout(resolve, BACKOFF_MS * 2 ** (attempt - 1)));
    }
  }

  private async attempt(body: Uint8Array<ArrayBuffer>, headerLength: number): Promise<Answer> {
    const headers = {
      "Content-Type": "application/octet-stream",
      [HEADER_LENGTH]: String(headerLength),
      ...this.authorization,
    };
    this.options.sending?.({ url: this.url, headers, body, headerLength });
    let [response, text]: [Response | null, string] = [null, ""];
    try {
      response = await fetch(this.url, { ...PRIVATE, method: "POST", headers, body, signal: this.deadline() });
      text = await response.text();
    } catch (error) {
      // A browser does not say whether anything was sent, so nothing is sent again.
      const late = error instanceof DOMException && error.name === "TimeoutError";
      const why = late ? "the gateway did not answer in time" : "the gateway cannot be reached";
      return { ...NO_ANSWER, status: late ? TIMEOUT : UNREACHABLE, error: why };
    }
    if (response.status === 401) throw refused(this.options.apiKey !== undefined);
    const read = readAnswer(response.status, text, this.manifest, this.options.contribution);
    const seconds = Number(response.headers.get("Retry-After") ?? NaN);
    const retryAfterS = Number.isFinite(seconds) ? seconds : null;
    return { ...NO_ANSWER, httpStatus: response.status, retryAfterS, ...read };
  }

  private deadline(): AbortSignal {
    return AbortSignal.timeout(this.options.timeoutMs ?? TIMEOUT_MS);
  }
}

/** What is asked for by name where an example is to be kept. */
export function outputsWithContribution(manifest: Manifest): string[] {
  const needed = manifest.merge === "device" ? ["server_embedding", "expires_ms"] : ["prediction"];
  return [...needed, ...ALWAYS, slotsOf(manifest) ? "server_slots" : "server_embedding"];
}

// No cookie, no address of the page, and no other host that an answer names: who sees an embedding is declared.
const PRIVATE: RequestInit = {
  credentials: "omit",
  referrerPolicy: "no-referrer",
  redirect: "error",
  cache: "no-store",
};

/**
 * An OIP v2 inference request of one row: all that leaves the device.
 *
 * @param kinds request feature -> "text" or "number", in the manifest's order.
 * @param released (d,); null where the device merges.
 * @param outputs asked for by name; none: what the model gives to everybody.
 * @returns JSON followed by the embedding's bytes, and the length of the JSON.
 */
export function requestBody(
  entity: string,
  request: ReadonlyMap<string, Raw>,
  kinds: ReadonlyMap<string, "text" | "number">,
  released: Float32Array | null,
  outputs: readonly string[] = [],
): { body: Uint8Array<ArrayBuffer>; headerLength: number } {
  const inputs: object[] = [{ name: "entity", datatype: "BYTES", shape: [1], data: [entity] }];
  for (const [name, kind] of kinds) {
    inputs.push({ name, datatype: kind === "text" ? "BYTES" : "FP32", shape: [1], data: [request.get(name) ?? null] });
  }
  let raw = new Uint8Array();
  if (released) {
    raw = new Uint8Array(4 * released.length);
    const view = new DataView(raw.buffer);
    released.forEach((value, place) => view.setFloat32(4 * place, value, true));
    const parameters = { binary_data_size: raw.length };
    inputs.push({ name: "device_embedding", datatype: "FP32", shape: [1, released.length], parameters });
  }
  const document = outputs.length ? { inputs, outputs: outputs.map((name) => ({ name })) } : { inputs };
  const header = new TextEncoder().encode(JSON.stringify(document));
  const body = new Uint8Array(header.length + raw.length);
  body.set(header);
  body.set(raw, header.length);
  return { body, headerLength: header.length };
}

/** The header that shows an API key to a gateway; none without one. The error does not hold the key. */
function authorization(apiKey: string | undefined, gateway: URL): Record<string, string> {
  if (apiKey === undefined) return {};
  if (!API_KEY.test(apiKey) || apiKey.length > 8192) {
    throw new ConfigError("the API key must be one line of 1 to 8192 letters, digits and any of . _ ~ + / -");
  }
  const here = /^(localhost|127(\.\d{1,3}){3}|\[::1\])$/.test(gateway.hostname);
  if (gateway.protocol !== "https:" && !here) {
    throw new ConfigError("gateway must be an https:// URL, or of this machine, where an API key is sent");
  }
  return { Authorization: `Bearer ${apiKey}` };
}

function refused(shown: boolean): Unauthenticated {
  return new Unauthenticated(
    shown
      ? "the gateway does not know the API key, or no longer (401): it must be one that the gateway was given"
      : "the gateway asks for an API key (401): give the client one",
  );
}

/** How something is fetched from a gateway. */
export interface Fetching {
  /** Of a client, where the gateway asks for one; sent over https, or on this machine, only. */
  readonly apiKey?: string;
  /** For each wait on the network: a gateway that says nothing must not keep the installed bundle from going on. */
  readonly timeoutMs?: number;
}

/**
 * The bundle of a model from its gateway; null where it is still the one with `etag`.
 *
 * A download that breaks off is resumed from where it was, as long as the gateway has the same bytes. Only a tag that is
 * the bytes' SHA-256 is given, as the gateway's is: one that says more could tell devices apart at their next download.
 *
 * @param options `version`: which; null: the default.
 * @throws BundleError it cannot be had, or is too large.
 * @throws Unauthenticated the gateway does not take the API key, or wants one.
 */
export async function download(
  gateway: string | URL,
  model: string,
  etag: string | null = null,
  options: Fetching & { readonly version?: number | null } = {},
): Promise<{ data: Uint8Array<ArrayBuffer>; etag: string | null } | null> {
  const version = options.version == null ? "" : `/versions/${options.version}`;
  const source = new Source(gateway, `/v2/models/${encodeURIComponent(model)}${version}/bundle`, options);
  for (let attempt = 1; ; attempt++) {
    const { got, tag } = source;
    const headers: Record<string, string> = etag && !got ? { "If-None-Match": etag } : {};
    if (got && tag) Object.assign(headers, { Range: `bytes=${got}-`, "If-Range": tag });
    try {
      const status = await source.read(headers, MAX_BYTES, "a bundle");
      if (status === 304) return null;
      const data = source.data();
      return { data, etag: (await tagOf(data)) === source.tag ? source.tag : null };
    } catch (error) {
      if (error instanceof HybridError) throw error;
      if (attempt === ATTEMPTS) throw new BundleError("the bundle cannot be fetched: the gateway cannot be reached");
    }
  }
}

/**
 * A small answer of the gateway, whole; null: it has none there (404).
 *
 * @throws BundleError it cannot be had, or has more than `most` bytes.
 * @throws Unauthenticated the gateway does not take the API key, or wants one.
 */
export async function fetched(
  gateway: string | URL,
  path: string,
  most: number,
  options: Fetching = {},
): Promise<Uint8Array<ArrayBuffer> | null> {
  const source = new Source(gateway, path, options);
  try {
    return (await source.read({}, most, "such an answer", 404)) === 404 ? null : source.data();
  } catch (error) {
    if (error instanceof HybridError) throw error;
    throw new BundleError("the gateway cannot be reached");
  }
}

/** Something at a gateway, as far as it is here. */
class Source {
  private readonly url: URL;
  private readonly shown: Record<string, string>;
  private readonly timeoutMs: number;
  private chunks: Uint8Array[] = [];
  got = 0;
  tag: string | null = null;

  constructor(gateway: string | URL, path: string, { apiKey, timeoutMs = TIMEOUT_MS }: Fetching) {
    const base = new URL(gateway, globalThis.location?.href);
    this.url = new URL(base.href.replace(/\/$/, "") + path);
    this.shown = authorization(apiKey, base);
    this.timeoutMs = timeoutMs;
  }

  /**
   * Reads one answer behind what is here already; anything but a 206 begins anew.
   *
   * @returns its status: 200, 206, or 304 or `allowed`, of which nothing is read.
   */
  async read(headers: Readonly<Record<string, string>>, most: number, what: string, allowed = 304): Promise<number> {
    const silent = new AbortController();
    const wait = () => setTimeout(() => silent.abort(), this.timeoutMs);
    let waiting = wait();
    try {
      const response = await fetch(this.url, { ...PRIVATE, headers: { ...this.shown, ...headers }, signal: silent.signal });
      if (response.status === 304 || response.status === allowed) return response.status;
      if (response.status === 401) throw refused("Authorization" in this.shown);
      if (response.status !== 206) [this.chunks, this.got] = [[], 0];
      if (!response.ok || !response.body) throw await unfetched(response);
      this.tag = response.headers.get("ETag");
      const reader = response.body.getReader();
      for (let read = await reader.read(); !read.done; read = await reader.read()) {
        clearTimeout(waiting);
        waiting = wait();
        this.got += read.value.length;
        if (this.got > most) {
          void reader.cancel();
          throw new BundleError(`${what} has at most ${most} bytes, and this one has more`);
        }
        this.chunks.push(read.value);
      }
      return response.status;
    } finally {
      clearTimeout(waiting);
    }
  }

  data(): Uint8Array<ArrayBuffer> {
    return joined(this.chunks, this.got);
  }
}

/** A gateway's tag of these bytes. Another kind of tag could be this device's own: it is not kept, nor shown again. */
async function tagOf(data: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return `"${Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("")}"`;
}

async function unfetched(response: Response): Promise<BundleError> {
  let why = `status ${response.status}`;
  try {
    why = String(((await response.json()) as { error?: unknown }).error ?? why).slice(0, 500);
  } catch {
    // no JSON: the status must do
  }
  return new BundleError(`the bundle cannot be fetched: ${why}`);
}

function joined(chunks: readonly Uint8Array[], length: number): Uint8Array<ArrayBuffer> {
  const data = new Uint8Array(length);
  let at = 0;
  for (const chunk of chunks) {
    data.set(chunk, at);
    at += chunk.length;
  }
  return data;
}

/** A client and the program it runs, of one bundle. */
export async function clientOf(bundle: Bundle, gateway: string | URL, options: ClientOptions = {}): Promise<InferenceClient> {
  const program = bundle.manifest.merge === "server" ? await EmbedProgram.load(bundle) : await PredictProgram.load(bundle);
  return new InferenceClient(bundle.manifest, program, gateway, options);
}
