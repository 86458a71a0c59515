"""What a device bundle's address answers, condition by condition."""

import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from hybrid.errors import ConfigError, NoBundle, Unavailable
from serving import bundles as module
from serving.access import Access, ApiKey, ApiKeys, Buckets
from serving.bundles import Bundles, _range
from serving.deployments import Deployments
from serving.gateway import Gateway, application
from serving.testing import deployment

BYTES = bytes(range(10))
TAG = f'"{hashlib.sha256(BYTES).hexdigest()}"'
DEFAULT, VERSIONED = "/v2/models/shop/bundle", "/v2/models/shop/versions/1/bundle"


class Setup:
    """A gateway of model "shop" in version 1, whose bundle is the bytes 0 to 9."""

    def __init__(self, folder, *, access=Access(), private=False, has_bundles=True):  # noqa: B008  nothing changes it
        self.folder, self.deployments = folder / "bundles", folder / "deployments"
        self.folder.mkdir()
        self.write(BYTES)
        deployment(1).write(self.deployments)
        self.bundles = Bundles(self.folder, private=private) if has_bundles else None
        gateway = Gateway(Deployments(self.deployments), None, lambda: True, access, bundles=self.bundles)
        self.client = TestClient(application(gateway), raise_server_exceptions=False)

    def write(self, content, version=1):
        draft = self.folder / "draft"
        draft.write_bytes(content)
        draft.replace(self.folder / f"shop-{version}.bundle")

    def get(self, path=VERSIONED, method="GET", **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.request(method, path, headers=named)


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path)


@pytest.mark.parametrize("path", [DEFAULT, VERSIONED])
def test_a_bundle_is_sent_with_the_hash_of_its_bytes_as_its_tag(setup, path):
    """GET has the bytes, HEAD the same headers and none; both say which version it is."""
    got, head = setup.get(path), setup.get(path, "HEAD")
    assert (got.status_code, got.content) == (200, BYTES)
    assert (got.headers["ETag"], got.headers["Content-Length"], got.headers["Accept-Ranges"]) == (TAG, "10", "bytes")
    assert got.headers["Content-Location"] == VERSIONED
    assert (head.status_code, head.content, dict(head.headers)) == (200, b"", dict(got.headers))


@pytest.mark.parametrize(
    ("private", "default", "versioned"),
    [
        (False, "public, no-cache", "public, max-age=86400, immutable"),
        (True, "private, no-cache", "private, max-age=86400, immutable"),
    ],
)
def test_caches_ask_again_for_the_default_and_not_for_a_version(tmp_path, private, default, versioned):
    """Where clients show who they are, only their own caches may keep it."""
    setup = Setup(tmp_path, private=private)
    assert [setup.get(path).headers["Cache-Control"] for path in (DEFAULT, VERSIONED)] == [default, versioned]
    assert setup.get(DEFAULT, If_None_Match=TAG).headers["Cache-Control"] == default


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If_None_Match": TAG}, 304),
        ({"If_None_Match": f'"x", W/{TAG}'}, 304),  # compared weakly
        ({"If_None_Match": "*"}, 304),
        ({"If_None_Match": '"x"'}, 200),
        ({"If_None_Match": ""}, 200),
        ({"If_None_Match": TAG, "Range": "bytes=2-4"}, 304),  # it comes before the range
        ({"If_Match": TAG}, 200),
        ({"If_Match": "*"}, 200),
        ({"If_Match": f"W/{TAG}"}, 412),  # compared strongly
        ({"If_Match": '"x"', "If_None_Match": TAG}, 412),
        ({"If_Modified_Since": "Fri, 01 Jan 2100 00:00:00 GMT"}, 200),  # there is no date to compare with
    ],
)
def test_conditions_hold_in_their_order(setup, headers, status):
    """RFC 9110, section 13.2.2; 304 has the tag and no body, and HEAD is answered as GET."""
    for method in ("GET", "HEAD"):
        answer = setup.get(method=method, **headers)
        assert (answer.status_code, answer.headers["ETag"]) == (status, TAG)
    if status == 304:
        assert setup.get(**headers).content == b""
    if status == 412:
        assert setup.get(**headers).json()["code"] == "precondition_failed"


