// Forms made from the manifest: a select for a vocabulary, a field for a number or a text, each of which may be missing.

import type { Raw, Transform } from "../src/features.ts";
import { h } from "./dom.ts";

/** One feature's control. */
export interface Control {
  readonly element: HTMLElement;
  /** What it says now; undefined where what is typed cannot be read. */
  read(): Raw | undefined;
  write(value: Raw): void;
}

const MISSING = "missing";
const UNSEEN = "unseen";

/** A control for a feature of the device. */
export function controlOf(name: string, transform: Transform, id: string): Control {
  if (transform.kind === "categorical") return choice(name, id, transform.vocabulary, true);
  if (transform.kind === "hash") return written(name, id, "any text");
  const hint =
    transform.kind === "numeric"
      ? `around ${short(transform.mean)}, give or take ${short(transform.std)}`
      : transform.kind === "bucketize"
        ? `steps at ${transform.edges.map(short).join(", ")}`
        : "0 or more";
  return figure(name, id, hint);
}

/** A select of words; `open`: a word of none of them is one more choice. */
export function choice(name: string, id: string, words: readonly string[], open: boolean): Control {
  const select = h("select", { id });
  select.append(h("option", { value: MISSING }, "(missing)"));
  words.forEach((word, place) => select.append(h("option", { value: place }, word === "" ? "(empty text)" : word)));
  if (open) select.append(h("option", { value: UNSEEN }, "(something else)"));
  let other = "something else";
  while (words.includes(other)) other += " ";
  return {
    element: field(name, id, select, ""),
    read: () => (select.value === MISSING ? null : select.value === UNSEEN ? other : words[Number(select.value)]!),
    write(value) {
      const place = typeof value === "string" ? words.indexOf(value) : -1;
      select.value = value === null || value === undefined ? MISSING : place >= 0 ? String(place) : open ? UNSEEN : MISSING;
    },
  };
}

/** A number; nothing typed is a missing one. */
export function figure(name: string, id: string, hint: string): Control {
  const input = h("input", { id, type: "number", step: "any", inputmode: "decimal", placeholder: "missing" });
  input.setAttribute("aria-describedby", `${id}-hint`);
  return {
    element: field(name, id, input, hint),
    read() {
      const wrong = input.validity.badInput;
      input.setAttribute("aria-invalid", String(wrong));
      if (wrong) return undefined;
      return input.value === "" ? null : Number(input.value);
    },
    write: (value) => void (input.value = typeof value === "number" ? String(value) : ""),
  };
}

/** A text; nothing typed is a missing one. */
export function written(name: string, id: string, hint: string, list = ""): Control {
  const input = h("input", { id, type: "text", placeholder: "missing", maxlength: 1024, spellcheck: "false" });
  if (list) input.setAttribute("list", list);
  input.setAttribute("aria-describedby", `${id}-hint`);
  return {
    element: field(name, id, input, hint),
    read: () => (input.value === "" ? null : input.value),
    write: (value) => void (input.value = typeof value === "string" ? value : ""),
  };
}

function field(name: string, id: string, control: HTMLElement, hint: string): HTMLElement {
  const said = hint ? h("span", { class: "hint", id: `${id}-hint` }, hint) : null;
  return h("div", { class: "field" }, h("label", { for: id }, name), control, said);
}

/** A value that somebody could have. */
export function somebody(transform: Transform): Raw {
  const draw = () => crypto.getRandomValues(new Uint32Array(1))[0]! / 2 ** 32;
  if (transform.kind === "categorical") return transform.vocabulary[Math.floor(draw() * transform.vocabulary.length)]!;
  if (transform.kind === "hash") return "something";
  if (transform.kind === "bucketize") return transform.edges[Math.floor(draw() * transform.edges.length)]!;
  const sign = draw() < 0.5 ? -1 : 1;
  const value = transform.mean + sign * transform.std;
  return Number((transform.kind === "log1p" ? Math.max(0, Math.expm1(value)) : value).toPrecision(4));
}

function short(value: number): string {
  return String(Number(value.toPrecision(4)));
}
