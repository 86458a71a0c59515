"""What can be done to a rollout from the page, what it does in words, and what was seen when somebody decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from hybrid.deployment import Window
from hybrid.errors import ConfigError, HybridError

Kind = Literal["canary", "promote", "halt"]
MOST_REASON = 500  # characters
MOST_VERSION = 9  # digits


class Changed(HybridError):
    """The rollout is no longer as it was shown: nothing was done."""


@dataclass(frozen=True)
class Step:
    """One step of a rollout.

    Attributes:
        kind: "canary": some devices fetch the version; "promote": all do; "halt": it is taken back.
        model, version: which.
        share: of devices, in (0, 1]; of a canary alone.
        reason: for people, logs and devices; of a halt alone.
    """

    kind: Kind
    model: str
    version: int
    share: float = 0.0
    reason: str = ""

    @classmethod
    def of(cls, kind: str, model: str, form: Mapping[str, str]) -> Self:
        """As a form has it.

        Raises:
            ConfigError: a field of it is none of its kind.
        """
        if kind == "canary":
            return cls("canary", model, _version(form), share=_share(form))
        if kind == "promote":
            return cls("promote", model, _version(form))
        if kind == "halt":
            return cls("halt", model, _version(form), reason=_reason(form))
        raise ConfigError(f"a step must be canary, promote or halt, got {kind!r}")

    @property
    def name(self) -> str:
        """Of its version, as everywhere."""
        return f"{self.model}:{self.version}"

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        return {
            "canary": f"{self.name} as the canary of {100 * self.share:.4g} % of devices",
            "promote": f"{self.name} for all devices",
            "halt": f"Take {self.name} back, for good",
        }[self.kind]


@dataclass(frozen=True)
class Seen:
    """A rollout as far as decisions rest on it.

    Attributes:
        default: version; None: nothing is served yet.
        canary: version; None: there is none.
        share: of the canary.
        shadow: version that runs beside the default; None: there is none.
        batches: share of the default's batches on which it does.
        devices: whether so large a share of devices computes it too, where their host apps let them.
        served: all versions that are, the default first.
    """

    default: int | None = None
    canary: int | None = None
    share: float = 0.0
    shadow: int | None = None
    batches: float = 0.0
    devices: bool = False
    served: tuple[int, ...] = ()

    @classmethod
    def of(cls, window: Window | None) -> Self:
        """A window's."""
        if window is None:
            return cls()
        canary, shadow = window.canary, window.shadow
        return cls(
            default=window.default.version,
            canary=canary.version if canary else None,
            share=canary.share if canary else 0.0,
            shadow=shadow.version if shadow else None,
            batches=shadow.share if shadow else 0.0,
            devices=bool(shadow and shadow.devices),
            served=tuple(one.version for one in window.versions),
        )

    def check(self, window: Window | None) -> None:
        """Raises: Changed: a window is another than was seen."""
        self.check_seen(Seen.of(window))

    def check_seen(self, now: Seen) -> None:
        """Raises: Changed: another was seen."""
        if now != self:
            raise Changed(
                f"the rollout was changed meanwhile. When you were asked: {self.line()}; now: {now.line()}. "
                "Nothing was done: look again, and decide anew"
            )

    def after(self, version: int) -> int | None:
        """The default once a version is taken back; None: there would be none."""
        stable = [one for one in self.served if one not in (version, self.canary, self.shadow)]
        return self.default if version != self.default else next(iter(stable), None)

    def line(self) -> str:
        """In words."""
        if self.default is None:
            return "nothing is served"
        canary = "no canary" if self.canary is None else f"canary {self.canary} on {100 * self.share:.4g} % of devices"
        where = "batches, and of devices" if self.devices else "batches"
        shadow = [] if self.shadow is None else [f"shadow {self.shadow} on {100 * self.batches:.4g} % of {where}"]
        rest = [f"{one} still answered" for one in self.stays]
        return ", ".join((f"default {self.default}", canary, *shadow, *rest))

    @property
    def stays(self) -> list[int]:
        """Versions that devices may still have, though none is to fetch them."""
        return [one for one in self.served if one not in (self.default, self.canary, self.shadow)]


@dataclass(frozen=True)
class Question:
    """What somebody says yes or no to.

    Attributes:
        title: what is asked.
        will: what happens, a sentence each.
        final: what cannot be undone, likewise.
        yes: on the button.
    """

    title: str
    will: tuple[str, ...]
    final: tuple[str, ...]
    yes: str


def question(step: Step, seen: Seen) -> Question:
    """What a step does to a rollout, and what of it stays.

    Raises:
        ConfigError: it cannot be done to it.
    """
    return {"canary": _canary, "promote": _promote, "halt": _halt}[step.kind](step, seen)


