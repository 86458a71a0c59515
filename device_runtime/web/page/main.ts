// The demo page: a host app around the browser device.

import { type Answer, answered } from "../src/answers.ts";
import { Bundles, type Installed, type Manifest, trustedKey } from "../src/bundle.ts";
import { type Ask, clientOf, type InferenceClient } from "../src/client.ts";
import { decide, POLICY, readBrowser, REASONS } from "../src/eligibility.ts";
import { HybridError } from "../src/errors.ts";
import type { Raw } from "../src/features.ts";
import { programOf, useRuntime } from "../src/program.ts";
import { update } from "../src/rollout.ts";
import { forgetKey, type Kept, keptKey, Store } from "../src/store.ts";
import { at, count, h, percent, size } from "./dom.ts";
import { choice, type Control, controlOf, figure, somebody, written } from "./form.ts";
import { Requests } from "./sent.ts";

/** What `hybrid page` tells the page beside the bundle. */
interface Config {
  readonly model: string;
  /** The host app's key, PEM: a bundle that it did not sign is refused. */
  readonly trust: string;
  readonly entity: string;
  readonly entities: readonly { readonly key: string; readonly about: string }[];
  readonly choices: Readonly<Record<string, readonly string[]>>;
  readonly disclosure: { readonly delta: number; readonly epsilons: readonly (number | null)[] } | null;
}

const KEY = "hybrid-page-key-"; // and the model: forgetting one must not leave the others without theirs
const GATEWAY = "gateway";
const PAUSE_MS = 250; // after the last change, before it is asked about
const RECORDS = 20;

class Page {
  private readonly config: Config;
  private readonly bundles: Bundles;
  private readonly requests: Requests;
  private bundle!: Installed;
  private client!: InferenceClient;
  private store!: Store;
  private readonly own = new Map<string, Control>();
  private readonly told = new Map<string, Control>();
  private entity!: Control;
  private latest: string | null = null;
  private waiting: ReturnType<typeof setTimeout> | undefined;
  private busy = false;
  private again = false;

  constructor(config: Config, bundles: Bundles) {
    this.config = config;
    this.bundles = bundles;
    this.requests = new Requests(config.disclosure);
  }

  private get manifest(): Manifest {
    return this.bundle.manifest;
  }

  /** Shows everything; asks once. */
  async start(): Promise<void> {
    await this.update();
    this.listen();
    const kept = await this.store.all();
    this.fill(kept.at(-1));
    await this.showKept();
    await this.showEligible();
    await this.ask();
  }

  /** Fetches the bundle that the gateway serves now, where it is another; without a gateway the installed one goes on. */
  async update(): Promise<void> {
    const trusted = await trustedKey(this.config.trust);
    try {
      const runs = async (bundle: Parameters<typeof programOf>[0]) => (await programOf(bundle)).release();
      this.bundle = await update(this.bundles, GATEWAY, this.config.model, trusted, { runs });
    } catch (error) {
      const installed = await this.bundles.current(this.config.model, trusted).catch(() => null);
      if (!installed || !(error instanceof HybridError)) throw error;
      notice(`${sentence(error)} The bundle that is installed, of version ${installed.manifest.version}, goes on.`);
      this.bundle = installed;
    }
    this.client = await clientOf(this.bundle, GATEWAY, { sending: (sent) => this.requests.add(sent) });
    await this.openStore();
    this.describe();
    this.makeForms();
  }

  private async openStore(): Promise<void> {
    this.store?.close();
    this.store = await Store.open(this.manifest, await keptKey(KEY + this.config.model));
  }

  private describe(): void {
    const { model, version, merge, features, keeping } = this.manifest;
    const where =
      merge === "server"
        ? "It computes an embedding of what you set; the server joins that with its own side and predicts."
        : "The server sends its side here, and this device predicts: nothing of what you set is sent in any form.";
    at("about").textContent = `Model ${model}, version ${version}, runs in this tab. ${where}`;
    at("disclosure").textContent = disclosure(this.manifest, this.config);
    const days = (keeping.seconds / 86_400).toPrecision(3);
    at("stays").textContent =
      `Your ${count(features.names.length, "feature")}, what was predicted, and what happened: encrypted in this ` +
      `browser, for ${Number(days)} days and ${size(keeping.bytes)} at most.`;
    const files = [...this.bundle.programs.keys()].join(", ");
    at("foot").textContent = `Bundle of version ${version} (${files}), its signature verified in this browser.`;
  }

