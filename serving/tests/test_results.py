"""What a ticket stands for, from the request that got it to the end of its time."""

import asyncio
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import ConfigError, Overloaded, Unavailable, UnknownEntity, UnknownTicket
from serving import results as module
from serving.access import Access, Buckets
from serving.deployments import Deployments
from serving.gateway import Gateway, application, refused
from serving.oip import Answers
from serving.results import ENTRY_BYTES, Answer, Later, ResultFiles, prefers_async
from serving.telemetry import Telemetry
from serving.testing import deployment
from serving.tests.test_gateway import BODY

ANSWER = Answer(200, {"content-type": "application/json"}, b'{"a": 1}\nand more\n')
MIB = 1 << 20
ASYNC = {"Prefer": "respond-async"}


class Clock:
    def __init__(self):
        self.ms = 1_000_000

    def __call__(self):
        return self.ms


@pytest.fixture
def clock():
    return Clock()


def files(folder, clock, **options):
    """Due 15 s after the request (a deadline of 10, and 5 to write it), and kept for 60."""
    return ResultFiles(folder / "results", clock, **({"deadline_s": 10, "keep_s": 60, "max_bytes": MIB} | options))


def kept(folder):
    return sorted(path.name for path in (folder / "results").iterdir() if path.name != ".totals")


def test_an_answer_is_pending_until_it_is_kept_and_then_found_as_it_was(tmp_path, clock):
    """By another process too: it has nothing in common with the first but the folder."""
    first, second = files(tmp_path, clock), files(tmp_path, clock)
    ticket = first.open("app")
    assert ticket.expires_ms == 1_060_000
    assert second.find(ticket.id, "app") == ticket
    second.keep(ticket, "app", ANSWER)
    assert [each.find(ticket.id, "app") for each in (first, second)] == [ANSWER] * 2


def test_a_ticket_cannot_be_guessed_and_its_file_is_its_owners(tmp_path, clock):
    """128 random bits; mode 0600 in a folder of 0700; neither the file nor its name tells the client."""
    results = files(tmp_path, clock)
    tickets = {results.open("shop-app").id for _ in range(100)}
    assert len(tickets) == 100
    assert all(len(bytes.fromhex(ticket)) == 16 for ticket in tickets)
    assert (tmp_path / "results").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "results").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert "shop-app" not in path.name + path.read_text()


def test_two_results_of_one_client_do_not_show_that_they_are(tmp_path, clock):
    """The client's mark differs from ticket to ticket."""
    results = files(tmp_path, clock)
    marks = [json.loads((tmp_path / "results" / results.open("app").id).read_text())["client"] for _ in range(2)]
    assert marks[0] != marks[1]


@pytest.mark.parametrize("other", ["", "App", "app2", "\ud800"])
def test_to_another_client_a_ticket_is_unknown(tmp_path, clock, other):
    """It can neither be seen, pending or done, nor removed."""
    results = files(tmp_path, clock)
    ticket = results.open("app")
    for _ in range(2):
        for act in (results.find, results.remove):
            with pytest.raises(UnknownTicket):
                act(ticket.id, other)
        results.keep(ticket, "app", ANSWER)
    assert results.find(ticket.id, "app") == ANSWER


@pytest.mark.parametrize(
    "text", ["", "..", "../secret", "0" * 31, "0" * 33, "A" * 32, "0" * 32 + "\n", ".totals", "٣" * 32]
)
def test_what_is_no_ticket_becomes_no_path(tmp_path, clock, text):
    """Nor does one that was never given."""
    results = files(tmp_path, clock)
    (tmp_path / "secret").write_text("{}")
    for wrong in (text, "0" * 32):
        for act in (results.find, results.remove):
            with pytest.raises(UnknownTicket):
                act(wrong, "app")


def test_a_result_expires(tmp_path, clock):
    """At 60 s it is unknown, and the next sweep takes its file; one that is asked a second later stays."""
    results = files(tmp_path, clock)
    old = results.open("app")
    results.keep(old, "app", ANSWER)
    clock.ms += 1_000
    young = results.open("app")
    clock.ms = old.expires_ms - 1
    assert results.find(old.id, "app") == ANSWER
    clock.ms += 1
    with pytest.raises(UnknownTicket):
        results.find(old.id, "app")
    results.sweep()
    assert kept(tmp_path) == [young.id]


def test_a_gateway_that_died_leaves_no_ticket_pending_for_ever(tmp_path, clock):
    """After the deadline of 10 s and 5 s to write: 503, and it can be removed; a later answer still counts."""
    results = files(tmp_path, clock)
    ticket = results.open("app")
    clock.ms += 14_999
    assert results.find(ticket.id, "app") == ticket
    clock.ms += 1
    with pytest.raises(Unavailable, match="the gateway that took it ended"):
        results.find(ticket.id, "app")
    results.keep(ticket, "app", ANSWER)
    assert results.find(ticket.id, "app") == ANSWER
    results.remove(ticket.id, "app")
    assert kept(tmp_path) == []


