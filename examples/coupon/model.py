"""Will a driver accept this coupon? The server knows the offer; the phone knows the driver and the trip.

Constants and vocabularies are written by hand from the survey's public
questionnaire, never computed from people's rows.
"""

from datetime import timedelta

from hybrid import (
    Categorical,
    Clear,
    Entity,
    Funnel,
    HybridModel,
    Label,
    Numeric,
    Privacy,
    Server,
    Serving,
    Training,
    View,
)

HABIT = Categorical(vocabulary=("never", "less1", "1~3", "4~8", "gt8"))
EMBEDDING = 16


def server_tower():
    from torch import nn

    return nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, EMBEDDING))


def device_tower():
    from torch import nn

    return nn.Sequential(nn.Dropout(0.3), nn.LazyLinear(32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, EMBEDDING))


def head():
    import torch

    class Match(torch.nn.Module):
        """A score of each embedding, and how well the two match: with no device embedding, the server's own score."""

        def __init__(self):
            super().__init__()
            self.server = torch.nn.Linear(EMBEDDING, 1)
            self.device = torch.nn.Linear(EMBEDDING, 1, bias=False)

        def forward(self, server, device):
            return (self.server(server) + self.device(device)).squeeze(-1) + (server * device).sum(-1)

    return Match()


model = HybridModel(
    name="coupon",
    server=Server(
        service="coupon_offers",
        entity=Entity(name="offer", join_key="offer_id"),
        views=(
            View(
                name="offers",
                source="data/offers.parquet",
                features={
                    "coupon": Categorical(
                        vocabulary=(
                            "Coffee House",
                            "Restaurant(<20)",
                            "Carry out & Take away",
                            "Bar",
                            "Restaurant(20-50)",
                        )
                    ),
                    "expiration": Categorical(vocabulary=("2h", "1d")),
                    "acceptance_rate": Numeric(mean=0.55, std=0.15),
                },
            ),
        ),
        max_feature_age=timedelta(days=30),
    ),
    request={"time": Categorical(vocabulary=("7AM", "10AM", "2PM", "6PM", "10PM"))},
    device={
        "destination": Categorical(vocabulary=("No Urgent Place", "Home", "Work")),
        "passanger": Categorical(vocabulary=("Alone", "Friend(s)", "Partner", "Kid(s)")),
        "weather": Categorical(vocabulary=("Sunny", "Rainy", "Snowy")),
        "temperature": Numeric(mean=60, std=20),
        "toCoupon_GEQ15min": Numeric(mean=0.5, std=0.5),
        "toCoupon_GEQ25min": Numeric(mean=0.5, std=0.5),
        "direction_same": Numeric(mean=0.5, std=0.5),
        "gender": Categorical(vocabulary=("Female", "Male")),
        "age": Categorical(vocabulary=("below21", "21", "26", "31", "36", "41", "46", "50plus")),
        "maritalStatus": Categorical(
            vocabulary=("Single", "Unmarried partner", "Married partner", "Divorced", "Widowed")
        ),
        "has_children": Numeric(mean=0.5, std=0.5),
        "Bar": HABIT,
        "CoffeeHouse": HABIT,
        "CarryAway": HABIT,
        "RestaurantLessThan20": HABIT,
        "Restaurant20To50": HABIT,
    },
    server_tower=server_tower,
    device_tower=device_tower,
    head=head,
    label=Label(column="Y", visible_to="server"),
    privacy=Privacy(epsilon=8, delta=9e-4, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="a demonstration on a public survey, whose answers are published anyway"),
    serving=Serving(contribution=True),  # devices keep it, to train with
    funnel=Funnel(epsilon=1),
    training=Training(rounds=200, sampling=0.5, local_lr=2.0, server_optimizer="Adam", server_lr=0.005),
)
