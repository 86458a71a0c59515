// What can go wrong, by whose fault it is. A message never holds a feature's value: logs are not private.

/** Every error this package raises on purpose. */
export class HybridError extends Error {
  override name = "HybridError";
}

/** A setting is wrong: the host app can mend it. */
export class ConfigError extends HybridError {
  override name = "ConfigError";
}

/** A device bundle is not what its signature, manifest or limits promise. */
export class BundleError extends HybridError {
  override name = "BundleError";
}

/** A value cannot be read as its feature's: of the wrong type, or no text that UTF-8 has. */
export class BadRequest extends HybridError {
  override name = "BadRequest";
}

/** The gateway asks who is asking, and does not take what it was shown. */
export class Unauthenticated extends HybridError {
  override name = "Unauthenticated";
}

/** What is kept in this browser cannot be read or written. */
export class StoreError extends HybridError {
  override name = "StoreError";
}
