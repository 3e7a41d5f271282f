"""What an endpoint answers, which may be anything → a reply to read, and what it was charged."""

from dataclasses import dataclass
from typing import Any

from perm_reward.judges.faults import NoCompletion
from perm_reward.verdict import Usage


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    text: str
    is_cut_off: bool
    """it ends where max_tokens ended it"""

    @property
    def readable(self) -> str:
        """The part that a score may be read from.

        The last word of a reply that was cut off may be half a number: "Total: 8" of "Total: 83".
        """
        if not self.is_cut_off:
            return self.text
        return self.text[: max(self.text.rfind(" "), self.text.rfind("\n")) + 1]


def read_reply(body: Any) -> Reply:
    """The first choice of a chat completion.

    Raises:
        NoCompletion: it is none.
    """
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"]
        finish_reason = choice.get("finish_reason")
    except (AttributeError, IndexError, KeyError, TypeError):
        raise NoCompletion from None
    if text is not None and not isinstance(text, str):
        raise NoCompletion
    return Reply(text or "", is_cut_off=finish_reason == "length")


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
