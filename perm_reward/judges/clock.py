"""How a judge tells that a call is sent, so that the time of waiting for a turn is nobody's."""

from collections.abc import Callable
from contextvars import ContextVar

call_begins: ContextVar[Callable[[], None] | None] = ContextVar("call_begins", default=None)
"""Called by a judge each time it sends a call; whoever wants to know sets it around `judge`."""
