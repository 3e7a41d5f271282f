"""The form in which an endpoint takes requests for verdicts: found out once, then kept."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import openai

from perm_reward.judges.config import JudgeConfig
from perm_reward.prompts import Messages

_REFUSALS = (400, 404, 415, 422, 501)
_PARTS = (
    "content_effectiveness",
    "structure_and_clarity",
    "communication_efficiency",
    "objectivity",
    "accuracy_and_verifiability",
)


@dataclass(frozen=True)
class Form:
    """What differs among endpoints and models. The messages never do."""

    schema: bool = True
    """the reply's form is prescribed by a JSON schema"""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """what the longest reply is called"""


@dataclass
class FoundOut:
    """What is known of one endpoint and model."""

    form: Form = Form()
    is_settled: bool = False
    """a request in this form was answered with a completion"""
    _is_begun: bool = False
    _first_has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def by_one_call_first(self) -> AsyncIterator[None]:
        """While the first of all attempts lasts, the others wait here for what it finds out.

        However it ends: where it found out nothing, the others go on without waiting.
        """
        if self._is_begun:
            await self._first_has_ended.wait()
            yield
            return
        self._is_begun = True
        try:
            yield
        finally:
            self._first_has_ended.set()

    def form_after(self, error: openai.APIStatusError, form: Form) -> Form | None:
        """The form to try after a refusal; None where the form is not what is refused."""
        if self.is_settled or error.status_code not in _REFUSALS:
            return None
        if form.limit == "max_tokens" and _names(error, "max_tokens", "max_completion_tokens"):
            return replace(form, limit="max_completion_tokens")
        return replace(form, schema=False) if form.schema else None

    def remember(self, form: Form) -> None:
        """A request in this form was answered with a completion."""
        if not self.is_settled:
            self.form, self.is_settled = form, True


def requested(
    config: JudgeConfig, messages: Messages, form: Form, role: str | None = None
) -> dict[str, Any]:
    """The body of a request. A role is needed where the form is by schema."""
    request = {
        "model": config.model,
        "messages": messages,
        "temperature": config.temperature,
        "top_p": config.top_p,
        form.limit: config.max_tokens,
    }
    if form.schema:
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


def _names(error: openai.APIStatusError, *parameters: str) -> bool:
    return any(name in f"{error.param} {error.message}" for name in parameters)
