"""Requests to the Hub: who asks, how long it waits, when it asks again, and how a failure is told."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from hf_attn.errors import HfAttnError, PublishFailed

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")

TRANSIENT = (408, 429, 500, 502, 503, 504)
TRIES = 4
REMEDIES = {
    401: "Log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "Use a token with write permission for this owner, or another repo_id",
    404: "Check repo_id and the token: a private repository looks like a missing one",
    409: "Somebody else is changing the repository; run the same command again in a minute",
    412: "Look at the other commit, then run the same command again to publish on top of it",
    429: "The Hub limits how often you may ask; run the same command again in some minutes",
}
_AGAIN = "Run the same command again; what was uploaded is not uploaded twice"


def connect() -> HfApi:
    """The client, with the token of the environment or of the stored login.

    Raises:
        PublishFailed: offline mode is on, or there is no token.
    """
    import huggingface_hub
    from huggingface_hub import constants

    import hf_attn

    nothing = "Nothing was sent"
    if constants.is_offline_mode():
        raise PublishFailed(
            "connecting",
            "offline mode is on (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)",
            nothing,
            "Unset it, or look at the plan with --dry-run",
        )
    if not huggingface_hub.get_token():
        raise PublishFailed("connecting", "there is no access token", nothing, REMEDIES[401])
    return huggingface_hub.HfApi(library_name="hf_attn", library_version=hf_attn.__version__)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Give the client a timeout, which it has not by default: a server that hangs would block for ever."""
    from huggingface_hub.utils import get_session

    session = get_session()
    before = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = before


def attempt(
    stage: str,
    state: str,
    call: Callable[[], Result],
    tries: int = TRIES,
    landed: Callable[[], Result | None] | None = None,
    conflict: Callable[[], str | None] | None = None,
) -> Result:
    """`call`, again after errors that pass; any other error becomes a `PublishFailed`.

    Args:
        stage: what is being done, for the message.
        state: what the repository holds if this fails.
        call: the request.
        tries: how often, for what the client does not repeat by itself.
        landed: asks the repository whether a failed `call` was done all the same.
        conflict: says who was first, or None.
    """
    for number in range(1, tries + 1):
        try:
            return call()
        except HfAttnError:
            raise
        except Exception as error:  # whatever the client or its transports raise is told, with its stage
            status, passes = _kind(error)
            try:
                if landed is not None and (done := landed()) is not None:
                    return done
                first = conflict() if conflict is not None else None
            except PublishFailed as silent:
                unknown = "Whether it was done is not known, because the Hub does not answer"
                raise PublishFailed(stage, _told(error, status), unknown, _AGAIN, status) from silent
            if first is not None or not passes or number == tries:
                remedy = REMEDIES[412] if first else REMEDIES.get(status or 0, _AGAIN)
                reason = first or _told(error, status)
                raise PublishFailed(stage, reason, state, remedy, status) from error
            pause(_wait(error, number))
    raise PublishFailed(stage, "no attempt was made", state, _AGAIN)


def pause(seconds: float) -> None:
    time.sleep(seconds)


def _kind(error: BaseException) -> tuple[int | None, bool]:
    """HTTP status of an error, and whether asking again may help."""
    from huggingface_hub.errors import HfHubHTTPError

    # huggingface_hub's error and the transport's errors share this base, whichever httpx it was built on
    base = HfHubHTTPError.__bases__[0]
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status, status in TRANSIENT
        if isinstance(cause, base):
            return None, True
    return None, False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it: the client wraps the errors of its upload threads."""
    while error is not None:
        yield error
        error = error.__cause__


def _told(error: Exception, status: int | None) -> str:
    told = next((cause for cause in _causes(error) if getattr(cause, "response", None) is not None), error)
    text = " ".join(str(told).split()).rstrip(".")
    if isinstance(told, (KeyError, TypeError, IndexError)):
        return f"the Hub's answer has an unexpected form ({type(told).__name__}: {text})"
    if "xet" in text.lower():
        text += " (a server without Xet storage needs HF_HUB_DISABLE_XET=1)"
    return f"the Hub answered {status}: {text}" if status else f"{type(told).__name__}: {text}"


def _wait(error: Exception, number: int) -> float:
    """Seconds before the next attempt: what the server asks for, up to a minute, else 1, 2, 4."""
    headers: Any = getattr(getattr(error, "response", None), "headers", {})
    try:
        return min(60.0, max(0.0, float(headers.get("Retry-After", ""))))
    except ValueError:
        return float(2 ** (number - 1))
