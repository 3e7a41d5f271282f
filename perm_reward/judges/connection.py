"""The way to an endpoint: its address, its key, and the clients that use them."""

import os
from dataclasses import dataclass
from typing import Any

import openai

_OPENAI_URL = "https://api.openai.com/v1"
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Connection:
    """An address and the name of the variable that holds its key; never the key.

    Raises:
        ValueError: the environment holds no key, or one that cannot be sent. One line.
    """

    base_url: str
    """"" for OpenAI's own"""
    key_variable: str
    timeout_seconds: float

    def __post_init__(self) -> None:
        self.key()  # each process has its own environment, and not all of them call a check

    @property
    def url(self) -> str:
        """The address in full, always written alike."""
        return (self.base_url or _OPENAI_URL).rstrip("/")

    def key(self) -> str:
        """The key, read when it is needed and kept nowhere but in the client. Raises ValueError."""
        name = self.key_variable
        key = os.environ.get(name, "").strip()
        if not key and not self.base_url:
            raise ValueError(
                f"judge.api_key_variable = {name}: the variable is not set; export it, or use "
                "--judge.kind lexical, or set judge.base_url for a server that needs no key"
            )
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"judge.api_key_variable = {name}: the variable's value cannot be a key (it holds "
                "characters that no http header takes); export the right one"
            )
        return key or "no-key-needed"

    def without_key(self, text: str) -> str:
        """`text` as it may be shown and kept: servers may repeat what they were sent."""
        return text.replace(self.key(), "***")

    def client(self, concurrency: int) -> openai.AsyncOpenAI:
        """A client that keeps a connection for each call in flight, and tries nothing again."""
        # The limits are of the http library that this version of openai brings along.
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=None, max_keepalive_connections=concurrency
        )
        http_client = openai.DefaultAsyncHttpxClient(limits=limits)
        return openai.AsyncOpenAI(**self._arguments, max_retries=0, http_client=http_client)

    def client_of_a_check(self) -> openai.OpenAI:
        """A client for one call that needs no event loop, tried twice."""
        return openai.OpenAI(**self._arguments, max_retries=1)

    @property
    def _arguments(self) -> dict[str, Any]:
        seconds = self.timeout_seconds
        timeout = openai.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
        return {"api_key": self.key(), "base_url": self.url, "timeout": timeout}
