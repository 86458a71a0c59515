"""What the browser device must agree on with Python, held to what Python computes and to other implementations."""

import importlib.util
import json
import re
from pathlib import Path

import mmh3
import numpy as np
import pytest

import device_runtime
from hybrid import bundle
from hybrid.errors import BadRequest
from hybrid.features import Categorical, Hash, murmur3_32

FOLDER = Path(device_runtime.__file__).parent / "web" / "vectors"


@pytest.fixture(scope="module")
def writer():
    spec = importlib.util.spec_from_file_location("write_vectors", FOLDER / "write.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_python_computes_now(writer):
    """`python device_runtime/web/vectors/write.py` writes it anew after a change that is meant."""
    assert json.loads((FOLDER / "device.json").read_text()) == writer.vectors()


def test_the_browser_device_counts_runtimes_and_bundles_as_this_one_does():
    """`RUNTIME`, the format and the sizes at which a bundle is refused stand in two languages."""
    source = (FOLDER.parent / "src/bundle.ts").read_text()
    assert int(re.search(r"export const RUNTIME = (\d+);", source)[1]) == device_runtime.RUNTIME
    assert int(re.search(r"const FORMAT = (\d+);", source)[1]) == bundle.FORMAT
    sizes = {name: int(most) << int(by) for name, most, by in re.findall(r"const (MAX_\w+) = (\d+) << (\d+);", source)}
    assert sizes == {"MAX_BYTES": bundle.MAX_BYTES, "MAX_MANIFEST": bundle.MAX_MANIFEST}


def test_the_hashes_are_those_of_another_implementation():
    """mmh3, a C++ MurmurHash3, agrees on every one; so does smhasher's published value of "hello"."""
    vectors = json.loads((FOLDER / "device.json").read_text())["murmur3"]
    assert len({(each["utf8"], each["seed"]) for each in vectors}) == len(vectors) >= 80
    for each in vectors:
        assert mmh3.hash(bytes.fromhex(each["utf8"]), each["seed"], signed=False) == each["hash"]
    assert murmur3_32(b"hello") == 0x248BFA47


def test_texts_that_are_equal_after_nfc_have_one_index_and_others_their_own():
    """Both spellings of "Café" are one word; the angstrom sign is the letter; a ligature is no two letters."""
    words = Categorical(vocabulary=("Cafe\u0301", "\u00c5"))
    assert words.inputs(["Café", "Cafe\u0301", "\u212b", "\ufb01", None]).tolist() == [0, 0, 1, 2, 3]
    buckets = Hash(buckets=1 << 20)
    assert len(set(buckets.inputs(["Café", "Cafe\u0301"]).tolist())) == 1
    assert len(set(buckets.inputs(["\ufb01", "fi"]).tolist())) == 2


@pytest.mark.parametrize("transform", [Categorical(vocabulary=("a",)), Hash(buckets=4)])
@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udc00\ud800"])
def test_half_of_a_surrogate_pair_is_a_bad_request_that_does_not_quote_it(transform, text):
    """It has no UTF-8: neither a hash, nor a spelling that two sides could agree on."""
    with pytest.raises(BadRequest, match="half of a surrogate pair") as error:
        transform.inputs(np.array([text], dtype=object))
    assert text not in str(error.value)