def test_what_was_removed_does_not_come_back(tmp_path, clock):
    """The answer to a ticket that was removed while it was computed is dropped."""
    results = files(tmp_path, clock)
    ticket = results.open("app")
    results.remove(ticket.id, "app")
    results.keep(ticket, "app", ANSWER)
    assert kept(tmp_path) == []
    with pytest.raises(UnknownTicket):
        results.remove(ticket.id, "app")


def test_there_is_room_for_so_many_and_no_more(tmp_path, clock):
    """Two for both processes together: the third is refused until one is removed, or has expired and was swept."""
    first, second = (files(tmp_path, clock, max_results=2) for _ in range(2))
    one = first.open("app")
    clock.ms += 1_000
    second.open("app")
    for each in (first, second):
        with pytest.raises(Overloaded):
            each.open("other")
    second.remove(one.id, "app")
    first.open("app")
    clock.ms += 60_000
    with pytest.raises(Overloaded):
        first.open("app")
    second.sweep()
    first.open("app")


def test_there_is_room_for_so_many_bytes_and_an_error_always_has_some(tmp_path, clock):
    """Of 4 KiB two tickets take 1 each; 2 KiB and their line would be 5 in all, so they are refused, and 0.5 fit."""
    results = files(tmp_path, clock, max_bytes=4 * ENTRY_BYTES)
    first, _ = results.open("app"), results.open("app")
    with pytest.raises(Overloaded):
        results.keep(first, "app", Answer(200, {}, bytes(3 * ENTRY_BYTES)))
    assert results.find(first.id, "app") == first
    results.keep(first, "app", Answer(200, {}, bytes(2 * ENTRY_BYTES)))
    with pytest.raises(Overloaded):
        results.open("app")
    small = Answer(429, {}, bytes(ENTRY_BYTES // 2))
    results.keep(first, "app", small)
    assert results.find(first.id, "app") == small
    results.open("app")


def test_a_sweep_counts_what_is_there_and_takes_only_what_is_ours(tmp_path, clock):
    """The draft of a process that was killed goes; a stranger's files stay; a count that is wrong is right again."""
    results = files(tmp_path, clock, max_results=2)
    ticket, folder = results.open("app"), tmp_path / "results"
    (folder / ("0" * 32 + ".new")).write_text("half")
    (folder / "notes.txt").write_text("a stranger's")
    os.utime(folder / "notes.txt", (0, 0))
    (folder / ".totals").write_text("9 9")
    with pytest.raises(Overloaded):
        results.open("app")
    results.sweep()
    assert kept(tmp_path) == sorted([ticket.id, "notes.txt"])
    results.open("app")


def test_many_at_once_are_counted_right(tmp_path, clock):
    """Eight threads of two processes' stores open and remove 400; exactly those left are counted."""
    stores = [files(tmp_path, clock) for _ in range(2)]

    def work(number):
        results = stores[number % 2]
        tickets = [results.open("app") for _ in range(50)]
        for ticket in tickets[:40]:
            results.keep(ticket, "app", Answer(200, {}, bytes(2_000)))
            results.remove(ticket.id, "app")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(kept(tmp_path)) == 80
    entries, size = map(int, (tmp_path / "results" / ".totals").read_text().split())
    assert (entries, size) == (80, 80 * ENTRY_BYTES)


def test_a_lock_that_is_not_given_back_is_no_reason_to_hang(tmp_path, clock, monkeypatch):
    """As of a process that was stopped: unavailable, after a while."""
    monkeypatch.setattr(module, "LOCKED_S", 0.05)
    results = files(tmp_path, clock)
    with results._locked(), pytest.raises(Unavailable):
        results.open("app")
    results.open("app")


def test_a_folder_that_is_gone_makes_results_unavailable(tmp_path, clock, caplog):
    """Said to the caller as passing, and to us by what the system says."""
    results = files(tmp_path, clock)
    (tmp_path / "results" / ".totals").unlink()
    (tmp_path / "results").rmdir()
    with pytest.raises(Unavailable):
        results.open("app")
    assert "No such file" in caplog.text


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda folder: folder.mkdir(mode=0o777) or folder.chmod(0o777), {}, "writable by its owner only"),
        (lambda folder: folder.write_text(""), {}, "must be one that can be written"),
        (lambda folder: None, {"keep_s": 14}, "--results-s must be 15 "),
        (lambda folder: None, {"keep_s": float("nan")}, "--results-s must be 15 "),
        (lambda folder: None, {"keep_s": float("inf")}, "--results-s must be 15 "),
    ],
)
def test_what_cannot_be_is_said_at_the_start(tmp_path, clock, prepare, options, message):
    """A folder that others may write to, none at all, and answers that would expire before they are due."""
    prepare(tmp_path / "results")
    with pytest.raises(ConfigError, match=message):
        files(tmp_path, clock, **options)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], False),
        (["respond-async"], True),
        (["Respond-Async"], True),
        (["respond-async, wait=10"], True),
        (["return=minimal", "wait=10, respond-async;foo=bar"], True),
        (['respond-async=""'], True),
        (["respond-async=no"], False),
        (["respond-asynchronously"], False),
        (['foo="a, respond-async"'], False),
        (['foo="a\\", respond-async'], True),  # the quote does not end, so there is no text in it
        (["respond-async" + " " * 2_000], False),
        ([""], False),
    ],
)
def test_an_answer_later_is_asked_for_by_the_preference_of_that_name(headers, expected):
    """RFC 7240, section 2: a list, with parameters, in any case; one that has a value is another."""
    assert prefers_async(headers) is expected


