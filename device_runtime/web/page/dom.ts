// Building what is shown. Text goes in as text: nothing that a person or a server wrote becomes markup.

type Child = Node | string | null;

/** An element with attributes and children; an attribute that is true has no value, one that is false is left out. */
export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Readonly<Record<string, string | number | boolean>> = {},
  ...children: readonly Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** The element of the page's markup with this id. */
export function at<T extends HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found as T;
}

export function percent(share: number): string {
  return `${(share * 100).toFixed(1)} %`;
}

export function count(number: number, what: string): string {
  return `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
}

export function size(bytes: number): string {
  if (bytes < 1024) return count(bytes, "byte");
  const [amount, unit] = bytes < 2 ** 20 ? [bytes / 1024, "KiB"] : [bytes / 2 ** 20, "MiB"];
  return `${Number(amount.toFixed(1))} ${unit}`;
}