  private makeForms(): void {
    const form = at("private");
    const before = new Map([...this.own].map(([name, control]) => [name, control.read()]));
    this.own.clear();
    form.replaceChildren();
    [...this.manifest.features.transforms].forEach(([name, transform], place) => {
      const control = controlOf(name, transform, `own-${place}`);
      control.write(before.get(name) ?? null);
      this.own.set(name, control);
      form.append(control.element);
    });
    this.makePublic();
  }

  private makePublic(): void {
    const form = at("public");
    const { entities, entity, choices } = this.config;
    const before = this.entity?.read() ?? entities[0]?.key ?? "";
    const list = h("datalist", { id: "entities" }, ...entities.map(({ key, about }) => h("option", { value: key }, about)));
    this.entity = written(entity, "entity", "", "entities");
    this.entity.write(before);
    this.entity.element.append(h("span", { class: "hint", id: "entity-hint", role: "status" }));
    const earlier = new Map([...this.told].map(([name, control]) => [name, control.read()]));
    this.told.clear();
    [...this.manifest.request].forEach(([name, kind], place) => {
      const [id, words] = [`told-${place}`, Object.hasOwn(choices, name) ? choices[name] : undefined];
      const control =
        kind === "number" ? figure(name, id, "a number") : words ? choice(name, id, words, true) : written(name, id, "any text");
      control.write(earlier.get(name) ?? words?.[0] ?? null);
      this.told.set(name, control);
    });
    form.replaceChildren(this.entity.element, list, ...[...this.told.values()].map((control) => control.element));
    this.showEntity();
  }

  private listen(): void {
    for (const id of ["private", "public"]) {
      at(id).addEventListener("submit", (event) => event.preventDefault());
      at(id).addEventListener("input", () => this.changed());
    }
    at("ask").addEventListener("click", () => void this.ask());
    at("example").addEventListener("click", () => {
      for (const [name, transform] of this.manifest.features.transforms) this.own.get(name)!.write(somebody(transform));
      this.changed();
    });
    at("clear").addEventListener("click", () => {
      for (const control of this.own.values()) control.write(null);
      this.changed();
    });
    for (const button of at("happened").querySelectorAll("button")) {
      button.addEventListener("click", () => void guarded(() => this.happened(button.dataset["label"] === "1" ? 1 : 0)));
    }
    at("export").addEventListener("click", () => void guarded(() => this.export()));
    at("forget").addEventListener("click", () => void guarded(() => this.forget()));
    at("consent").addEventListener("change", () => void this.showEligible());
    document.addEventListener("visibilitychange", () => void this.showEligible());
  }

  private fill(kept: Kept | undefined): void {
    if (!kept) return;
    for (const [name, control] of this.own) control.write(kept.features[name] ?? null);
    for (const [name, control] of this.told) control.write(kept.request[name] ?? null);
    this.entity.write(kept.entity);
    this.showEntity();
  }

  private changed(): void {
    this.showEntity();
    clearTimeout(this.waiting);
    if (at<HTMLInputElement>("live").checked) this.waiting = setTimeout(() => void this.ask(), PAUSE_MS);
  }

  private showEntity(): void {
    const key = this.entity.read();
    const known = this.config.entities.find((each) => each.key === key);
    at("entity-hint").textContent = known ? `The server knows: ${known.about}` : "A key that the server may know.";
  }

  /** Asks about what is set now; what changes meanwhile is asked about next. */
  async ask(): Promise<void> {
    clearTimeout(this.waiting);
    if (this.busy) {
      this.again = true;
      return;
    }
    this.busy = true;
    try {
      do {
        this.again = false;
        await guarded(() => this.askOnce());
      } while (this.again);
    } finally {
      this.busy = false;
    }
  }

  private async askOnce(): Promise<void> {
    const [features, request] = [readAll(this.own), readAll(this.told)];
    if (!features || !request) return this.unsent("A field holds no number: nothing was sent.");
    const entity = String(this.entity.read() ?? "");
    if (!entity) return this.unsent(`Say what it is about, under “The server is told” (${this.config.entity}): nothing was sent.`);
    const ask: Ask = { entity, request, features };
    const answer = await this.client.ask(ask);
    try {
      this.show(answer);
      this.latest = answered(answer) ? await this.store.inference(ask, answer) : null; // nothing can have happened to no prediction
      at("happened").hidden = this.latest === null;
      at("joined").textContent = "";
      await this.showKept();
    } finally {
      this.requests.answered(answer); // the last sign: what is shown and kept is of this one
    }
  }

