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


class RoundStopped(HybridError):
    """A round was ended before its time, or none is opened: its aggregator stopped, or training is halted there.

    Nothing was spent.
    """


class RoundEnded(RoundStopped):
    """This one round was ended, for good, by who may: the next one is run."""


class Halted(RoundStopped):
    """The version that would be trained was halted, for good: no round of it is run any more."""


class BundleError(HybridError):
    """A device bundle is not what its signature, manifest or limits promise."""


class PlanError(HybridError):
    """A plan is not what its signature, format or the device's limits promise."""


class StoreError(HybridError):
    """A device's store cannot take or give what was asked: its key, its disk, another process. Nothing was changed."""


class UpdateError(HybridError):
    """A device's update is not of the form and length that its plan asks for."""


class TokenError(HybridError):
    """A token, or what is asked and answered for one, does not hold."""


class IssuerError(HybridError):
    """The issuer of tokens cannot be reached, or does not open a window."""


class StackError(HybridError):
    """A process of the local stack could not start, or died."""


class RegistryError(HybridError):
    """MLflow's server or database does not answer, or refuses what it is asked.

    Attributes:
        code: MLflow's, one word; "" where the failure has none.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class AggregatorError(HybridError):
    """An aggregator cannot be reached, or does not do what it is asked."""


class FederationError(HybridError):
    """The servers of a federated training could not start, or died; it ended before its last round."""


class ServingError(HybridError):
    """One inference request cannot be answered with a prediction.

    Attributes:
        status: the HTTP status that says whose fault it is.
        code: the reason as one stable word, for clients and counters.
        retry_after_s: when it may be tried again, in whole seconds; None where that does not help.
    """

    status = 500
    code = "internal"
    retry_after_s: int | None = None


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


class NoBundle(ServingError):
    """The version is served, but its device bundle is not there to be fetched."""

    status = 404
    code = "no_bundle"


class UnknownTicket(ServingError):
    """There is no result under the ticket, or no more, or not for this client."""

    status = 404
    code = "unknown_ticket"


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
    retry_after_s = 1


class SchemaDrift(ServingError):
    """The stored features were packed by another schema than the model's."""

    status = 503
    code = "schema_drift"
    retry_after_s = 1


class Unavailable(ServingError):
    """Something the answer needs (broker, feature store, Triton) did not answer in time."""

    status = 503
    code = "unavailable"
    retry_after_s = 1


class Overloaded(ServingError):
    """So much waits already that this request was not taken. Nothing it needs has failed."""

    status = 429
    code = "overloaded"
    retry_after_s = 1


class RateLimited(ServingError):
    """The caller asks for more than its share; `retry_after_s` says when that is enough again."""

    status = 429
    code = "rate_limited"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unauthenticated(ServingError):
    """The request shows no credential, or, where `shown`, one that does not hold."""

    status = 401
    code = "unauthenticated"

    def __init__(self, message: str, *, shown: bool = False) -> None:
        super().__init__(message)
        self.shown = shown


class Forbidden(ServingError):
    """The credential holds, but does not allow this."""

    status = 403
    code = "forbidden"
