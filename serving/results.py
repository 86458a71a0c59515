"""Answers that are fetched later: a request that prefers so gets a ticket, under which its answer lies for a while.

They lie in files, so that each of several gateway processes on one port hands out
what another computed. A file is written in one step, belongs to the client that
asked, and is gone when its time is over.

Source: RFC 7240, section 4.1 (respond-async); RFC 9110, section 15.3.3 (202).
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson
from starlette.responses import Response

from hybrid.errors import ConfigError, Overloaded, ServingError, Unavailable, UnknownTicket
from hybrid.files import take_from_group

log = logging.getLogger(__name__)

PATH = "/v2/results"
MAX_RESULTS = 20_000
ENTRY_BYTES = 1 << 10  # that an entry counts at least, so that an error always has room in the place of its answer
LATE_S = 5.0  # after its deadline an answer is encoded and written
LONGEST_S = 30 * 86_400
FINISH_S = 8.0  # for what was taken when the gateway is to end
SWEEP_S = 5.0
LOCKED_S, LOCK_AGAIN_S = 2.0, 0.005  # that the folder's lock is waited for, and between two tries
MAX_PREFER = 1_024  # characters; a longer header is not read
_TICKET = re.compile(r"[0-9a-f]{32}", re.ASCII)
_DRAFT = re.compile(r"[0-9a-f]{32}\.new", re.ASCII)
_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*")+')
Take = Callable[[], Awaitable[None]]  # says that a request was taken; raises Overloaded or Unavailable where it is not


@dataclass(frozen=True)
class Ticket:
    """An answer that is being computed.

    Attributes:
        id: 128 random bits, 32 hexadecimal digits.
        expires_ms: Unix time in milliseconds, UTC; from then on nothing is known of it.
    """

    id: str
    expires_ms: int


@dataclass(frozen=True)
class Answer:
    """What the request would have been answered with at once: a prediction or an error."""

    status: int
    headers: dict[str, str]
    body: bytes


class Results(Protocol):
    """Where answers wait to be fetched. It may block, and threads may share it.

    A client is what `serving.access.Access.admit` returns. To another one a ticket is unknown.
    """

    def open(self, client: str) -> Ticket:
        """A ticket for an answer that comes.

        Raises:
            Overloaded: there is no room for it.
            Unavailable: it cannot be kept.
        """

    def keep(self, ticket: Ticket, client: str, answer: Answer) -> None:
        """Puts the answer where `find` finds it, unless the ticket was removed meanwhile.

        Raises:
            Overloaded: there is no room for it; for one of half an `ENTRY_BYTES` there always is.
            Unavailable: it cannot be kept.
        """

    def find(self, ticket: str, client: str) -> Answer | Ticket:
        """The answer, or the ticket while it is being computed.

        Raises:
            UnknownTicket: there is none of that text, or no more, or of another client.
            Unavailable: it was never finished.
        """

    def remove(self, ticket: str, client: str) -> None:
        """Forgets an answer, also one that is still to come.

        Raises:
            UnknownTicket: see `find`.
        """

    def sweep(self) -> None:
        """Forgets what has expired."""


class ResultFiles:
    """`Results` in a folder that the processes of one machine share.

    A file is one line of JSON, then the answer's body. Its modification time is when
    it expires, so a sweep opens none. All that changes the folder does so under a lock
    on `.totals`, which holds how many entries there are and their bytes; each sweep
    counts them anew.

    Args:
        folder: made where it is not there, for its owner alone.
        now_ms: Unix time in milliseconds, UTC; the same clock for all processes.
        deadline_s: within which a request is answered.
        keep_s: from the request on.
        max_bytes, max_results: of all clients together.

    Raises:
        ConfigError: the folder cannot be used, or others may write there, or answers would expire before they are due.
    """

    def __init__(
        self,
        folder: Path,
        now_ms: Callable[[], int],
        *,
        deadline_s: float,
        keep_s: float,
        max_bytes: int,
        max_results: int = MAX_RESULTS,
    ) -> None:
        due_s = deadline_s + LATE_S
        if not due_s <= keep_s <= LONGEST_S:
            raise ConfigError(
                f"--results-s must be {due_s:g} (the deadline, and {LATE_S:g} s to write an answer) to {LONGEST_S}, "
                f"got {keep_s:g}"
            )
        self._folder, self._now_ms = folder, now_ms
        self._due_ms, self._keep_ms = int(1000 * due_s), int(1000 * keep_s)
        self._max_results, self._max_bytes = max_results, max_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            take_from_group(folder)
            if folder.stat().st_mode & 0o022:
                raise ConfigError(f"the results' folder {str(folder)!r} must be writable by its owner only (chmod 700)")
            with self._locked():
                pass
        except OSError as error:
            raise ConfigError(
                f"the results' folder must be one that can be written, got {str(folder)!r}: {error.strerror}"
            ) from None

    def open(self, client: str) -> Ticket:
        """See `Results`."""
        now_ms = self._now_ms()
        ticket = Ticket(secrets.token_hex(16), now_ms + self._keep_ms)
        head = {"client": _mark(ticket.id, client), "expires_ms": ticket.expires_ms, "due_ms": now_ms + self._due_ms}
        with self._told(), self._locked() as totals:
            if totals.entries >= self._max_results or totals.size + ENTRY_BYTES > self._max_bytes:
                raise Overloaded("too many results wait to be fetched; fetch and delete some, or ask without Prefer")
            self._write(ticket, head, b"")
            totals.change(1, ENTRY_BYTES)
        return ticket

    def keep(self, ticket: Ticket, client: str, answer: Answer) -> None:
        """See `Results`."""
        head = {"client": _mark(ticket.id, client), "expires_ms": ticket.expires_ms}
        head |= {"status": answer.status, "headers": answer.headers}
        with self._told(), self._locked() as totals:
            try:
                before = _counted(self._file(ticket.id).stat().st_size)
            except FileNotFoundError:  # removed, or expired
                return
            grows = _counted(len(_line(head)) + len(answer.body)) - before
            if grows > 0 and totals.size + grows > self._max_bytes:
                raise Overloaded("there is no room for the result; fetch and delete some, or ask without Prefer")
            self._write(ticket, head, answer.body)
            totals.change(0, grows)

    def find(self, ticket: str, client: str) -> Answer | Ticket:
        """See `Results`."""
        head, body = self._read(ticket, client)
        if "status" in head:
            return Answer(head["status"], head["headers"], body)
        if self._now_ms() >= head["due_ms"]:
            raise Unavailable("the gateway that took it ended before its answer was there; ask again")
        return Ticket(ticket, head["expires_ms"])

    def remove(self, ticket: str, client: str) -> None:
        """See `Results`."""
        self._read(ticket, client)
        with self._told(), self._locked() as totals, suppress(FileNotFoundError):
            size = self._file(ticket).stat().st_size
            self._file(ticket).unlink()
            totals.change(-1, -_counted(size))

    def sweep(self) -> None:
        """See `Results`. What is not ours is left where it is."""
        now_ns = self._now_ms() * 1_000_000
        with self._told(), self._locked() as totals:
            entries = size = 0
            for entry in os.scandir(self._folder):
                if _DRAFT.fullmatch(entry.name):  # whoever wrote it held the lock, and is gone
                    os.unlink(entry.path)
                elif _TICKET.fullmatch(entry.name):
                    stat = entry.stat(follow_symlinks=False)
                    if stat.st_mtime_ns <= now_ns:
                        os.unlink(entry.path)
                    else:
                        entries, size = entries + 1, size + _counted(stat.st_size)
            totals.entries, totals.size = entries, size

    def _read(self, ticket: str, client: str) -> tuple[dict[str, Any], bytes]:
        if not _TICKET.fullmatch(ticket):  # before it becomes a path
            raise _unknown()
        try:
            line, _, body = self._file(ticket).read_bytes().partition(b"\n")
            head: dict[str, Any] = orjson.loads(line)
        except FileNotFoundError:
            raise _unknown() from None
        except (OSError, ValueError) as error:
            log.error("a result cannot be read: %s", type(error).__name__)
            raise Unavailable("the result cannot be read now") from None
        if not hmac.compare_digest(head["client"], _mark(ticket, client)) or self._now_ms() >= head["expires_ms"]:
            raise _unknown()
        return head, body

    def _write(self, ticket: Ticket, head: dict[str, Any], body: bytes) -> None:
        """In one step, for its owner alone."""
        draft = self._folder / f"{ticket.id}.new"
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_line(head))
                file.write(body)
            expires_ns = ticket.expires_ms * 1_000_000
            os.utime(draft, ns=(expires_ns, expires_ns))
            draft.replace(self._file(ticket.id))
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    def _file(self, ticket: str) -> Path:
        return self._folder / ticket

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the file system refuses is told to the caller as passing, and to us by its name."""
        try:
            yield
        except OSError as error:
            log.error("the results' folder cannot be used: %s", error.strerror)
            raise Unavailable("results cannot be kept now") from None

    @contextmanager
    def _locked(self) -> Iterator[_Totals]:
        """The folder, while no other thread or process changes it, and what lies there."""
        descriptor = os.open(self._folder / ".totals", os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            _lock(descriptor)  # until it is closed
            totals = _Totals.parse(file.read())
            try:
                yield totals
            finally:
                file.seek(0)
                file.write(b"%20d %20d" % (totals.entries, totals.size))


@dataclass
class _Totals:
    """Entries in the folder, and what they count; until the first sweep there are none."""

    entries: int = 0
    size: int = 0

    @classmethod
    def parse(cls, text: bytes) -> _Totals:
        found = re.fullmatch(rb" *(\d{1,20}) +(\d{1,20})", text)
        return cls(int(found[1]), int(found[2])) if found else cls()

    def change(self, entries: int, size: int) -> None:
        """Down to nothing and no further: a sweep may have counted what is taken away now."""
        self.entries, self.size = max(0, self.entries + entries), max(0, self.size + size)


class Later:
    """Requests that are answered later. Lives on one event loop.

    Args:
        results: where the answers go.
        refuse: the response that tells of an error.
    """

    def __init__(self, results: Results, refuse: Callable[[ServingError], Response]) -> None:
        self._results, self._refuse = results, refuse
        self._running: set[asyncio.Task[Response]] = set()

    async def answer(self, client: str, work: Callable[[Take], Awaitable[Response]]) -> Response:
        """202 and a ticket as soon as the request was taken; what comes of it before that is the answer itself.

        Args:
            client: who asks.
            work: answers the request; awaits its argument once, when all is checked and the waiting begins. It raises
                nothing but what `refuse` can tell.

        Raises:
            ServingError: the request was not taken.
        """
        taken: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()

        async def take() -> None:
            taken.set_result(await asyncio.to_thread(self._results.open, client))

        task = asyncio.create_task(self._finish(client, work(take), taken))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            await asyncio.wait((task, taken), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not taken.done():
                task.cancel()
            raise
        if not taken.done():
            return await task
        ticket = taken.result()
        return _pending(ticket, {"Location": f"{PATH}/{ticket.id}", "Preference-Applied": "respond-async"})

    async def fetch(self, client: str, ticket: str) -> Response:
        """The answer as it would have come at once, or 202 while it is being computed.

        Raises:
            UnknownTicket, Unavailable: see `Results.find`.
        """
        found = await asyncio.to_thread(self._results.find, ticket, client)
        if isinstance(found, Ticket):
            return _pending(found, {})
        return Response(found.body, found.status, found.headers | {"Cache-Control": "no-store"})

    async def forget(self, client: str, ticket: str) -> Response:
        """204; the answer is gone.

        Raises:
            UnknownTicket: see `Results.find`.
        """
        await asyncio.to_thread(self._results.remove, ticket, client)
        return Response(status_code=204)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Forgets what has expired while entered; is left when what was taken has its answer: see `finish`."""
        sweeping = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            await self.finish()
            sweeping.cancel()

    async def finish(self, timeout_s: float = FINISH_S) -> None:
        """Returns when all that was taken has its answer; what is not ready by then is told "unavailable"."""
        if not self._running:
            return
        _, late = await asyncio.wait(self._running, timeout=timeout_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    async def _sweep(self) -> None:
        while True:
            with suppress(Unavailable):  # it was logged
                await asyncio.to_thread(self._results.sweep)
            await asyncio.sleep(SWEEP_S)

    async def _finish(self, client: str, working: Awaitable[Response], taken: asyncio.Future[Ticket]) -> Response:
        try:
            response = await working
        except ServingError as error:
            if not taken.done():
                raise
            response = self._refuse(error)
        except asyncio.CancelledError:
            if taken.done():
                await self._keep(taken.result(), client, self._refuse(Unavailable("the gateway is stopping")))
            raise
        if taken.done():
            await self._keep(taken.result(), client, response)
        return response

    async def _keep(self, ticket: Ticket, client: str, response: Response) -> None:
        try:
            await asyncio.to_thread(self._results.keep, ticket, client, _answer(response))
        except Overloaded as error:
            with suppress(ServingError):
                await asyncio.to_thread(self._results.keep, ticket, client, _answer(self._refuse(error)))
        except Unavailable:
            pass  # it was logged; when it is due the client is told so


def prefers_async(headers: Sequence[str]) -> bool:
    """Whether a request's Prefer headers ask for an answer later; of other preferences no notice is taken."""
    text = ",".join(headers)
    if len(text) > MAX_PREFER:
        return False
    for preference in _PREFERENCE.findall(text):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "respond-async":
            return value.strip() in {"", '""'}
    return False


def _pending(ticket: Ticket, headers: dict[str, str]) -> Response:
    content = orjson.dumps({"ticket": ticket.id, "expires_ms": ticket.expires_ms})
    headers = headers | {"Retry-After": "1", "Cache-Control": "no-store"}
    return Response(content, 202, headers, media_type="application/json")


def _answer(response: Response) -> Answer:
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    return Answer(response.status_code, headers, bytes(response.body))


def _unknown() -> UnknownTicket:
    return UnknownTicket("there is no such result, or no more: it was removed, it expired, or another client asked")


def _mark(ticket: str, client: str) -> str:
    """The client, so that only its equal has the same mark, and nobody can tell whose two files of one client are."""
    # A token's subject may hold what is no Unicode text.
    return hmac.digest(ticket.encode(), client.encode(errors="surrogatepass"), hashlib.sha256).hex()


def _line(head: dict[str, Any]) -> bytes:
    return orjson.dumps(head) + b"\n"


def _counted(size: int) -> int:
    return max(ENTRY_BYTES, size)


def _lock(descriptor: int) -> None:
    """Raises TimeoutError where another has it for too long, as one that was stopped."""
    deadline_s = time.monotonic() + LOCKED_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise TimeoutError(None, "it is locked by another process") from None
            time.sleep(LOCK_AGAIN_S)
