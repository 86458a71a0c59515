"""The console over HTTP: who may ask, what is answered, and that nothing is done before a second yes.

| request | answer |
|---|---|
| `GET /health` | 200, and nothing else, to anybody |
| `GET /login`, `POST /login` | the form; a session |
| `GET /`, `GET /models/NAME` | the pages |
| `POST /models/NAME/canary`, `promote`, `halt` | the second question, with a token that counts once |
| `POST /models/NAME/confirm` | does it, if the rollout is as it was shown |
| `POST /logout` | ends the session |

The cookie's port is nobody's: other services of this host's name get it too, and are of the same site. So what is asked
by a form must come from the console's own origin, and hold a token of the session.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid.console import pages
from hybrid.console.sessions import SESSION_S, Refused, Session, Sessions
from hybrid.console.steps import Changed, Seen, Step, question
from hybrid.console.work import Desk
from hybrid.errors import HybridError, NotFound
from hybrid.report.page import source_of

MAX_BODY = 8 << 10
MOST_FIELDS = 8
FOLLOW_S = 2  # after which a page that shows something at work is asked for again
NAME = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)

log = logging.getLogger(__name__)
Form = Mapping[str, str]


@dataclass(frozen=True)
class Console:
    """What the pages are made of, and what does what they ask for.

    Attributes:
        models: all, for the overview.
        model: one, with all that its page shows; raises NotFound.
        seen: its rollout now; raises NotFound.
        desk: does what was confirmed.
        sessions: who may ask.
    """

    models: Callable[[], list[pages.Model]]
    model: Callable[[str], pages.Model]
    seen: Callable[[str], Seen]
    desk: Desk
    sessions: Sessions


@dataclass(frozen=True)
class Place:
    """Where browsers find the console.

    Attributes:
        names: of its host, in lower case, at any port: another name was made to point here by somebody else.
        tls: whether by HTTPS.
    """

    names: frozenset[str]
    tls: bool

    @property
    def scheme(self) -> str:
        """Of its addresses."""
        return "https" if self.tls else "http"

    @property
    def cookie(self) -> str:
        """Its name: under TLS one that browsers take from this host alone, by TLS alone."""
        return "__Host-hybrid-console" if self.tls else "hybrid-console"

    def is_own(self, headers: Mapping[str, str], method: str) -> bool:
        """Whether a request was made for the console, and one that asks for a change by a page of it."""
        host = headers.get("host", "").lower()
        found = HOST.fullmatch(host)
        own = found is not None and found["name"] in self.names
        if method in ("GET", "HEAD"):
            return own
        own &= headers.get("origin", "").lower() == f"{self.scheme}://{host}"
        return own and headers.get("sec-fetch-site", "same-origin") == "same-origin"


def application(console: Console, place: Place) -> ASGIApp:
    """The ASGI application."""
    app = _App(console, place)
    routes = [
        Route("/health", _health, methods=["GET"]),
        Route("/login", app.login_form, methods=["GET"]),
        Route("/login", app.log_in, methods=["POST"]),
        Route("/logout", app.within(app.log_out), methods=["POST"]),
        Route("/", app.within(app.overview), methods=["GET"]),
        Route("/models/{name}", app.within(app.model), methods=["GET"]),
        Route("/models/{name}/confirm", app.within(app.confirm), methods=["POST"]),
        *(
            Route(f"/models/{{name}}/{kind}", app.within(partial(app.ask, kind)), methods=["POST"])
            for kind in ("canary", "promote", "halt")
        ),
    ]
    inner = Starlette(routes=routes, exception_handlers={HTTPException: _no_such_page})
    return _Guarded(inner, place)


class _App:
    """Answers of the pages."""

    def __init__(self, console: Console, place: Place) -> None:
        self._console, self._place = console, place

    def within(
        self, answer: Callable[[Request, Session], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Answers those who are logged in; others are shown where to log in, and what is refused is said."""

        async def answered(request: Request) -> Response:
            session = self._console.sessions.of(request.cookies.get(self._place.cookie))
            if session is None:
                return RedirectResponse("/login", 303)
            back = f"/models/{request.path_params['name']}" if "name" in request.path_params else "/"
            try:
                if not NAME.fullmatch(request.path_params.get("name", "x")):
                    raise NotFound("no model has such a name")
                return await answer(request, session)
            except Refused as error:
                title, status, said = "Not done", error.status, str(error)
            except Changed as error:
                title, status, said = "Not done", 409, str(error)
            except NotFound as error:
                title, status, said, back = "Not found", 404, str(error), "/"
            except HybridError as error:
                title = "Not done" if request.method == "POST" else "It cannot be shown"
                status, said = 400, str(error)
            return HTMLResponse(pages.refused(title, said, session.csrf, back), status)

        return answered

    async def login_form(self, _request: Request) -> Response:
        return HTMLResponse(pages.login())

    async def log_in(self, request: Request) -> Response:
        try:
            form = await _form(request)
            identity = self._console.sessions.log_in(form.get("password", ""))
        except Refused as error:
            log.warning("refused to log in: %s", error)
            headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
            return HTMLResponse(pages.login(str(error)), error.status, headers)
        log.info("somebody logged in")
        answer = RedirectResponse("/", 303)
        place = self._place
        answer.set_cookie(
            place.cookie, identity, max_age=int(SESSION_S), path="/", secure=place.tls, httponly=True, samesite="strict"
        )
        return answer

    async def log_out(self, request: Request, session: Session) -> Response:
        session.check_form((await _form(request)).get("csrf", ""))
        self._console.sessions.log_out(request.cookies.get(self._place.cookie))
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(self._place.cookie, path="/", secure=self._place.tls, httponly=True, samesite="strict")
        return answer

    async def overview(self, _request: Request, session: Session) -> Response:
        models = await asyncio.to_thread(self._console.models)
        return HTMLResponse(pages.overview(models, session.csrf, datetime.now(UTC)))

    async def model(self, request: Request, session: Session) -> Response:
        model = await asyncio.to_thread(self._console.model, request.path_params["name"])
        headers = {"Refresh": str(FOLLOW_S)} if model.busy else {}
        return HTMLResponse(pages.model_page(model, session.csrf, datetime.now(UTC)), headers=headers)

    async def ask(self, kind: str, request: Request, session: Session) -> Response:
        """The first button: nothing is done yet."""
        form = await _form(request)
        session.check_form(form.get("csrf", ""))
        step = Step.of(kind, request.path_params["name"], form)
        seen = await asyncio.to_thread(self._console.seen, step.model)
        asked = question(step, seen)
        token = self._console.sessions.ask(session, step, seen)
        return HTMLResponse(pages.confirm(step, asked, seen, token, session.csrf))

    async def confirm(self, request: Request, session: Session) -> Response:
        """The second one."""
        form = await _form(request)
        session.check_form(form.get("csrf", ""))
        asked = self._console.sessions.confirmed(session, form.get("token", ""))
        model = asked.step.model
        if model != request.path_params["name"]:
            raise Refused(409, "this yes is to another model's question. Nothing was done")
        now = await asyncio.to_thread(self._console.seen, model)
        asked.seen.check_seen(now)
        await asyncio.to_thread(self._console.desk.begin, asked.step, asked.seen)
        return RedirectResponse(f"/models/{model}", 303)