@pytest.mark.parametrize(
    ("asked", "content", "says"),
    [
        ("bytes=0-3", b"\0\1\2\3", "bytes 0-3/10"),
        ("bytes=4-", BYTES[4:], "bytes 4-9/10"),
        ("bytes=-2", b"\x08\x09", "bytes 8-9/10"),
        ("bytes=-99", BYTES, "bytes 0-9/10"),
        ("Bytes=9-99", b"\x09", "bytes 9-9/10"),
    ],
)
def test_one_range_is_sent_alone(setup, asked, content, says):
    """206, with its place; where If-Range names these bytes it is sent too."""
    for headers in ({}, {"If_Range": TAG}):
        answer = setup.get(Range=asked, **headers)
        assert (answer.status_code, answer.content, answer.headers["Content-Range"]) == (206, content, says)
        assert answer.headers["Content-Length"] == str(len(content))


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=2-4", "If_Range": '"other"'},
        {"Range": "bytes=2-4", "If_Range": f"W/{TAG}"},  # a weak tag does not say that bytes are alike
        {"Range": "bytes=2-4", "If_Range": "Fri, 01 Jan 2100 00:00:00 GMT"},
        {"Range": "bytes=99-", "If_Range": '"other"'},
        {"Range": "bytes=0-1,4-5"},
        {"Range": "bytes=4-2"},
        {"Range": "bytes=-"},
        {"Range": "bytes=a-b"},
        {"Range": "bytes=٣-٤"},
        {"Range": "lines=2-4"},
        {"Range": f"bytes={'9' * 5_000}-"},
        {"Range": ""},
    ],
)
def test_a_range_of_other_bytes_or_none_is_answered_with_all(setup, headers):
    """200 and every byte, so that a resumed download of what has changed begins again."""
    sent = {name: value.encode() for name, value in headers.items()}
    answer = setup.get(**sent)
    assert (answer.status_code, answer.content) == (200, BYTES)
    assert "Content-Range" not in answer.headers


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=11-20", "bytes=-0"])
def test_a_range_past_the_end_is_refused_with_the_size(setup, asked):
    """416; a HEAD has no ranges."""
    answer = setup.get(Range=asked)
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */10")
    assert answer.json()["code"] == "range_not_satisfiable"
    assert "Cache-Control" not in answer.headers
    assert setup.get(method="HEAD", Range=asked).status_code == 200


@given(st.integers(0, 20), st.integers(0, 30), st.one_of(st.none(), st.integers(0, 30)))
def test_a_range_is_what_pythons_slice_is(size, first, last):
    """Of any file: from `first` to `last`, both within, or its last `first` bytes."""
    whole = bytes(range(size))
    found = _range([f"bytes={first}-{'' if last is None else last}"], size)
    if last is not None and last < first:
        assert found is None
    else:
        assert whole[slice(*found)] == whole[first : size if last is None else last + 1]
    start, end = _range([f"bytes=-{first}"], size)
    assert whole[start:end] == (whole[-first:] if first else b"")


def test_the_bytes_are_hashed_once_until_they_change(setup, monkeypatch):
    """Three requests, one hash; after a promotion one more, for all that ask then."""
    hashed, real = [], hashlib.file_digest
    monkeypatch.setattr(module.hashlib, "file_digest", lambda *given: hashed.append(1) or real(*given))
    assert {setup.get(path).headers["ETag"] for path in (DEFAULT, VERSIONED, DEFAULT)} == {TAG}
    assert len(hashed) == 1
    setup.write(b"other")
    assert [setup.get().content for _ in range(2)] == [b"other"] * 2
    assert len(hashed) == 2
    assert setup.get(If_None_Match=TAG).status_code == 200


