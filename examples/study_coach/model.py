"""Will this piece of coursework get 80 or more? The university knows the assessment; the phone knows the learner.

Vocabularies are the published ones; constants are round numbers. Both were written
by hand with the public table in view. Where there is no public table, take constants
from what is known before anybody takes part, or pay for them from the ledger.

The towers have one layer each: under privacy every weight costs accuracy, and
a second layer brought pooled training nothing here. The server tower is
federated from its start too, since the label that it would be fitted on is the device's.
"""

from datetime import timedelta

from hybrid import (
    Categorical,
    Clear,
    Drift,
    Entity,
    HybridModel,
    Label,
    Log1p,
    Numeric,
    Privacy,
    Server,
    Training,
    View,
)

EMBEDDING = 16
HISTORY = {
    f"{scope}{name}": transform
    for scope in ("", "kind_", "course_")
    for name, transform in {
        "mean_score": Numeric(mean=75, std=15, clip=3),
        "good_odds": Numeric(clip=3),
        "last_score": Numeric(mean=75, std=20, clip=3),
        "earlier": Log1p(mean=1, clip=3),
    }.items()
}


def server_tower():
    from torch import nn

    return nn.Sequential(nn.LazyLinear(EMBEDDING), nn.Tanh())


def device_tower():
    from torch import nn

    return nn.Sequential(nn.LazyLinear(EMBEDDING), nn.Tanh())


def head():
    import torch

    class Match(torch.nn.Module):
        """A score of each embedding, and how well the two match."""

        def __init__(self):
            super().__init__()
            self.server = torch.nn.Linear(EMBEDDING, 1)
            self.device = torch.nn.Linear(EMBEDDING, 1, bias=False)

        def forward(self, server, device):
            return (self.server(server) + self.device(device)).squeeze(-1) + (server * device).sum(-1)

    return Match()


model = HybridModel(
    name="study_coach",
    server=Server(
        service="study_coach_assessments",
        entity=Entity(name="assessment", join_key="rates_of"),
        views=(
            View(
                name="assessments",
                source="data/assessments.parquet",
                features={
                    "code_module": Categorical(vocabulary=("AAA", "BBB", "CCC", "DDD", "EEE", "FFF", "GGG")),
                    "semester": Categorical(vocabulary=("B", "J")),
                    "assessment_type": Categorical(vocabulary=("TMA", "CMA", "Exam")),
                    "weight": Numeric(mean=15, std=15, clip=3),
                    "due_day": Numeric(mean=130, std=75, clip=3),
                    "module_presentation_length": Numeric(mean=255, std=15, clip=3),
                    "assessment_odds": Numeric(clip=3),
                    "module_type_odds": Numeric(clip=3),
                },
            ),
        ),
        max_feature_age=timedelta(days=30),
    ),
    device={
        "gender": Categorical(vocabulary=("F", "M")),
        "region": Categorical(
            vocabulary=(
                *("East Anglian Region", "East Midlands Region", "Ireland", "London Region", "North Region"),
                *("North Western Region", "Scotland", "South East Region", "South Region", "South West Region"),
                *("Wales", "West Midlands Region", "Yorkshire Region"),
            )
        ),
        "highest_education": Categorical(
            vocabulary=(
                *("No Formal quals", "Lower Than A Level", "A Level or Equivalent", "HE Qualification"),
                "Post Graduate Qualification",
            )
        ),
        "imd_band": Categorical(
            vocabulary=("0-10%", "10-20", *(f"{tens}-{tens + 10}%" for tens in range(20, 100, 10)))
        ),
        "age_band": Categorical(vocabulary=("0-35", "35-55", "55<=")),
        "disability": Categorical(vocabulary=("N", "Y")),
        "num_of_prev_attempts": Numeric(mean=0, std=1, clip=3),
        "studied_credits": Numeric(mean=75, std=40, clip=3),
        "date_registration": Numeric(mean=-60, std=45, clip=3),
        **HISTORY,
        "mean_lateness": Numeric(std=10, clip=3),
    },
    server_tower=server_tower,
    device_tower=device_tower,
    head=head,
    label=Label(column="good", visible_to="device"),
    privacy=Privacy(epsilon=2, delta=2.3e-5, clip=2.0, unit="user"),
    drift=Drift(epsilon=1, periods=4),
    merge="server",
    release=Clear(reason="a demonstration on a published and pseudonymous data set"),
    training=Training(
        rounds=200, sampling=0.25, local_lr=1.0, server_lr=0.01, average_last=1 / 3, server_tower="federated"
    ),
)