  /** No prediction is shown, so nothing that happened is joined to the one before. */
  private unsent(why: string): void {
    this.latest = null;
    for (const id of ["notice", "happened"]) at(id).hidden = true;
    outcome(why, NaN);
  }

  private show(answer: Answer): void {
    at("notice").hidden = true;
    if (!answered(answer)) {
      outcome("No prediction.", NaN);
      const retry = h("button", { type: "button" }, answer.status === "update_required" ? "Fetch the new bundle" : "Ask again");
      retry.addEventListener("click", () =>
        void guarded(async () => {
          if (answer.status === "update_required") await this.update();
          await this.ask();
        }),
      );
      notice(explained(answer), retry);
      return;
    }
    const age = answer.featureAgeMs < 0 ? "" : `, with features of the server that are ${ago(answer.featureAgeMs)} old`;
    const where = answer.merged === "device" ? "on this device" : "on the server";
    const instead = answer.fallback === "none" ? "" : ` One side was missing (${answer.status}): "${answer.fallback}" answered.`;
    const text = `Merged ${where} by version ${answer.version} in ${answer.latencyMs.toFixed(0)} ms${age}.${instead}`;
    outcome(text, answer.prediction);
  }

  private async happened(label: 0 | 1): Promise<void> {
    if (this.latest === null) return;
    const joined = await this.store.label(label, Date.now(), { inference: this.latest });
    at("joined").textContent = joined ? "Kept with this prediction, here." : "Too late for this prediction: not kept.";
    await this.showKept();
  }

  private async showKept(): Promise<void> {
    const [kept, { bytes }] = [await this.store.all(), await this.store.size()];
    const labelled = kept.filter((each) => each.label !== null).length;
    at("kept").textContent = kept.length
      ? `${count(kept.length, "inference")} kept, ${labelled} of them with what happened; ${size(bytes)}.`
      : "Nothing is kept.";
    const rows = kept.slice(-RECORDS).reverse().map((each) => this.record(each));
    const head = h("tr", {}, ...["when", "about", "predicted", "happened", "what you had set", ""].map(heading));
    const table = h("table", {}, h("caption", { class: "small" }, `The latest ${rows.length}`), h("thead", {}, head), h("tbody", {}, ...rows));
    const box = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Kept inferences" }, table);
    const open = at("records").querySelector("details")?.open ?? false;
    const details = h("details", { open }, h("summary", {}, "Look at them"), box);
    at("records").replaceChildren(...(kept.length ? [details] : []));
  }

  private record(kept: Kept): HTMLElement {
    const when = new Date(kept.at_ms).toLocaleString("en-GB");
    const set = Object.entries(kept.features).filter(([, value]) => value !== null);
    const remove = h("button", { type: "button", class: "plain", "aria-label": `Forget the inference of ${when}` }, "Forget");
    remove.addEventListener("click", () =>
      void guarded(async () => {
        await this.store.forgetOne({ inference: kept.id });
        if (this.latest === kept.id) [this.latest, at("happened").hidden] = [null, true];
        await this.showKept();
      }),
    );
    return h(
      "tr",
      {},
      h("td", {}, when),
      h("td", {}, kept.entity),
      h("td", { class: "number" }, kept.prediction === null ? "" : percent(kept.prediction)),
      h("td", {}, kept.label === null ? "not known" : kept.label ? "yes" : "no"),
      h("td", { class: "set" }, set.map(([name, value]) => `${name}: ${value}`).join(", ") || "nothing"),
      h("td", {}, remove),
    );
  }