def _canary(step: Step, seen: Seen) -> Question:
    if seen.default is None:
        raise ConfigError(f"nothing is served of {step.model} yet: promote a version first")
    if step.version == seen.default:
        raise ConfigError(f"{step.name} is the default already: all devices fetch it")
    share = f"{100 * step.share:.4g} %"
    if step.version == seen.canary:
        if step.share <= seen.share:
            raise ConfigError(
                f"the share must be above {100 * seen.share:.4g} %, got {share}: of devices that have a canary none "
                "leaves it, but where it is taken back"
            )
        grows = f"From {100 * seen.share:.4g} % to {share} of devices fetch {step.name}, the others {seen.default}."
        return Question(f"Let more devices fetch {step.name}?", (grows, _DRAWS), (_KEEPS,), f"Yes, {share} of devices")
    will = [f"{share} of devices fetch {step.name} in place of {seen.default}, the default.", _DRAWS]
    if step.version == seen.shadow:
        will.append("It is the shadow no longer.")
    elif step.version not in seen.served:
        will.append(_EXPORTS)
    final = [_KEEPS]
    if seen.canary is not None:
        will.append(f"{seen.canary} is the canary no longer; devices that have it keep it, and are answered by it.")
    return Question(
        f"Start {step.name} as a canary?", tuple(will), tuple(final), f"Yes, start it with {share} of devices"
    )


def _promote(step: Step, seen: Seen) -> Question:
    if step.version == seen.default:
        raise ConfigError(f"{step.name} is the default already: all devices fetch it")
    will = [f"All devices fetch {step.name} from now on; requests that name no version are answered by it."]
    if seen.default is not None:
        will.append(
            f"{seen.default}, the default now, is still answered for devices that have it, as long as the model's "
            "declaration says."
        )
    if step.version not in seen.served:
        will.append(_EXPORTS)
    if seen.default is not None and step.version < seen.default:
        will.append(f"Devices that have a version after {step.version} keep it: a promotion brings none back.")
    if seen.canary not in (None, step.version):
        will.append(f"{seen.canary} stays the canary of {100 * seen.share:.4g} % of devices.")
    final = "Devices that fetched it go back to an older version only where it is taken back, which is for good."
    return Question(f"Make {step.name} the default of all devices?", tuple(will), (final,), "Yes, promote it to all")


def _halt(step: Step, seen: Seen) -> Question:
    if step.version not in seen.served:
        raise ConfigError(f"{step.name} is not served")
    after = seen.after(step.version)
    if after is None:
        raise ConfigError(f"{step.name} is the only version to go back to: promote another first")
    known = {seen.canary: "the canary", seen.shadow: "the shadow", seen.default: "the default"}
    which = known.get(step.version, "an older version that devices may still have")
    removed = ", and devices that have it remove it" if seen.devices else ""
    will = (
        f"{step.name}, {which}, is served to nobody any more: a request that names it is told to update.",
        f"It is a shadow, which answers nobody: it stops to run beside the default{removed}."
        if step.version == seen.shadow
        else f"Devices that have it are told with their next update, and go to {after}.",
        f"The reason goes with it, to the history and to devices: “{step.reason}”.",
    )
    final = (
        "The message to devices is signed with the control plane's key; they take this version from nobody any more.",
        f"Version {step.version} is used up: its weights can only come again as another version.",
    )
    return Question(f"Take {step.name} back?", will, final, f"Yes, take {step.name} back for good")


_DRAWS = "Each device draws for itself, and tells nobody: it is not known who has the canary."
_KEEPS = (
    "A device that fetched it keeps it until there is a newer default, or until it is taken back, which is for good."
)
_EXPORTS = (
    "It is exported first, compared with the trained network, and signed with the control plane's key: that takes some "
    "minutes at most, in which nothing changes for devices."
)


def _version(form: Mapping[str, str]) -> int:
    text = form.get("version", "")
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_VERSION and int(text)):
        raise ConfigError(f"the version must be a number from 1, got {text[:40]!r}")
    return int(text)


def _share(form: Mapping[str, str]) -> float:
    text = form.get("share", "")
    try:
        percent = float(text)
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise ConfigError(f"the share of devices must be above 0 and at most 100 %, got {text[:40]!r}")
    return round(percent / 100, 12)  # 7 / 100 is 0.07


def _reason(form: Mapping[str, str]) -> str:
    reason = " ".join(form.get("reason", "").split())
    if not 0 < len(reason) <= MOST_REASON:
        raise ConfigError(f"the reason must have 1 to {MOST_REASON} characters, got {len(reason)}")
    return reason
