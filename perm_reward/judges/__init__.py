"""Who gives the verdicts: what a judge is, and how one is made from its settings."""

import math
import re
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlsplit

from perm_reward.prompts import Seeker
from perm_reward.settings import require
from perm_reward.verdict import Verdict


class Judge(Protocol):
    """Gives verdicts. All calls come from one asyncio loop, many of them at once."""

    label: str
    """what stands beside each verdict, so that nobody takes one judge's scores for another's"""

    def check(self) -> None:
        """Called once, before any work starts; of many processes, by one.

        Raises:
            ValueError: the judge cannot work; one line that names the setting and the remedy.
        """
        ...

    async def judge(self, role: str, seeker: Seeker, judged_text: str) -> Verdict:
        """The verdict of one of `perm_reward.rubrics.ROLES` on the text that its rubric shows."""
        ...

    async def close(self) -> None:
        """Let go of connections. No call follows."""
        ...


@dataclass(frozen=True)
class JudgeConfig:
    """Which judge, and how it is asked. Never holds a key, only the name of its variable."""

    kind: Literal["lexical", "openai"] = "lexical"
    """lexical: rules over the text, a stand-in for demos; openai: any OpenAI-compatible endpoint"""
    model: str = "gpt-4o-mini"
    """name of the judge's model at its endpoint"""
    base_url: str = ""
    """address of the endpoint, such as http://127.0.0.1:8000/v1; empty: OpenAI's own"""
    api_key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the endpoint's key; may be unset where base_url needs none"""
    temperature: float = 0.3
    """sampling temperature of the judge"""
    top_p: float = 0.9
    """nucleus sampling of the judge"""
    max_tokens: int = 1024
    """longest reply of the judge"""
    timeout_seconds: float = 60.0
    """seconds for one attempt; a call with its retries gets (max_retries + 1) times as long"""
    max_retries: int = 4
    """how often a call is tried again after a time-out, lost connection, rate limit or http 5xx"""
    concurrency: int = 64
    """calls in flight at once, on each rank"""

    def __post_init__(self) -> None:
        require(self, "kind", self.kind in ("lexical", "openai"), "lexical or openai")
        require(self, "model", bool(self.model), "the name of a model at the endpoint")
        # A value that is refused here could be a secret, so these two messages leave it out.
        if not _is_plain_address(self.base_url):
            raise ValueError(
                "base_url: must be empty or an http(s) address without user, password or query"
            )
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_variable):
            raise ValueError(
                "api_key_variable: must be the name of an environment variable in capitals, "
                "not the key itself"
            )
        require(self, "temperature", 0 <= self.temperature < math.inf, "0 or more")
        require(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        require(self, "max_tokens", self.max_tokens >= 1, "at least 1")
        require(self, "timeout_seconds", 0 < self.timeout_seconds < math.inf, "above 0 seconds")
        require(self, "max_retries", self.max_retries >= 0, "0 or more")
        require(self, "concurrency", self.concurrency >= 1, "at least 1")


def _is_plain_address(base_url: str) -> bool:
    if not base_url:
        return True
    try:
        parts = urlsplit(base_url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        return False
    has_host = parts.scheme in ("http", "https") and bool(parts.hostname)
    return has_host and port_is_valid and not (set("@?#") & set(base_url))


def make_judge(config: JudgeConfig) -> Judge:
    """The judge that the settings ask for. Nothing is contacted yet: that is what `check` does.

    Raises:
        ValueError: the environment of this process lacks what the judge needs (a key). One line.
    """
    if config.kind == "lexical":
        from perm_reward.judges.lexical import LexicalJudge

        return LexicalJudge()
    # The client takes a second to import, which the embedded judge does not need to pay.
    from perm_reward.judges.openai import OpenAIJudge

    return OpenAIJudge(config)