  private async export(): Promise<void> {
    const text = JSON.stringify(await this.store.export(), null, 2);
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    h("a", { href: url, download: `${this.config.model}-device.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  private async forget(): Promise<void> {
    await this.store.forget();
    await forgetKey(KEY + this.config.model); // what the disk may still hold says nothing without it
    this.latest = null;
    at("happened").hidden = true;
    await this.openStore();
    await this.showKept();
    at("kept").textContent = "All is forgotten: the store and its key are deleted, and an empty one has begun.";
  }

  private async showEligible(): Promise<void> {
    const consent = at<HTMLInputElement>("consent").checked;
    const readings = await readBrowser(consent);
    if (consent !== at<HTMLInputElement>("consent").checked) return; // asked again meanwhile
    const reasons = decide(POLICY, readings, [], Date.now());
    at("eligible").textContent = reasons.length ? "No, because" : "Yes: nothing speaks against it.";
    at("reasons").replaceChildren(...reasons.map((reason) => h("li", {}, REASONS[reason] ?? reason)));
  }
}

function readAll(controls: ReadonlyMap<string, Control>): Map<string, Raw> | null {
  const values = new Map<string, Raw>();
  for (const [name, control] of controls) {
    const value = control.read();
    if (value === undefined) return null;
    values.set(name, value);
  }
  return values;
}

function disclosure(manifest: Manifest, config: Config): string {
  const { merge, release } = manifest;
  if (merge === "device" || !release) {
    return "Nothing of the device: a request holds what the server is told anyway, the same whoever asks.";
  }
  if (release.kind === "clear") {
    return (
      `The embedding, in the clear, because: ${release.reason}. None of your features is in a request, but whoever ` +
      "holds the tower can try features until some give these numbers."
    );
  }
  const one = config.disclosure?.epsilons[0];
  const cost = one ? ` Each costs a local epsilon of ${one.toPrecision(3)} at delta ${config.disclosure!.delta}.` : "";
  const noise = `clipped to a norm of ${release.clip}, with Gaussian noise of ${release.sigma * release.clip} on each number`;
  return `The embedding, ${noise}: drawn anew for each request, so that the same features never look the same.${cost}`;
}

/** What the gateway refused, or did not say, as a sentence with what to do. */
function explained(answer: Answer): string {
  const wait = answer.retryAfterS === null ? "" : ` It says to ask again in ${count(answer.retryAfterS, "second")}.`;
  switch (answer.status) {
    case "unreachable":
      return "The gateway cannot be reached. `hybrid status` says whether the local stack is up; `hybrid page` starts it.";
    case "timeout":
      return "The gateway did not answer in time.";
    case "update_required":
      return "The server no longer serves this version: this device must fetch a newer bundle.";
    case "overloaded":
    case "rate_limited":
      return `The gateway takes no more requests for now (429): ${answer.error}.${wait}`;
    case "unknown_entity":
      return "The server knows nothing about what you named: choose another in “The server is told”.";
    case "bad_answer":
      return `The gateway answered something that this device does not use: ${answer.error}.`;
    default:
      return `The gateway gave no prediction (${answer.status}): ${answer.error}.${wait}`;
  }
}

function ago(ms: number): string {
  const hours = ms / 3_600_000;
  if (hours < 1) return count(Math.round(ms / 60_000), "minute");
  return hours < 48 ? count(Math.round(hours), "hour") : count(Math.round(hours / 24), "day");
}

function outcome(text: string, prediction: number): void {
  const known = !Number.isNaN(prediction);
  const shown = known ? percent(prediction) : "–";
  at("probability").textContent = shown;
  at("peek").textContent = `Prediction ${shown}`;
  at("fill").style.width = known ? `${prediction * 100}%` : "0";
  at("outcome").textContent = text;
}

function notice(text: string, ...more: HTMLElement[]): void {
  at("notice").replaceChildren(h("p", {}, text), ...(more.length ? [h("p", { class: "actions" }, ...more)] : []));
  at("notice").hidden = false;
}

function heading(text: string): HTMLElement {
  return text ? h("th", { scope: "col" }, text) : h("td");
}

/** What went wrong as a sentence on the page; our own mistakes go to the console besides. */
async function guarded(work: () => Promise<void>): Promise<void> {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof HybridError)) console.error(error);
    notice(sentence(error));
  }
}

function sentence(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return `${text.charAt(0).toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}`;
}

async function main(): Promise<void> {
  useRuntime(new URL("ort-wasm-simd-threaded.wasm", document.baseURI));
  const response = await fetch("config.json");
  const config = (await response.json()) as Config;
  document.title = `${config.model} on your device`;
  await new Page(config, await Bundles.open()).start();
}

void guarded(main);