async def _health(_request: Request) -> Response:
    return PlainTextResponse("ready\n")


async def _no_such_page(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = "there is no such page" if error.status_code == 404 else "that is not how this page is asked for"
    page = pages.refused("Not found", said, None)
    return HTMLResponse(page, error.status_code, error.headers)


async def _form(request: Request) -> Form:
    """Fields of a form, each once.

    Raises:
        Refused: it is none, or too large.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise Refused(413, f"a form must have at most {MAX_BODY} bytes")
    except ClientDisconnect:
        raise Refused(400, "the connection ended before the form did") from None
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise Refused(415, "a form must be application/x-www-form-urlencoded")
    try:
        fields = parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS)
    except ValueError:
        raise Refused(400, "this is no form") from None
    if len(dict(fields)) < len(fields):
        raise Refused(400, "a field of the form is there twice")
    return dict(fields)


class _Guarded:
    """Refuses what was not made for the console; forbids browsers what its pages do not need."""

    def __init__(self, app: ASGIApp, place: Place) -> None:
        self._app, self._place = app, place
        allowed = f"style-src '{source_of(pages.style())}'; img-src data:; form-action 'self'"
        policy = f"default-src 'none'; {allowed}; frame-ancestors 'none'; base-uri 'none'"
        self._headers = {
            "Content-Security-Policy": policy,
            "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            # Nothing to others; with "no-referrer" browsers would call the origin of our own forms "null".
            "Referrer-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cache-Control": "no-store",
            "Connection": "close",  # each connection has its bounded time: see `TimedHttp`
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(key.lower().encode(), value.encode()) for key, value in self._headers.items()]
                message["headers"] = [*message.get("headers", ()), *ours]
            await send(message)

        request = Request(scope, receive)
        probe = request.url.path == "/health"  # who probes calls a pod by its address
        if not (probe or self._place.is_own(request.headers, request.method)):
            answer = PlainTextResponse("only a browser at the console's own address may ask here\n", 403)
            await answer(scope, receive, guarded)
            return
        try:
            await self._app(scope, receive, guarded)  # which has answered 500 where it raises
        except Exception as error:
            log.error("internal error: %s", type(error).__name__)  # its text may name what no log should
