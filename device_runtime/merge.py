"""The merge on the device: the server's embedding and the row's own inputs become a prediction that stays here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from device_runtime.answers import BAD_ANSWER, EXPIRED, TIMEOUT, UNREACHABLE, Answer
from device_runtime.program import PredictProgram
from hybrid.bundle import Alone, Manifest
from hybrid.errors import Overloaded, Unavailable
from hybrid.protocol import CONSTANT, DEVICE_ONLY, NONE, answered

# Nothing was said of the row: neither that it has no server side, nor one. A rate limit or a refusal is told as it is.
UNAVAILABLE = frozenset({UNREACHABLE, TIMEOUT, BAD_ANSWER, Unavailable.code, Overloaded.code})


@dataclass(frozen=True)
class DeviceMerge:
    """Predicts from what the gateway answered, or as the bundle declares where it answered nothing for use.

    An answer that has expired or does not give a probability is never used: it becomes an error, in whose place only a
    declared fallback answers, and is named.

    Attributes:
        manifest: of the verified bundle.
        program: of the same bundle.
        now_ms: Unix time in milliseconds, UTC, by the device's clock.
    """

    manifest: Manifest
    program: PredictProgram
    now_ms: Callable[[], int]

    def __call__(self, answer: Answer, inputs: NDArray[np.float32]) -> Answer:
        """The answer with its prediction.

        Args:
            answer: as `read_answer` gives it, without a prediction.
            inputs: (1, features) of its row.

        Raises:
            BundleError: the program does not give what its manifest says.
        """
        if not answered(answer.status, answer.fallback):
            return self._instead(answer, inputs)
        if answer.expires_ms != -1 and self.now_ms() > answer.expires_ms:
            why = "the server's embedding has expired by the device's clock"
            return self._instead(_refused(answer, EXPIRED, why), inputs)
        prediction = self._predicted(answer, inputs)
        if math.isnan(prediction):
            what = answer.fallback if answer.fallback != NONE else "its embedding"
            why = f"the gateway's answer gives no probability with this bundle ({what})"
            return self._instead(_refused(answer, BAD_ANSWER, why), inputs)
        return replace(answer, prediction=prediction, merged="device")

    @property
    def _alone(self) -> Alone:
        return self.manifest.alone or Alone()

    def _predicted(self, answer: Answer, inputs: NDArray[np.float32]) -> float:
        """A probability; NaN where there is none."""
        if answer.fallback == CONSTANT:
            return math.nan if self._alone.constant is None else self._alone.constant
        return self.program.predict(inputs, np.array([answer.server_embedding], np.float32))

    def _instead(self, answer: Answer, inputs: NDArray[np.float32]) -> Answer:
        """What the bundle declares for an answer that gives no prediction; the answer itself where that is an error."""
        fallback = "error"
        if answer.status in UNAVAILABLE:
            fallback = self._alone.unavailable
        elif answer.status == EXPIRED:
            fallback = self._alone.stale_features
        if fallback == "error":
            return answer
        server = self._alone.missing_server if fallback == DEVICE_ONLY else ()
        own = replace(answer, fallback=fallback, version=self.manifest.version, server_embedding=server)
        prediction = self._predicted(own, inputs)
        return answer if math.isnan(prediction) else replace(own, prediction=prediction, merged="device")


def _refused(answer: Answer, status: str, why: str) -> Answer:
    """Nothing of what was answered is kept, so that nobody takes it for good."""
    return Answer(answer.device, answer.row, status, answer.http_status, attempts=answer.attempts, error=why)
