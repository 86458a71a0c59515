"""An answer with noise and without a ledger: how intervals behave is looked at, not what they cost."""

import numpy as np

from hybrid.analytics.asking import Answer, Exact


class Noisy:
    """Asks people; the noise has the standard deviation `sd` times a query's norm, and is drawn anew each time."""

    def __init__(self, people, sd, seed):
        self._exact, self._sd, self._rng = Exact(people), sd, np.random.default_rng(seed)

    def begin(self, shares):
        """Nothing to reserve."""

    def __call__(self, query, *, share=1.0, payload=None):
        answer = self._exact(query, payload=payload)
        sd = self._sd * query.norm / np.sqrt(share)
        return Answer(query, answer.total + self._rng.normal(0, sd, query.size), sd, answer.people)
