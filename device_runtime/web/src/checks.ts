// Unknown JSON -> typed values, field by field, as pydantic has it in Python: what is not known is refused.

/** Reads a value, or throws a sentence about the field at `where`. */
export type Check<T> = (value: unknown, where: string) => T;

/** The JSON is not what its reader expects. */
export class Mismatch extends Error {
  override name = "Mismatch";
}

function expect(held: boolean, where: string, what: string): asserts held {
  if (!held) throw new Mismatch(`${where} must be ${what}`);
}

export const text: Check<string> = (value, where) => {
  expect(typeof value === "string", where, "text");
  return value;
};

export const boolean: Check<boolean> = (value, where) => {
  expect(typeof value === "boolean", where, "true or false");
  return value;
};

export function matching(pattern: RegExp): Check<string> {
  return (value, where) => {
    expect(typeof value === "string" && pattern.test(value), where, `text like ${pattern}`);
    return value;
  };
}

/** A finite number in [least, most]. */
export function number(least = -Infinity, most = Infinity): Check<number> {
  return (value, where) => {
    const held = typeof value === "number" && Number.isFinite(value) && value >= least && value <= most;
    expect(held, where, `a number in [${least}, ${most}]`);
    return value as number;
  };
}

/** A whole number in [least, most], exact in JavaScript. */
export function integer(least = 0, most = Number.MAX_SAFE_INTEGER): Check<number> {
  return (value, where) => {
    expect(Number.isSafeInteger(value), where, "a whole number");
    return number(least, most)(value, where);
  };
}

export function oneOf<T extends string | number>(...allowed: readonly T[]): Check<T> {
  return (value, where) => {
    expect(allowed.includes(value as T), where, `one of ${allowed.join(", ")}`);
    return value as T;
  };
}

export function nullable<T>(check: Check<T>): Check<T | null> {
  return (value, where) => (value === null ? null : check(value, where));
}

export function list<T>(check: Check<T>, least = 0): Check<readonly T[]> {
  return (value, where) => {
    expect(Array.isArray(value) && value.length >= least, where, `a list of ${least} or more`);
    return value.map((item, place) => check(item, `${where}[${place}]`));
  };
}

/**
 * An object by name, in the order of the JSON.
 *
 * JavaScript moves whole numbers to an object's front, so a name that is one would lose its place.
 */
export function mapping<T>(check: Check<T>, pattern = /^/): Check<ReadonlyMap<string, T>> {
  return (value, where) => {
    expect(isObject(value), where, "an object");
    const names = Object.keys(value);
    expect(names.every((name) => pattern.test(name)), where, `an object with names like ${pattern}`);
    expect(!names.some((name) => /^\d+$/.test(name)), where, "an object whose names are not whole numbers");
    return new Map(names.map((name) => [name, check(value[name], `${where}.${name}`)]));
  };
}

/** An object with these fields and no others; those with a default may be absent. */
export function object<T extends object>(
  fields: { readonly [K in keyof T]: Check<T[K]> },
  defaults: Partial<T> = {},
): Check<T> {
  return (value, where) => {
    expect(isObject(value), where, "an object");
    const unknown = Object.keys(value).filter((name) => !Object.hasOwn(fields, name));
    expect(unknown.length === 0, where, `without ${unknown.join(", ")}, which this runtime does not know`);
    const read = Object.keys(fields).map((name) => {
      const key = name as keyof T & string;
      if (!Object.hasOwn(value, name)) {
        expect(Object.hasOwn(defaults, name), `${where}.${name}`, "there");
        return [name, defaults[key]];
      }
      return [name, fields[key](value[name], `${where}.${name}`)];
    });
    return Object.fromEntries(read) as T;
  };
}

/** One of several objects, told apart by their field `kind`. */
export function kinds<T>(checks: Readonly<Record<string, Check<T>>>): Check<T> {
  return (value, where) => {
    const kind = isObject(value) ? value["kind"] : undefined;
    expect(typeof kind === "string" && Object.hasOwn(checks, kind), `${where}.kind`, Object.keys(checks).join(" or "));
    return checks[kind]!(value, where);
  };
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
