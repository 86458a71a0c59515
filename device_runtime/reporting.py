"""One device reports how far it came last week: what its journal says, in one bounded vector, once.

Conditions are its own, and lax: were they training's, only devices that can train would be counted. Whatever bundle
the device has, or none, it answers; each after a delay that it draws, so that nobody learns when its week began.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np

from device_runtime import RUNTIME
from device_runtime.answering import lacks, reported
from device_runtime.participation import Ended, Ending, Session
from device_runtime.protocol import Event, Upload
from hybrid.journal import TEXTS
from hybrid.plan import CheckIn, Halt, Plan, Policy, QueryPlan
from hybrid.update import encode
from hybrid.week import WEEK_S, at, begin_of, last_week

SPREAD_S = 6 * 86_400.0  # from the beginning of a week, in which devices report about the last one


@dataclass(kw_only=True)
class Report(Session):
    """One session that reports: it sends the report that waits, or asks for the query about last week's journals.

    It is no participation: no training's or query's turn, history or policy knows of it, nor it of them.

    Attributes:
        model: of the store.
        spread_s: a device draws when it reports, from so many seconds since the beginning of a week; >= 0.
        own: the host app's conditions; None: consent alone, which is always asked.
    """

    model: str
    spread_s: float = SPREAD_S
    own: Policy | None = None

    async def _session(self) -> None:
        if not self.host.read().consent:
            self._withdraw()
        if waiting := self.store.pending(self.now_ms(), device=self.device, reports=True):
            self._move(Event.FOUND)
            await self._send(waiting[0])
            return
        week = last_week(at(self.now_ms()))
        self._require_due(week)
        self._require(*self._policies(Policy()), history=())
        message, _ = await self._ask(CheckIn(model=self.model, runtime=RUNTIME), 0)
        if isinstance(message, Halt):
            self._heed(message, self.model)
            raise Ended(Ending.NOTHING, "versions were stopped", ask_again_s=self._later(None))
        await self._send(await self._reported(self._asked(message, week), week))

    def _require_due(self, week: str) -> None:
        """Waits for the time of this week that it drew."""
        now_ms = self.now_ms()
        begun_ms = int(begin_of(at(now_ms)).timestamp() * 1e3)
        due_ms = self.store.journal(self.device).due(week, begun_ms + int(1e3 * self.spread_s * self.toss()))
        if due_ms is None:
            next_s = WEEK_S - (now_ms - begun_ms) / 1e3
            raise Ended(Ending.TAKEN_PART, f"week {week} was reported", ask_again_s=next_s)
        if now_ms < due_ms:
            raise Ended(Ending.NOT_ITS_TURN, "its time is later this week", ask_again_s=(due_ms - now_ms) / 1e3)

    def _asked(self, plan: Plan, week: str) -> QueryPlan:
        """The plan, if it is about that week's journals and nothing else."""
        later_s = self._later(None)
        if plan.model != self.model:
            raise Ended(Ending.OTHER_MODEL, f"the plan is for model {plan.model!r}", ask_again_s=later_s)
        if not isinstance(plan, QueryPlan) or plan.query.week != week or lacks(plan.query, TEXTS):
            why = f"a report answers a query about the journals of {week} alone"
            raise Ended(Ending.CANNOT_ANSWER, why, ask_again_s=later_s)
        if self.now_ms() >= plan.expires_ms:
            raise Ended(Ending.EXPIRED, "the plan has expired", ask_again_s=later_s)
        if found := self._cannot_show(plan):
            raise Ended(*found, ask_again_s=later_s)
        self._move(Event.OFFERED)
        return plan

    async def _reported(self, plan: QueryPlan, week: str) -> Upload:
        """A report that is in the store: from then on the week is reported, whatever becomes of it."""
        token = await self._token(plan)
        journal = self.store.journal(self.device)
        with self.store.together():
            if not journal.begin(week):
                raise Ended(Ending.TAKEN_PART, f"week {week} was reported meanwhile", ask_again_s=self._later(None))
            self._move(Event.BEGUN)
            body = token + encode(reported(plan, journal.of(week)), plan.upload, np.random.default_rng())
            upload = Upload(plan.id, secrets.token_hex(16), body, plan.expires_ms, plan.version, Policy(), reports=True)
            self.store.keep_upload(upload, device=self.device)
            if plan.token is not None:
                self.store.spend(plan.token.scope, device=self.device)
        self._move(Event.TRAINED)
        return upload

    def _policies(self, asked: Policy) -> tuple[Policy, ...]:
        return () if self.own is None else (self.own,)

    def _check_version(self, version: int) -> None:
        """Any version's device may tell that it was stopped."""