@given(st.lists(st.text(max_size=80), max_size=4))
def test_no_prefer_header_fails(headers):
    """Whatever is sent, it is a preference or it is none."""
    assert prefers_async(headers) in (True, False)


class Setup:
    """A gateway over an `ask` that waits until it is let go, and then answers or fails."""

    def __init__(self, folder, clock, *, access=Access(), results=None):  # noqa: B008  nothing changes it
        deployment().write(folder / "deployments")
        self.error, self.go, self.asked = None, asyncio.Event(), asyncio.Event()
        self.results, self.telemetry = results or files(folder, clock), Telemetry()
        self.later = Later(self.results, refused)
        gateway = Gateway(
            Deployments(folder / "deployments"),
            self.ask,
            lambda: True,
            access,
            telemetry=self.telemetry,
            later=self.later,
        )
        transport = httpx.ASGITransport(application(gateway))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def ask(self, _, rows, __):
        self.asked.set()
        await self.go.wait()
        if self.error:
            raise self.error
        n = len(rows)
        return Answers(rows.embedding.sum(axis=1), np.full(n, 60_000), ["ok"] * n, ["none"] * n)

    async def infer(self, body=BODY, **headers):
        return await self.client.post("/v2/models/shop/infer", content=body, headers=headers)

    async def done(self):
        """Lets all go that waits, and waits until it is answered."""
        self.go.set()
        await self.later.finish(30)


def run(scenario, *given, **options):
    async def within():
        await asyncio.wait_for(scenario(Setup(*given, **options)), 30)

    asyncio.run(within())


def test_a_request_that_prefers_so_is_answered_later_as_it_would_have_been_at_once(tmp_path, clock):
    """202 with where to look; 202 with when, while it waits; then the very answer, again and again, until it is
    deleted. It is counted once it is answered."""

    async def scenario(setup):
        taken = await setup.infer(**ASYNC)
        assert (taken.status_code, taken.headers["Preference-Applied"]) == (202, "respond-async")
        where = taken.headers["Location"]
        assert where == f"/v2/results/{taken.json()['ticket']}"
        assert taken.json()["expires_ms"] == 1_060_000
        pending = await setup.client.get(where)
        assert (pending.status_code, pending.headers["Retry-After"], pending.json()) == (202, "1", taken.json())
        await setup.done()
        at_once = await setup.infer()
        for _ in range(2):
            found = await setup.client.get(where)
            assert (found.status_code, found.content) == (200, at_once.content)
            assert found.headers.pop("Cache-Control") == "no-store"
            assert found.headers == at_once.headers
        counted = {"model": "shop", "version": "1", "code": "ok"}
        assert setup.telemetry.registry.get_sample_value("hybrid_gateway_requests_total", counted) == 2
        assert (await setup.client.delete(where)).status_code == 204
        for method in ("GET", "DELETE"):
            gone = await setup.client.request(method, where)
            assert (gone.status_code, gone.json()["code"]) == (404, "unknown_ticket")

    run(scenario, tmp_path, clock)


def test_raw_tensors_come_later_as_they_are(tmp_path, clock):
    """The length of the JSON before them is a header, which is kept; the body is no text."""

    async def scenario(setup):
        body = json.dumps(json.loads(BODY) | {"parameters": {"binary_data_output": True}}).encode()
        taken = await setup.infer(body, **ASYNC)
        await setup.done()
        at_once, found = await setup.infer(body), await setup.client.get(taken.headers["Location"])
        assert found.content == at_once.content
        for name in ("Inference-Header-Content-Length", "Content-Type", "Content-Length"):
            assert found.headers[name] == at_once.headers[name]

    run(scenario, tmp_path, clock)