def test_what_was_opened_keeps_its_bytes_and_its_tag(setup):
    """The file is replaced before it is read: an open descriptor has the old one."""
    opened = setup.bundles.open(deployment(1))
    setup.write(b"other")
    with opened.file as file:
        assert (os.pread(file.fileno(), 99, 0), opened.tag) == (BYTES, TAG)


@pytest.mark.parametrize("headers", [{}, {"If_None_Match": TAG}, {"If_Match": '"x"'}, {"Range": "bytes=99-"}])
def test_no_file_stays_open(setup, headers, monkeypatch):
    """Whatever is answered, to GET and HEAD."""
    opened, real = [], Bundles.open
    monkeypatch.setattr(Bundles, "open", lambda *given: opened.append(real(*given)) or opened[-1])
    for method in ("GET", "HEAD"):
        setup.get(method=method, **headers)
    assert [each.file.closed for each in opened] == [True, True]


def test_only_versions_that_are_served_have_bundles(setup):
    """Version 1 left the window of two: 410 as for a prediction, though its file is there; 9 was never; 404."""
    for version in (2, 3):
        deployment(version).write(setup.deployments)
    setup.write(b"third", 3)
    served = Gateway(Deployments(setup.deployments), None, lambda: True, bundles=setup.bundles)
    client = TestClient(application(served))
    found = {}
    for path in ("versions/1/", "versions/9/", "versions/2/", ""):
        answer = client.get(f"/v2/models/shop/{path}bundle")
        found[path] = answer.status_code, answer.content if answer.status_code == 200 else answer.json()["code"]
    assert found == {
        "versions/1/": (410, "update_required"),
        "versions/9/": (404, "unknown_model"),
        "versions/2/": (404, "no_bundle"),
        "": (200, b"third"),
    }


@pytest.mark.parametrize("path", ["..%2Fsecret", "%2e%2e", "shop%00", "shop-1"])
def test_a_model_that_is_not_served_names_no_file(setup, path):
    """What the caller writes is compared with what is served, and becomes no path."""
    (setup.folder.parent / "secret-1.bundle").write_text("secret")
    answer = setup.get(f"/v2/models/{path}/bundle")
    assert answer.status_code == 404
    assert answer.json()["code"] in {"unknown_model", "no_such_path"}


def test_a_deployment_that_is_named_as_a_path_has_no_bundle(tmp_path):
    """Whoever may write deployments may not have other files read."""
    setup = Setup(tmp_path)
    (tmp_path / "secret-1.bundle").write_text("secret")
    with pytest.raises(NoBundle):
        setup.bundles.open(deployment(1).model_copy(update={"model": "../secret"}))


def test_a_file_that_cannot_be_read_is_no_lack_of_one(setup):
    """503, to be tried again."""
    (setup.folder / "shop-1.bundle").unlink()
    (setup.folder / "shop-1.bundle").mkdir()
    with pytest.raises(Unavailable):
        setup.bundles.open(deployment(1))


def test_without_the_option_every_bundle_is_missing(tmp_path):
    """404 with a word of its own, which names the flag."""
    answer = Setup(tmp_path, has_bundles=False).get()
    assert (answer.status_code, answer.json()["code"]) == (404, "no_bundle")
    assert "--bundles" in answer.json()["error"]


def test_bundles_are_behind_the_same_door(tmp_path):
    """401 without a key, and each download counts as a request."""
    key, text = ApiKey.issue("shop-app")
    (tmp_path / "keys").write_text(f"{key}\n")
    setup = Setup(tmp_path, access=Access(ApiKeys(tmp_path / "keys"), requests=Buckets(0.01, 1)), private=True)
    assert setup.get().status_code == 401
    assert [setup.get(Authorization=f"Bearer {text}").status_code for _ in range(2)] == [200, 429]


def test_a_folder_that_is_not_there_is_said_at_the_start(tmp_path):
    """By its name."""
    with pytest.raises(ConfigError, match="nowhere"):
        Bundles(tmp_path / "nowhere")
