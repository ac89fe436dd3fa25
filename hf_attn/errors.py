"""Errors a user can meet. Every message names the argument, the rule, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HfAttnError(Exception):
    """Base class of every error this package raises on purpose."""


class UnknownMechanism(HfAttnError, ValueError):
    """No mechanism is registered under this name."""

    def __init__(self, name: object, known: Iterable[str]):
        known = list(known)
        super().__init__(
            f"no attention mechanism is called {name!r}{near(name, known)}. Registered: {', '.join(known)}."
        )


class InvalidOption(HfAttnError, ValueError):
    """An option of a mechanism is unknown or has a value outside its rule."""


class InvalidInput(HfAttnError, ValueError):
    """A tensor or call argument has the wrong shape, type or value."""


class Unsupported(HfAttnError, ValueError):
    """A mode that a mechanism (or a host model) does not define.

    Attributes:
        subject: the mechanism or model the refusal is about.
        reason: the rule that is broken, with the offending value.
        remedy: the nearest thing that works.
    """

    def __init__(self, subject: str, reason: str, remedy: str):
        super().__init__(subject, reason, remedy)
        self.subject, self.reason, self.remedy = subject, reason, remedy

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}. {self.remedy}"


class KernelUnavailable(HfAttnError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class PublishFailed(HfAttnError, RuntimeError):
    """Publishing stopped.

    Attributes:
        stage: what was being done.
        reason: what went wrong there.
        state: what the repository holds now.
        remedy: what to do.
        status: the HTTP status; None where there was no answer.
    """

    def __init__(self, stage: str, reason: str, state: str, remedy: str, status: int | None = None):
        super().__init__(stage, reason, state, remedy, status)
        self.stage, self.reason, self.state, self.remedy, self.status = stage, reason, state, remedy, status

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}. {self.state}. {self.remedy}."


def near(name: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `known`, or an empty string."""
    match = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
