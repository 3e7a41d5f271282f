"""What can go wrong with a call to an endpoint, and what that means for the next attempt."""

import math
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

import openai

_LONGEST_WAIT_SECONDS = 3600.0
_ONLY_THIS_ENDPOINT = (401, 402, 403, 404)
_TOO_LONG = re.compile(
    r"context[ _](?:length|window|size)|maximum model length|max_model_len|prompt (?:is )?too long"
    r"|reduce the length of the (?:messages|prompt)",
    re.IGNORECASE,
)


class NoCompletion(Exception):
    """An answer that is no chat completion: a web page, half a JSON text, no choices."""


class ErrorAnswer(Exception):
    """An error in the body of an answer with http 200, as some proxies send it.

    Args:
        status_code: that of http which it stands for.
        body: the error, as the endpoint describes it.
    """

    def __init__(self, status_code: int, body: dict[str, Any]) -> None:
        super().__init__(status_code)  # no words of the server's: they may repeat the key
        self.status_code = status_code
        self.body = body
        self.param, self.code, self.type = map(body.get, ("param", "code", "type"))


HttpError = openai.APIStatusError | ErrorAnswer


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
    if isinstance(error, HttpError):
        return "prompt too long" if is_too_long(error) else f"http {error.status_code}"
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


def is_too_long(error: HttpError) -> bool:
    """Whether the prompt, with the reply that may follow, exceeds the model's context."""
    said = f"{error.code} {error.type} {server_words(error)}"
    return error.status_code in (400, 413, 422) and _TOO_LONG.search(said) is not None


def server_words(error: HttpError) -> str:
    """What the server says is wrong, in one line. It may hold the key."""
    return " ".join(_words(error.body).split())


def _words(said: Any) -> str:
    """The words for people in an error's body, and the names of what they are about.

    Nothing else: bodies may repeat the request, whose words are not the server's.
    """
    if isinstance(said, str):
        return "" if said.lstrip().startswith("<") else said  # a web page
    if isinstance(said, list):
        return "; ".join(map(_words, said))
    if not isinstance(said, dict):
        return ""
    if "loc" in said:  # {"detail": [{"loc": ["body", "top_p"], "msg": …}]}, of FastAPI
        return f"{said['loc']}: {said.get('msg')}"
    # {"metadata": {"raw": …}}: what a proxy was told by the endpoint behind it
    names = ("message", "detail", "metadata", "raw")
    return "; ".join(_words(said[name]) for name in names if said.get(name))


def _status(error: Exception) -> int:
    return error.status_code if isinstance(error, HttpError) else 0


def _is_out_of_quota(error: Exception) -> bool:
    return isinstance(error, HttpError) and "insufficient_quota" in (error.code, error.type)


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
