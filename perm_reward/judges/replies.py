"""What an endpoint answers, which may be anything → a reply to read, and what it was charged."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from perm_reward.judges.faults import ErrorAnswer, NoCompletion
from perm_reward.verdict import Usage

# What endpoints and proxies call it when max_tokens, or the context, ends a reply.
_CUT_OFF = ("length", "max_tokens", "model_length")


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    text: str
    failure: Literal["cut off", "refused"] | None = None
    """Why no score may be read from it. A reply that was cut off can be half a number ("Total: 8"
    of "Total: 83") or half a thought ("First, a score of 5 means…"), whatever it looks like."""


def read_reply(body: Any) -> Reply:
    """The first choice of a chat completion.

    Raises:
        ErrorAnswer: it is an error, though the answer's status was 200.
        NoCompletion: it is neither.
    """
    _raise_error_in(body)
    try:
        choice = body["choices"][0]
        _raise_error_in(choice)
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        finish_reason = str(choice.get("finish_reason")).lower()
    except (AttributeError, IndexError, KeyError, TypeError):
        raise NoCompletion from None
    if finish_reason == "error" or not all(isinstance(t, str | None) for t in (text, refusal)):
        raise NoCompletion
    if refusal or finish_reason == "content_filter":
        return Reply(text or refusal or "", failure="refused")
    return Reply(text or "", failure="cut off" if finish_reason in _CUT_OFF else None)


def _raise_error_in(part: Any) -> None:
    error = part.get("error") if isinstance(part, dict) else None
    if not error:
        return
    status = _status_of(error) if isinstance(error, dict) else None
    raise NoCompletion if status is None else ErrorAnswer(status, error)


def _status_of(error: dict[str, Any]) -> int | None:
    """The http status that an error stands for: its code, be it a number or a word."""
    code, kind = str(error.get("code")), str(error.get("type"))
    if re.fullmatch("[45][0-9][0-9]", code):
        return int(code)
    is_limit = "insufficient_quota" in (code, kind) or "rate_limit" in code + kind
    return 429 if is_limit else None


def read_usage(body: Any) -> Usage:
    """The tokens that an answer says it was charged; 0 for each count that it does not give."""
    usage = _part(body, "usage")
    return Usage(
        prompt_tokens=_count(usage, "prompt_tokens"),
        cached_tokens=_count(_part(usage, "prompt_tokens_details"), "cached_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
    )


def _part(body: Any, name: str) -> dict[str, Any]:
    part = body.get(name) if isinstance(body, dict) else None
    return part if isinstance(part, dict) else {}


def _count(usage: dict[str, Any], name: str) -> int:
    count = usage.get(name)
    return count if type(count) is int and count > 0 else 0