@pytest.mark.parametrize(
    "error", [UnknownEntity("row 1 of 1"), Unavailable("no answer"), Overloaded("too many"), KeyError("bakery")]
)
def test_an_error_comes_later_as_it_would_have_at_once(tmp_path, clock, error, caplog):
    """Status, headers and body; also of one that nobody foresaw."""

    async def scenario(setup):
        setup.error = error
        taken = await setup.infer(**ASYNC)
        assert taken.status_code == 202
        await setup.done()
        at_once, found = await setup.infer(), await setup.client.get(taken.headers["Location"])
        found.headers.pop("Cache-Control")
        assert (found.status_code, found.content, found.headers) == (
            at_once.status_code,
            at_once.content,
            at_once.headers,
        )

    run(scenario, tmp_path, clock)
    assert "bakery" not in caplog.text


def test_what_is_refused_at_once_gets_no_ticket(tmp_path, clock):
    """A body that cannot be read, a model that is not there, too many rows: each by its own status."""

    async def scenario(setup):
        setup.go.set()
        assert (await setup.infer(b"{", **ASYNC)).status_code == 400
        assert (await setup.client.post("/v2/models/other/infer", content=BODY, headers=ASYNC)).status_code == 404
        assert [(await setup.infer(**ASYNC)).status_code for _ in range(2)] == [202, 429]
        await setup.done()
        assert len(kept(tmp_path)) == 1

    run(scenario, tmp_path, clock, access=Access(rows=Buckets(0.01, 1)))


def test_without_room_a_request_is_refused_before_it_is_asked(tmp_path, clock):
    """429 `overloaded`; without Prefer it is answered."""

    async def scenario(setup):
        setup.go.set()
        full = await setup.infer(**ASYNC)
        assert (full.status_code, full.json()["code"], full.headers["Retry-After"]) == (429, "overloaded", "1")
        assert not setup.asked.is_set()
        assert (await setup.infer()).status_code == 200

    run(scenario, tmp_path, clock, results=files(tmp_path, clock, max_results=0))


def test_an_answer_for_which_there_is_no_room_is_told_so(tmp_path, clock):
    """Two take all there is; then a larger answer comes for the first: 429 in its place, not a ticket for ever."""

    async def scenario(setup):
        first, second = await setup.infer(**ASYNC), await setup.infer(**ASYNC)
        await setup.done()
        codes = {(await setup.client.get(each.headers["Location"])).status_code for each in (first, second)}
        assert codes == {429}

    tight = files(tmp_path, clock, max_bytes=2 * ENTRY_BYTES)
    large = Answer(200, {}, bytes(4 * ENTRY_BYTES))
    keep = tight.keep
    tight.keep = lambda ticket, client, answer: keep(ticket, client, large if answer.status == 200 else answer)
    run(scenario, tmp_path, clock, results=tight)


def test_a_gateway_that_ends_finishes_what_it_took(tmp_path, clock):
    """What waits is answered; what takes too long is told that it is stopping."""

    async def scenario(setup):
        async with setup.later.running():
            quick = await setup.infer(**ASYNC)
            setup.go.set()
        assert (await setup.client.get(quick.headers["Location"])).status_code == 200
        setup.go.clear()
        slow = await setup.infer(**ASYNC)
        await setup.later.finish(0.01)
        told = await setup.client.get(slow.headers["Location"])
        assert (told.status_code, told.json()) == (503, {"error": "the gateway is stopping", "code": "unavailable"})

    run(scenario, tmp_path, clock)


def test_without_the_option_prefer_changes_nothing(tmp_path):
    """RFC 7240 lets a server ignore it; there is no result to look for."""

    async def scenario():
        deployment().write(tmp_path)

        async def ask(_, rows, __):
            return Answers(np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int64), ["ok"], ["none"])

        app = application(Gateway(Deployments(tmp_path), ask, lambda: True))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            at_once = await client.post("/v2/models/shop/infer", content=BODY, headers=ASYNC)
            assert (at_once.status_code, "Preference-Applied" in at_once.headers) == (200, False)
            none = await client.get(f"/v2/results/{'0' * 32}")
            assert (none.status_code, none.json()["code"]) == (404, "unknown_ticket")
            assert "--results" in none.json()["error"]

    asyncio.run(scenario())


def test_what_has_expired_is_swept_while_the_gateway_runs(tmp_path, clock, monkeypatch):
    """The folder is empty again without anybody asking."""
    monkeypatch.setattr(module, "SWEEP_S", 0.01)

    async def scenario(setup):
        swept = threading.Event()
        sweep = setup.results.sweep

        def noted():
            sweep()
            if not kept(tmp_path):
                swept.set()

        setup.results.sweep = noted
        setup.results.open("app")
        clock.ms += 60_000
        async with setup.later.running():
            assert await asyncio.to_thread(swept.wait, 20)

    run(scenario, tmp_path, clock)
