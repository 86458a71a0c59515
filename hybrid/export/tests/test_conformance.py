import numpy as np
import pytest
import torch

from hybrid import Categorical, Numeric
from hybrid.errors import ConfigError
from hybrid.export.conformance import check, embedding_probes, input_probes, slot_probes
from hybrid.features import Features

FEATURES = Features.of({"number": Numeric(mean=1, std=2), "word": Categorical(vocabulary=("a", "b"))})
ONES = [torch.ones(4, 3)]


def test_input_probes_hold_missing_infinite_and_every_index():
    """Two words have indices 0 to 3, unseen and missing among them; numbers meet NaN and both infinities."""
    probes = input_probes(FEATURES).numpy()
    assert np.isnan(probes[:, 0]).any()
    assert {np.inf, -np.inf} <= set(probes[:, 0])
    assert {0.0, 1.0, 2.0, 3.0} <= set(probes[:, 1])


def test_slot_probes_hold_what_no_transform_gives():
    """A stored slot may be missing, negative or past its table."""
    assert {-1.0, 1e6} <= set(slot_probes(FEATURES).numpy()[:, 1])
    assert np.isnan(slot_probes(FEATURES).numpy()[:, 1]).any()


def test_embedding_probes_hold_zeros_and_one_batch_for_each_size():
    """Both sides have as many rows, one of them zeros."""
    a, b = embedding_probes(3, 2)
    assert a.shape[1:], b.shape[1:] == ((3,), (2,))
    assert len(a) == len(b)
    assert (a == 0).all(1).any()


@pytest.mark.parametrize(("error", "conforms"), [(0.0, True), (1e-5, True), (5e-5, False), (np.nan, False)])
def test_an_export_may_differ_by_rounding_only(error: float, conforms: bool):
    """Around 1 the bound is 1e-5 absolute and as much relative, so 2e-5; NaN is never rounding."""

    def exported(values):
        return values + np.float32(error)

    if conforms:
        check("part", torch.nn.Identity(), exported, ONES)
        return
    with pytest.raises(ConfigError, match="part: the export differs from torch by more than 1e-05 in 12 of 12"):
        check("part", torch.nn.Identity(), exported, ONES)


def test_an_export_must_return_the_same_shape():
    """(4, 3) squeezed or cut is refused before values are compared."""
    with pytest.raises(ConfigError, match=r"returns shape \(4, 1\), torch \(4, 3\)"):
        check("part", torch.nn.Identity(), lambda values: values[:, :1], ONES)


def test_a_small_number_may_be_as_inexact_as_the_largest_of_its_row():
    """Next to 1e6 an error of 5 is within 1e-5 of the row; next to 1 the bound is 2e-5."""
    values = torch.tensor([[1e6, 1.0], [1.0, 1.0]])
    check("part", torch.nn.Identity(), lambda given: given + np.float32([[0, 5], [0, 0]]), [values])
    with pytest.raises(ConfigError, match="1 of 4 values"):
        check("part", torch.nn.Identity(), lambda given: given + np.float32([[0, 5], [0, 3e-5]]), [values])
