// Whether this device may take part in training now: a plan's policy against what the browser can tell of itself.
//
// A browser tells little, and what it does not tell counts against taking part. Training itself is for hosts with
// ExecuTorch; a browser shows the decision, and keeps examples.

/** When a device may take part; see `hybrid.plan.Policy`. */
export interface Policy {
  readonly charging: boolean;
  readonly battery: number;
  readonly idle: boolean;
  readonly unmetered: boolean;
  readonly thermal: "nominal" | "fair" | "serious";
  readonly free_mb: number;
  readonly separation_s: number;
  readonly participations: number;
  readonly period_s: number;
}

export const POLICY: Policy = {
  charging: true,
  battery: 0.3,
  idle: true,
  unmetered: true,
  thermal: "nominal",
  free_mb: 64,
  separation_s: 86_400,
  participations: 1,
  period_s: 86_400,
};

export type Thermal = "nominal" | "fair" | "serious" | "critical";

/** What a device tells of itself; null where it does not. */
export interface Readings {
  readonly consent: boolean;
  readonly charging: boolean | null;
  /** Charge as a share. */
  readonly battery: number | null;
  /** Whether nobody uses it. */
  readonly idle: boolean | null;
  /** Whether the network costs by volume. */
  readonly metered: boolean | null;
  readonly thermal: Thermal | null;
  readonly free_bytes: number | null;
}

/** One line of the table: a reading, when a policy asks for it, when it holds, and the reason where it does not. */
interface Condition<K extends keyof Readings> {
  readonly reading: K;
  readonly asked: (policy: Policy) => boolean;
  readonly holds: (policy: Policy, value: NonNullable<Readings[K]>) => boolean;
  readonly refused: string;
  readonly unknown: string;
}

const THERMAL: readonly Thermal[] = ["nominal", "fair", "serious", "critical"]; // from cool to warm

function line<K extends keyof Readings>(
  reading: K,
  asked: (policy: Policy) => boolean,
  holds: (policy: Policy, value: NonNullable<Readings[K]>) => boolean,
  refused: string,
  unknown: string,
): Condition<keyof Readings> {
  return { reading, asked, holds, refused, unknown } as unknown as Condition<keyof Readings>;
}

/** The table of `device_runtime.eligibility`, line by line. */
const CONDITIONS: readonly Condition<keyof Readings>[] = [
  line("charging", (p) => p.charging, (_, on) => on, "not_charging", "charging_unknown"),
  line("battery", (p) => p.battery > 0, (p, share) => share >= p.battery && share <= 1, "battery_low", "battery_unknown"),
  line("idle", (p) => p.idle, (_, idle) => idle, "in_use", "idle_unknown"),
  line("metered", (p) => p.unmetered, (_, metered) => !metered, "metered", "metered_unknown"),
  line(
    "thermal",
    () => true,
    (p, state) => THERMAL.includes(state) && THERMAL.indexOf(state) <= THERMAL.indexOf(p.thermal),
    "too_warm",
    "thermal_unknown",
  ),
  line("free_bytes", (p) => p.free_mb > 0, (p, free) => free >= p.free_mb * 2 ** 20, "low_space", "space_unknown"),
];

/** A reason against taking part as a person reads it. */
export const REASONS: Readonly<Record<string, string>> = {
  no_consent: "you have not agreed to take part",
  not_charging: "it is not charging",
  charging_unknown: "the browser does not tell whether it is charging",
  battery_low: "the battery is low",
  battery_unknown: "the browser does not tell how full the battery is",
  in_use: "it is in use: this page is being looked at",
  idle_unknown: "the browser does not tell whether it is in use",
  metered: "the network costs by volume",
  metered_unknown: "the browser does not tell whether the network costs by volume",
  too_warm: "it is busy or warm",
  thermal_unknown: "the browser does not tell how warm it is",
  low_space: "there is little room on its disk",
  space_unknown: "the browser does not tell how much room there is",
  clock_behind: "its clock went back",
  too_soon: "it took part a short while ago",
  too_often: "it took part often enough",
};

/**
 * Every reason against taking part, in the order of the table; none: it may. Pure: no clock, no I/O.
 *
 * Without consent nothing else is looked at.
 *
 * @param history when it took part before, Unix time in milliseconds.
 */
export function decide(policy: Policy, readings: Readings, history: readonly number[], nowMs: number): string[] {
  if (!readings.consent) return ["no_consent"];
  const reasons = CONDITIONS.filter((condition) => condition.asked(policy)).flatMap((condition) => {
    const value = readings[condition.reading];
    if (value === null) return [condition.unknown];
    return condition.holds(policy, value) ? [] : [condition.refused];
  });
  return [...reasons, ...ofHistory(policy, history, nowMs)];
}

function ofHistory(policy: Policy, history: readonly number[], nowMs: number): string[] {
  if (!history.length) return [];
  const last = Math.max(...history);
  if (last > nowMs) return ["clock_behind"];
  const reasons = nowMs - last < policy.separation_s * 1000 ? ["too_soon"] : [];
  const recent = history.filter((at) => nowMs - at < policy.period_s * 1000).length;
  return recent >= policy.participations ? [...reasons, "too_often"] : reasons;
}

// What TypeScript's library does not have, since not every browser does.
interface Battery {
  readonly charging: boolean;
  readonly level: number;
}
interface Connection {
  readonly saveData?: boolean;
  readonly type?: string;
}
interface Pressure {
  observe(source: "cpu"): Promise<void>;
  disconnect(): void;
}
type PressureConstructor = new (take: (records: readonly { readonly state: Thermal }[]) => void) => Pressure;

/** What this browser tells, now. */
export async function readBrowser(consent: boolean): Promise<Readings> {
  const battery = await told(() => (navigator as { getBattery?: () => Promise<Battery> }).getBattery?.());
  const estimate = await told(() => navigator.storage.estimate());
  const free = estimate && (estimate.quota ?? NaN) - (estimate.usage ?? NaN);
  return {
    consent,
    charging: battery ? battery.charging : null,
    battery: battery ? battery.level : null,
    idle: document.visibilityState === "hidden", // nobody looks at it; that nobody uses the device is not told
    metered: metered((navigator as { connection?: Connection }).connection),
    thermal: await pressure(),
    free_bytes: free === null || Number.isNaN(free) ? null : free,
  };
}

/** A browser names the kind of network on phones only; a person who saves data has said that it costs. */
function metered(connection: Connection | undefined): boolean | null {
  if (connection?.saveData) return true;
  if (!connection?.type || connection.type === "unknown") return null;
  return connection.type !== "wifi" && connection.type !== "ethernet";
}

/** The processor's pressure, which Compute Pressure names as phones name their thermal states. */
function pressure(waitMs = 1500): Promise<Thermal | null> {
  const Observer = (globalThis as { PressureObserver?: PressureConstructor }).PressureObserver;
  if (!Observer) return Promise.resolve(null);
  return new Promise((resolve) => {
    const finish = (state: Thermal | null) => {
      observer.disconnect();
      resolve(state);
    };
    const observer = new Observer((records) => finish(records.at(-1)?.state ?? null));
    setTimeout(() => finish(null), waitMs);
    observer.observe("cpu").catch(() => finish(null));
  });
}

async function told<T>(ask: () => Promise<T> | undefined): Promise<T | null> {
  try {
    return (await ask()) ?? null;
  } catch {
    return null; // refused by the browser or by a policy: not told
  }
}
