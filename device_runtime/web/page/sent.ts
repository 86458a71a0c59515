// What left the device, request by request: its bytes as they were given to the network, decoded and in hex.

import type { Answer } from "../src/answers.ts";
import type { Sent } from "../src/client.ts";
import { at, count, h, percent, size } from "./dom.ts";

const SHOWN = 25;

/** Shows requests, the newest first. */
export class Requests {
  private number = 0;
  private bytes = 0;
  private open: HTMLElement | null = null;
  private readonly epsilons: readonly (number | null)[];
  private readonly delta: number;

  /** @param disclosure the local epsilon of 1, 2, ... releases together, where they are noised. */
  constructor(disclosure: { readonly epsilons: readonly (number | null)[]; readonly delta: number } | null) {
    this.epsilons = disclosure?.epsilons ?? [];
    this.delta = disclosure?.delta ?? 0;
  }

  /** One request, before it leaves. */
  add(sent: Sent): void {
    this.number += 1;
    this.bytes += sent.body.length;
    const list = at("requests");
    for (const earlier of list.querySelectorAll("details")) earlier.open = false;
    this.open = h("span", { class: "small" }, "not answered yet");
    const time = new Date().toLocaleTimeString("en-GB");
    const title = h("summary", {}, `Request ${this.number}, ${time}, ${size(sent.body.length)}: `, this.open);
    list.prepend(h("details", { open: true }, title, ...this.decoded(sent), ...this.hex(sent)));
    while (list.children.length > SHOWN) list.lastElementChild!.remove();
    at("totals").textContent = this.total();
  }

  /** What became of the latest one. */
  answered(answer: Answer): void {
    if (!this.open) return;
    const known = Number.isNaN(answer.prediction) ? answer.status : percent(answer.prediction);
    this.open.textContent = `${known} in ${answer.latencyMs.toFixed(0)} ms`;
  }

  private total(): string {
    const sum = `${count(this.number, "request")} for predictions, ${size(this.bytes)}, left since this page was opened.`;
    if (!this.epsilons.length) return sum;
    const known = this.epsilons[this.number - 1];
    const all = known === undefined || known === null ? "more than this page reckons" : known.toPrecision(3);
    return `${sum} Together they cost a local epsilon of ${all} at delta ${this.delta}.`;
  }

  private decoded(sent: Sent): HTMLElement[] {
    const { pathname } = new URL(sent.url);
    const text = new TextDecoder().decode(sent.body.subarray(0, sent.headerLength));
    const lines = [`POST ${pathname}`, ...Object.entries(sent.headers).map(([name, value]) => shown(name, value))];
    const parts = [
      h("h3", {}, "Decoded"),
      h("pre", { class: "sent-headers small" }, lines.join("\n")),
      h("pre", { class: "sent-json" }, readable(text)),
    ];
    const raw = sent.body.subarray(sent.headerLength);
    if (!raw.length) return parts;
    const view = new DataView(raw.buffer, raw.byteOffset, raw.byteLength);
    const floats = Array.from({ length: raw.length / 4 }, (_, place) =>
      h(
        "li",
        {},
        h("span", {}, `device_embedding[${place}]`),
        h("span", {}, view.getFloat32(4 * place, true).toPrecision(6)),
        h("span", { class: "small" }, hexOf(raw.subarray(4 * place, 4 * place + 4))),
      ),
    );
    return [...parts, h("h3", {}, `The ${count(floats.length, "number")} after it`), h("ul", { class: "floats" }, ...floats)];
  }

  private hex(sent: Sent): HTMLElement[] {
    const width = matchMedia("(max-width: 40rem)").matches ? 8 : 16;
    const pre = h("pre", { class: "sent-hex" });
    for (let start = 0; start < sent.body.length; start += width) {
      const row = sent.body.subarray(start, start + width);
      const plain = Math.max(0, Math.min(row.length, sent.headerLength - start));
      pre.append(`${start.toString(16).padStart(4, "0")}  `);
      pre.append(hexOf(row.subarray(0, plain)), plain && plain < row.length ? " " : "");
      if (plain < row.length) pre.append(h("mark", {}, hexOf(row.subarray(plain))));
      pre.append(" ".repeat(3 * (width - row.length) + 2), ascii(row), "\n");
    }
    const name = `All ${count(sent.body.length, "byte")} of it`;
    const box = h("div", { class: "bytes", tabindex: 0, role: "region", "aria-label": name }, pre);
    const [marked, beside] = sent.body.length > sent.headerLength ? ["Marked: the embedding. ", "Beside it"] : ["", "Beside this"];
    const others = `${marked}${beside} a browser tells every site its own name, your languages and your address.`;
    return [h("h3", {}, name), box, h("p", { class: "small" }, others)];
  }
}

/** An API key is not for a screen. */
function shown(name: string, value: string): string {
  return name === "Authorization" ? `${name}: (your key)` : `${name}: ${value}`;
}

/** The same JSON, one tensor a line. */
function readable(text: string): string {
  const document = JSON.parse(text) as { inputs: object[]; outputs?: object[] };
  const lines = document.inputs.map((input) => `  ${JSON.stringify(input)}`).join(",\n");
  const outputs = document.outputs ? `, "outputs": ${JSON.stringify(document.outputs)}` : "";
  return `{"inputs": [\n${lines}\n]${outputs}}`;
}

function hexOf(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ");
}

function ascii(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => (byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : "·")).join("");
}
