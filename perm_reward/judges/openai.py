"""A judge behind any OpenAI-compatible endpoint: OpenAI, vLLM, llama.cpp, `transformers serve`…"""

import asyncio
import json
import os
from functools import cached_property
from types import NoneType
from typing import Any

import openai
from openai.types.chat.chat_completion import Choice

from perm_reward.judges import JudgeConfig
from perm_reward.prompts import Messages, Seeker, judge_messages
from perm_reward.verdict import Verdict, parse_bystander, parse_score

_OPENAI_URL = "https://api.openai.com/v1"
_CONNECT_SECONDS = 10.0


class OpenAIJudge:
    """Asks a chat model, one call per verdict, at most `concurrency` of them at once.

    A call that fails for good becomes a verdict without a score: no exception, no invented score.

    Raises:
        ValueError: the environment holds no key, or one that cannot be sent. One line.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        _read_key(config)  # each process has its own environment, and not all of them call `check`
        self.label = f"openai: {config.model} at {self._url}"
        self._slots = asyncio.Semaphore(config.concurrency)

    async def judge(self, role: str, seeker: Seeker, judged_text: str) -> Verdict:
        """Ask for one verdict. Failures: "timeout", "connection", "http 500", "unparsable"…"""
        messages = judge_messages(role, seeker, judged_text)
        try:
            choice = await self._ask(messages)
        except Exception as error:
            return Verdict(role, None, "", failure=_failure(error))
        reply = choice.message.content or ""
        cut_off = choice.finish_reason == "length"
        # The last word of a reply that was cut off may be half a number: "Total: 8" of "Total: 83".
        last_word = max(reply.rfind(" "), reply.rfind("\n")) + 1
        readable = reply[:last_word] if cut_off else reply
        score = parse_bystander(readable) if role == "bystander" else parse_score(readable)
        # Only what is kept is cleared of the key: a short one may well be part of a score.
        reply = self._without_key(reply)
        if score is not None:
            return Verdict(role, score, reply)
        unread = "unparsable" if reply.strip() else "empty reply"
        return Verdict(role, None, reply, failure="cut off" if cut_off else unread)

    async def close(self) -> None:
        """Close the connections."""
        if "_client" in vars(self):
            await self._client.close()

    def check(self) -> None:
        """Ask for one tiny reply.

        Raises:
            ValueError: no server, a refused key, an unknown model or other refusal.
        """
        try:
            with openai.OpenAI(**self._connection, max_retries=1) as client:
                request = self._request([{"role": "user", "content": "Reply with: Score: 3"}])
                request["max_tokens"] = min(16, self.config.max_tokens)
                _first_choice(client.chat.completions.create(**request))
        except Exception as error:
            # "from None": the error in between holds the request, and with it the key.
            raise ValueError(self._complaint(error)) from None

    # --- one call -------------------------------------------------------------------------------

    async def _ask(self, messages: Messages) -> Choice:
        # The client's own time limit counts from byte to byte, so a reply that trickles in would
        # never end. Waiting for a slot is not counted: it is no fault of the endpoint's.
        whole_call = self.config.timeout_seconds * (self.config.max_retries + 1)
        async with self._slots, asyncio.timeout(whole_call):
            completion = await self._client.chat.completions.create(**self._request(messages))
        return _first_choice(completion)

    def _request(self, messages: Messages) -> dict[str, Any]:
        return {
            "model": self.config.model,
            "messages": messages,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "max_tokens": self.config.max_tokens,
        }

    @cached_property
    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._connection, max_retries=self.config.max_retries)

    @property
    def _connection(self) -> dict[str, Any]:
        seconds = self.config.timeout_seconds
        timeout = openai.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
        return {"api_key": _read_key(self.config), "base_url": self._url, "timeout": timeout}

    @property
    def _url(self) -> str:
        return self.config.base_url or _OPENAI_URL

    # --- what went wrong ------------------------------------------------------------------------

    def _complaint(self, error: Exception) -> str:
        """One line that names the setting behind an error, its value and the remedy."""
        url = f"judge.base_url = {self._url}"
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error)
        if isinstance(error, openai.APITimeoutError):
            return (
                f"{url}: no answer within {self.config.timeout_seconds:g} s; see whether the "
                "server is up, or raise judge.timeout_seconds"
            )
        if isinstance(error, openai.APIConnectionError):
            return f"{url}: no server answers there; start it, or correct the address"
        return (
            f"{url}: what answers there is no chat completion ({_failure(error)}); correct the "
            "address (for most servers it ends in /v1)"
        )

    def _refusal(self, error: openai.APIStatusError) -> str:
        status, words = error.status_code, self._server_words(error)
        quoted = f"; the server says: {words}" if words else ""
        variable = f"judge.api_key_variable = {self.config.api_key_variable}"
        if status in (401, 403):
            # Servers repeat parts of a wrong key, so their words stay out of this one.
            is_set = os.environ.get(self.config.api_key_variable)
            return (
                f"{variable}: {'its key is refused' if is_set else 'it is not set'} (http {status} "
                f"from {self._url}); export a key that this endpoint takes"
            )
        if status == 429:
            return (
                f"{variable}: the rate limit or quota of this key is used up (http 429 from "
                f"{self._url}); wait, or use another key{quoted}"
            )
        model = self.config.model
        if status in (400, 404, 422) and ("model" in words.lower() or model in words):
            return (
                f"judge.model = {model}: {self._url} does not take it (http {status}); name a "
                f"model that it serves{quoted}"
            )
        if status == 404:
            return (
                f"judge.base_url = {self._url}: there are no chat completions there (http 404); "
                "correct the address (for most servers it ends in /v1)"
            )
        return (
            f"judge.base_url = {self._url}: the server refuses a request for judge.model = {model} "
            f"(http {status}); see its log, and whether it serves that model{quoted}"
        )

    def _server_words(self, error: openai.APIStatusError) -> str:
        """The server's message in one short line, without the key."""
        body = error.body if isinstance(error.body, dict) else {}
        words = body.get("message") or body.get("detail") or ""
        return self._without_key(" ".join(str(words).split()))[:200]

    def _without_key(self, text: str) -> str:
        """Servers may repeat what they were sent, and replies are written to files."""
        return text.replace(_read_key(self.config), "***")


def _read_key(config: JudgeConfig) -> str:
    """The key, read when it is needed and kept nowhere but in the client. Raises ValueError."""
    name = config.api_key_variable
    key = os.environ.get(name, "").strip()
    if not key and not config.base_url:
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


class _MalformedReply(ValueError):
    """An answer that is no chat completion."""


def _first_choice(completion: Any) -> Choice:
    """The reply in a chat completion, which may be anything: the client does not look inside."""
    try:
        choice = completion.choices[0]
        if isinstance(choice.message.content, (str, NoneType)):
            return choice
    except (AttributeError, IndexError, TypeError):
        pass
    raise _MalformedReply


def _failure(error: Exception) -> str:
    """A word or two for what went wrong. Never the error's own message: it may hold secrets."""
    if isinstance(error, (TimeoutError, openai.APITimeoutError)):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "connection"
    if isinstance(error, openai.APIStatusError):
        return f"http {error.status_code}"
    if isinstance(error, (json.JSONDecodeError, _MalformedReply)):
        return "malformed reply"
    return type(error).__name__
