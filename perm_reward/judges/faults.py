"""What can go wrong with a call to an endpoint, and what that means for the next attempt."""

import math
import time
from email.utils import parsedate_to_datetime

import openai

_LONGEST_WAIT_SECONDS = 3600.0
_ONLY_THIS_ENDPOINT = (401, 402, 403, 404)


class NoCompletion(Exception):
    """An answer that is no chat completion: a web page, half a JSON text, no choices."""


class GaveUp(Exception):
    """All of a call's endpoints are set aside, for longer than the call can wait.

    Its message is what ails them, in the words of `failure_words`.
    """


def failure_words(error: BaseException) -> str:
    """A word or two for what went wrong. Never the error's own message: it may hold secrets."""
    if isinstance(error, GaveUp):
        return str(error)
    if isinstance(error, (TimeoutError, openai.APITimeoutError)):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "connection"
    if isinstance(error, openai.APIStatusError):
        return f"http {error.status_code}"
    if isinstance(error, NoCompletion):
        return "malformed reply"
    return type(error).__name__


def is_rate_limit(error: Exception) -> bool:
    """Whether the endpoint takes calls, only not so many. A quota that is used up is no limit."""
    return _status(error) == 429 and not _is_out_of_quota(error)


def may_pass(error: Exception) -> bool:
    """Whether the same attempt at the same endpoint may succeed a little later."""
    if isinstance(error, (TimeoutError, openai.APIConnectionError, NoCompletion)):
        return True
    return _status(error) in (408, 409) or _status(error) >= 500


def is_only_here(error: Exception) -> bool:
    """Whether the endpoint refuses whatever it is asked, so that another one may do better."""
    return _status(error) in _ONLY_THIS_ENDPOINT or _is_out_of_quota(error)


def retry_after(error: Exception) -> float:
    """The seconds that the endpoint asks to wait, 0 where it asks for nothing; an hour at most.

    Read: `retry-after-ms`, and `retry-after` in seconds or as a date (RFC 9110, section 10.2.3).
    """
    if not isinstance(error, openai.APIStatusError):
        return 0.0
    headers = error.response.headers
    seconds = _number(headers.get("retry-after-ms")) / 1000
    if math.isnan(seconds):
        seconds = _number(headers.get("retry-after"))
    if math.isnan(seconds):
        seconds = _seconds_until(headers.get("retry-after"))
    return min(max(0.0, seconds), _LONGEST_WAIT_SECONDS)


def _status(error: Exception) -> int:
    return error.status_code if isinstance(error, openai.APIStatusError) else 0


def _is_out_of_quota(error: Exception) -> bool:
    return isinstance(error, openai.APIStatusError) and "insufficient_quota" in (
        error.code,
        error.type,
    )


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _seconds_until(date: str | None) -> float:
    try:
        return parsedate_to_datetime(date or "").timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
