// The browser device of Hybrid Towers.

export { type Answer, answered } from "./answers.ts";
export {
  type Bundle,
  Bundles,
  type Installed,
  type Manifest,
  MAX_BYTES,
  readBundle,
  type Release,
  RUNTIME,
  trustedKey,
} from "./bundle.ts";
export {
  type Ask,
  clientOf,
  type ClientOptions,
  download,
  type Fetching,
  InferenceClient,
  requestBody,
  type Sent,
} from "./client.ts";
export { decide, POLICY, type Policy, readBrowser, type Readings, REASONS } from "./eligibility.ts";
export { BadRequest, BundleError, ConfigError, HybridError, StoreError, Unauthenticated } from "./errors.ts";
export { Features, isText, murmur3, type Raw, type Transform } from "./features.ts";
export { clipAndNoise, systemNoise } from "./mechanisms.ts";
export { EmbedProgram, measure, PredictProgram, programOf, type Speed, useRuntime } from "./program.ts";
export { type Rollout, update } from "./rollout.ts";
export { type Examples, forgetKey, type Kept, keptKey, Store } from "./store.ts";
