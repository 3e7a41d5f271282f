"""Why a judge cannot work: one line that names the setting, its value and the remedy."""

import os

import openai

from perm_reward.judges.config import JudgeConfig
from perm_reward.judges.connection import Connection
from perm_reward.judges.faults import HttpError, failure_words, is_too_long, server_words

_SAMPLING_SETTINGS = ("temperature", "top_p", "max_tokens")


def complaint(error: Exception, config: JudgeConfig, connection: Connection) -> str:
    """The line for what a first call has met. It never holds the key."""
    url = f"judge.base_url = {connection.url}"
    if isinstance(error, HttpError):
        return _refusal(error, config, connection)
    if isinstance(error, openai.APITimeoutError):
        return (
            f"{url}: no answer within {connection.timeout_seconds:g} s; see whether the "
            "server is up, or raise judge.timeout_seconds"
        )
    if isinstance(error, openai.APIConnectionError):
        return f"{url}: no server answers there; start it, or correct the address"
    return (
        f"{url}: what answers there is no chat completion ({failure_words(error)}); correct the "
        "address (for most servers it ends in /v1)"
    )


def _refusal(error: HttpError, config: JudgeConfig, connection: Connection) -> str:
    status, url = error.status_code, connection.url
    words = connection.without_key(server_words(error))[:200]
    quoted = f"; the server says: {words}" if words else ""
    variable = f"judge.api_key_variable = {connection.key_variable}"
    if status in (401, 403):
        # Servers repeat parts of a wrong key, so their words stay out of this one.
        is_set = os.environ.get(connection.key_variable)
        return (
            f"{variable}: {'its key is refused' if is_set else 'it is not set'} (http {status} "
            f"from {url}); export a key that this endpoint takes"
        )
    if status == 429:
        return (
            f"{variable}: the rate limit or quota of this key is used up (http 429 from "
            f"{url}); wait, or use another key{quoted}"
        )
    if is_too_long(error):
        return (
            f"judge.model = {config.model}: its context at {url} is too short for a judge's prompt "
            f"and a reply of judge.max_tokens = {config.max_tokens} (http {status}); serve it with "
            f"a longer context, lower judge.max_tokens, or name another model{quoted}"
        )
    if status in (400, 422):
        for name in _SAMPLING_SETTINGS:
            if name in (error.param, *words.replace("'", " ").replace("`", " ").split()):
                return (
                    f"judge.{name} = {getattr(config, name):g}: {config.model} at {url} does not "
                    f"take it (http {status}); set what it takes, or name another model{quoted}"
                )
    if status in (400, 404, 422) and ("model" in words.lower() or config.model in words):
        return (
            f"judge.model = {config.model}: {url} does not take it (http {status}); name a "
            f"model that it serves{quoted}"
        )
    if status == 404:
        return (
            f"judge.base_url = {url}: there are no chat completions there (http 404); "
            "correct the address (for most servers it ends in /v1)"
        )
    return (
        f"judge.base_url = {url}: the server refuses a request for judge.model = {config.model} "
        f"(http {status}); see its log, and whether it serves that model{quoted}"
    )
