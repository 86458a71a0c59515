"""For all tests: hypothesis times nothing, since a busy machine would fail what is right; no registry is the team's."""

import os

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

os.environ.pop("MLFLOW_TRACKING_URI", None)
