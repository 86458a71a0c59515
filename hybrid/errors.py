"""What can go wrong, by whose fault it is.

A message names the setting, what it must be and what it got. It never holds a
feature value, a gradient or a device id: logs are not private.
"""

from __future__ import annotations


class HybridError(Exception):
    """Every error this product raises on purpose."""


class ConfigError(HybridError):
    """A declaration, a setting or a command line is wrong: the caller can mend it."""


class NotFound(HybridError):
    """A model, version, alias, population or run of that name does not exist."""


class BudgetExceeded(HybridError):
    """Going on would spend more privacy than was declared. Nothing was spent."""


class CohortTooSmall(HybridError):
    """Fewer devices answered than may be released together. Nothing was spent."""


class BundleError(HybridError):
    """A device bundle is not what its signature, manifest or limits promise."""


class StackError(HybridError):
    """A process of the local stack could not start, or died."""


class ServingError(HybridError):
    """One inference request cannot be answered with a prediction.

    Attributes:
        status: the HTTP status that says whose fault it is.
        code: the reason as one stable word, for clients and counters.
    """

    status = 500
    code = "internal"


class BadRequest(ServingError):
    """The request cannot be read: malformed, wrong dtype, wrong shape, not finite."""

    status = 400
    code = "bad_request"


class BodyTooLarge(ServingError):
    """The request's body is larger than the gateway takes."""

    status = 413
    code = "body_too_large"


class UnknownModel(ServingError):
    """No such model is served, or not in that version."""

    status = 404
    code = "unknown_model"


class UpdateRequired(ServingError):
    """The version is no longer served: the device fetches the bundle of a newer one."""

    status = 410
    code = "update_required"


class MissingDevice(ServingError):
    """The request holds no device embedding, and the model declares no answer without one."""

    status = 400
    code = "missing_device"


class UnknownEntity(ServingError):
    """The feature store has no row for the entity."""

    status = 404
    code = "unknown_entity"


class StaleFeatures(ServingError):
    """The entity's features are older than the model's declared `max_age`."""

    status = 503
    code = "stale_features"


class SchemaDrift(ServingError):
    """The stored features were packed by another schema than the model's."""

    status = 503
    code = "schema_drift"


class Unavailable(ServingError):
    """Something the answer needs (broker, feature store, Triton) did not answer in time."""

    status = 503
    code = "unavailable"
