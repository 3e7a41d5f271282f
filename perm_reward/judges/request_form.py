"""The form in which an endpoint takes requests for verdicts: found out once, then kept."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from perm_reward.judges.config import JudgeConfig
from perm_reward.judges.faults import HttpError, is_too_long, server_words
from perm_reward.prompts import Messages

_REFUSALS = (400, 404, 415, 422, 501)
# What may be left out of a request, each with the words by which a refusal names it.
_MAY_BE_LEFT_OUT = {
    "schema": r"response.?format|json.?schema|structured.?output|guided.?(?:json|decoding)|grammar",
    "max_tokens": r"max_tokens|max_completion_tokens",
    "temperature": r"\btemperature\b",
    "top_p": r"\btop_p\b",
    "system": r"\bsystem.?(?:role|message|prompt|instruction)|messages\[0\]\.role"
    r"|roles must alternate|only user\b.{0,30}\broles|developer instruction",
}
_VALUES = ("max_tokens", "temperature", "top_p")
_OUT_OF_RANGE = re.compile(
    r"too (?:large|high|small|low)|at (?:most|least)|(?:less|greater|larger|smaller|more) than"
    r"|\b(?:maximum|minimum|between|range|exceeds?)\b|[<>]=",
    re.IGNORECASE,
)
_PARTS = (
    "content_effectiveness",
    "structure_and_clarity",
    "communication_efficiency",
    "objectivity",
    "accuracy_and_verifiability",
)


@dataclass(frozen=True)
class Form:
    """What differs among endpoints and models. What is asked never does."""

    left_out: frozenset[str] = frozenset()
    """Of "schema": the reply's form is not prescribed; "temperature", "top_p": the model has its
    own; "max_tokens": it is sent as max_completion_tokens; "system": the system message begins
    the user message."""


@dataclass
class FoundOut:
    """What is known of one endpoint and model."""

    form: Form = Form()
    is_settled: bool = False
    """a request in this form was answered with a completion"""
    _crashes: int = 0
    _crashes_without_schema: bool = False
    _is_begun: bool = False
    _first_has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def by_one_call_first(self) -> AsyncIterator[None]:
        """While the first of all attempts lasts, the others wait here for what it finds out.

        However it ends: where it found out nothing, the others go on without waiting.
        """
        if self.is_settled:
            yield
            return
        if self._is_begun:
            await self._first_has_ended.wait()
            yield
            return
        self._is_begun = True
        try:
            yield
        finally:
            self._first_has_ended.set()

    def form_after(self, error: HttpError, form: Form, times: int = 1) -> Form | None:
        """The form to try after a refusal; None where the form is not what is refused.

        Args:
            error: what came of a request.
            form: of that request.
            times: how often it was sent, with the same error each time.
        """
        if self.is_settled:
            return None
        if error.status_code == 500:
            return self._form_after_crashes(form, times)
        if error.status_code not in _REFUSALS or is_too_long(error):
            return None
        said = f"{error.param} {server_words(error)}"
        part = _first_named(said, form)
        if part in form.left_out or (part in _VALUES and _OUT_OF_RANGE.search(said)):
            return None
        return Form(form.left_out | {part})

    def _form_after_crashes(self, form: Form, times: int) -> Form | None:
        """Some servers crash over a schema. One that crashes twice is asked without it."""
        if "schema" in form.left_out:
            self._crashes_without_schema = True
        if self._crashes_without_schema:
            return None
        self._crashes += times
        return form if self._crashes < 2 else Form(form.left_out | {"schema"})

    def remember(self, form: Form) -> None:
        """A request in this form was answered with a completion."""
        if not self.is_settled:
            self.form, self.is_settled = form, True


def requested(config: JudgeConfig, messages: Messages, form: Form, role: str) -> dict[str, Any]:
    """The body of a request for a verdict of this role."""
    request: dict[str, Any] = {
        "model": config.model,
        "messages": _in_one(messages) if "system" in form.left_out else messages,
    }
    for name in ("temperature", "top_p"):
        if name not in form.left_out:
            request[name] = getattr(config, name)
    limit = "max_completion_tokens" if "max_tokens" in form.left_out else "max_tokens"
    request[limit] = config.max_tokens
    if "schema" not in form.left_out:
        schema = _BYSTANDER_SCHEMA if role == "bystander" else _SCORE_SCHEMA
        described = {"name": "verdict", "strict": True, "schema": schema}
        request["response_format"] = {"type": "json_schema", "json_schema": described}
    return request


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _integer(lowest: int, highest: int) -> dict[str, Any]:
    # Not every server that takes schemas takes "minimum" and "maximum".
    return {"type": "integer", "enum": list(range(lowest, highest + 1))}


# The reason comes first: it is what the score follows from.
_SCORE_SCHEMA = _object({"reason": {"type": "string"}, "score": _integer(1, 5)})
# A total is left out: it would be one more chance to contradict the parts.
_BYSTANDER_SCHEMA = _object({part: _integer(0, 20) for part in _PARTS})


def _first_named(said: str, form: Form) -> str:
    """What a refusal names first of all that was sent; the schema where it names nothing."""
    found = {
        part: match.start()
        for part, words in _MAY_BE_LEFT_OUT.items()
        if part not in form.left_out and (match := re.search(words, said, re.IGNORECASE))
    }
    return min(found, key=found.__getitem__, default="schema")


def _in_one(messages: Messages) -> Messages:
    text = "\n\n".join(message["content"] for message in messages)
    return [{"role": "user", "content": text}]
