// The merge on the device: the server's embedding and the row's own inputs become a prediction that stays here.

import { type Answer, answered, BAD_ANSWER, EXPIRED, NO_ANSWER, TIMEOUT, UNREACHABLE } from "./answers.ts";
import type { Manifest } from "./bundle.ts";
import type { PredictProgram } from "./program.ts";

// Nothing was said of the row: neither that it has no server side, nor one. A rate limit or a refusal is told as it is.
const UNAVAILABLE = new Set([UNREACHABLE, TIMEOUT, BAD_ANSWER, "unavailable", "overloaded"]);

/**
 * The answer with its prediction, or what the bundle declares where the gateway answered nothing for use.
 *
 * An answer that has expired or does not give a probability is never used: it becomes an error, in whose place only a
 * declared fallback answers, and is named.
 *
 * @param answer as `readAnswer` gives it, without a prediction.
 * @param inputs (features,) of its row.
 * @param now Unix time in milliseconds, UTC, by the device's clock.
 */
export async function mergeOnDevice(
  manifest: Manifest,
  program: PredictProgram,
  answer: Answer,
  inputs: Float32Array,
  now: number,
): Promise<Answer> {
  const predicted = async (from: Answer): Promise<number> => {
    if (from.fallback === "constant") return manifest.alone?.constant ?? NaN;
    return (await program.predict(inputs, from.serverEmbedding))[0]!;
  };
  const instead = async (from: Answer): Promise<Answer> => {
    const fallback = UNAVAILABLE.has(from.status)
      ? (manifest.alone?.unavailable ?? "error")
      : from.status === EXPIRED
        ? (manifest.alone?.stale_features ?? "error")
        : "error";
    if (fallback === "error") return from;
    const serverEmbedding = Float32Array.from(fallback === "device-only" ? (manifest.alone?.missing_server ?? []) : []);
    const own = { ...from, fallback, version: manifest.version, serverEmbedding };
    const prediction = await predicted(own);
    return Number.isNaN(prediction) ? from : { ...own, prediction, merged: "device" };
  };
  // Nothing of what was answered is kept, so that nobody takes it for good.
  const refused = (status: string, error: string): Answer => ({
    ...NO_ANSWER,
    status,
    error,
    httpStatus: answer.httpStatus,
    attempts: answer.attempts,
  });

  if (!answered(answer)) return instead(answer);
  if (answer.expiresMs !== -1 && now > answer.expiresMs) {
    return instead(refused(EXPIRED, "the server's embedding has expired by the device's clock"));
  }
  const prediction = await predicted(answer);
  if (Number.isNaN(prediction)) {
    const what = answer.fallback === "none" ? "its embedding" : answer.fallback;
    return instead(refused(BAD_ANSWER, `the gateway's answer gives no probability with this bundle (${what})`));
  }
  return { ...answer, prediction, merged: "device" };
}
