"""How a judge tells when a call is out, so that the time of waiting for a turn is nobody's.

A call is out from when it is sent until it has ended, retries included. It rests while it waits for
a rate limit to pass, and is out again when it is sent again.

Whoever wants to know sets both variables around `judge`. A judge that only tells when a call is
sent is understood, too: its call is then out until it returns.
"""

from collections.abc import Callable
from contextvars import ContextVar

call_begins: ContextVar[Callable[[], None] | None] = ContextVar("call_begins", default=None)
"""Called by a judge each time a call is sent that was not out."""

call_rests: ContextVar[Callable[[], None] | None] = ContextVar("call_rests", default=None)
"""Called by a judge each time a call that was out begins to rest or has ended."""
