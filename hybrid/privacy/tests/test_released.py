"""What is done to released embeddings."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from hybrid.privacy.mechanisms import SeededNoise
from hybrid.privacy.released import Served, released


def test_a_shrunk_embedding_keeps_of_each_direction_what_is_not_noise():
    """Variances 4 and 1 under noise of variance 4: 4/8 and 1/5 of the distance from the mean (1, 1) are kept."""
    served = Served(SimpleNamespace(), None, None, None, mean=np.ones(2), covariance=np.diag([4.0, 1.0]))
    np.testing.assert_allclose(served.shrunk(np.float32([[3.0, 6.0]]), sd=2.0), [[2.0, 2.0]])
    np.testing.assert_array_equal(served.shrunk(np.float32([[3.0, 6.0]]), sd=0.0), [[3.0, 6.0]])


def test_a_clear_embedding_is_released_as_it_is_and_a_noised_one_is_clipped():
    """(3, 4) has norm 5: clear it stays, and with next to no noise it is clipped to 1, (0.6, 0.8)."""
    embedding = np.float32([[3.0, 4.0]])
    np.testing.assert_array_equal(released(embedding, 1.0, 0.0, SeededNoise(0)), embedding)
    np.testing.assert_allclose(released(embedding, 1.0, 1e-6, SeededNoise(0)), [[0.6, 0.8]], atol=1e-4)
