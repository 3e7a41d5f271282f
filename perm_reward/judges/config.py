"""Which judges, and how they are asked. Never holds a key, only the name of its variable."""

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from perm_reward.rubrics import ROLES, RUBRICS, Rubric, load_rubrics
from perm_reward.settings import require

Kind = Literal["lexical", "local", "openai"]
Device = Literal["auto", "cpu", "cuda"]
KINDS = ("lexical", "local", "openai")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class RoleConfig:
    """What the judge of one role has of its own; what is none is as [judge] says."""

    kind: Kind | None = None
    """this role's own judge"""
    model: str | None = None
    """this role's own model"""
    base_url: str | None = None
    """this role's own endpoint"""
    api_key_variable: str | None = None
    """environment variable of its key"""
    temperature: float | None = None
    """this role's own temperature"""
    samples: int | None = None
    """this role's own number of samples"""
    price_input: float | None = None
    """price of its prompts"""
    price_cached: float | None = None
    """price of what its endpoint has in its cache"""
    price_output: float | None = None
    """price of its replies"""


@dataclass(frozen=True)
class JudgeConfig:
    """Which judge gives the verdicts, for all four roles or for each its own."""

    kind: Kind = "lexical"
    """lexical: rules over the text, a stand-in for demos; local: a model in this process;
    openai: any OpenAI-compatible endpoint"""
    model: str = "gpt-4o-mini"
    """openai: name of the model at its endpoint; local: hub name or folder of a causal LM"""
    device: Device = "auto"
    """local: where its model is; auto: where the policy is; cpu: leaves the GPU to training"""
    base_url: str = ""
    """address of the endpoint, such as http://127.0.0.1:8000/v1; empty: OpenAI's own; several,
    separated by commas, are asked in turn"""
    api_key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the endpoint's key; may be unset where base_url needs none;
    several, separated by commas, are used in turn, or one for each address"""
    temperature: float = 0.3
    """sampling temperature of the judge"""
    top_p: float = 0.9
    """nucleus sampling of the judge"""
    max_tokens: int = 1024
    """longest reply of the judge"""
    samples: int = 1
    """verdicts asked of each role for each completion; their mean counts"""
    rubrics: str = ""
    """TOML file with rubrics of your own; empty: those of the package"""
    timeout_seconds: float = 60.0
    """seconds for one attempt at a call"""
    max_retries: int = 4
    """how often a call is tried again after a time-out, a lost connection, a reply that is no
    chat completion or http 5xx; a rate limit is waited out and not counted"""
    completion_seconds: float = 900.0
    """seconds for all calls of a completion together, while any of them is out; waiting for a turn
    or for a rate limit does not count; what is missing then is a failure"""
    concurrency: int = 64
    """openai: calls in flight at once at each endpoint, over all ranks together"""
    price_input: float = 0.0
    """price of a million tokens of prompts; money is counted where prices are given"""
    price_cached: float | None = None
    """price of a million tokens that the endpoint has in its prompt cache; none: price_input"""
    price_output: float = 0.0
    """price of a million tokens of replies"""
    budget: float = 0.0
    """the run stops, with everything saved, before a step that would cost more in all; 0: none"""
    resonation: RoleConfig = field(default_factory=RoleConfig)
    expression: RoleConfig = field(default_factory=RoleConfig)
    reception: RoleConfig = field(default_factory=RoleConfig)
    bystander: RoleConfig = field(default_factory=RoleConfig)

    def __post_init__(self) -> None:
        require(self, "kind", self.kind in KINDS, "lexical, local or openai")
        require(self, "model", bool(self.model), "the name of a model at the endpoint")
        require(self, "device", self.device in DEVICES, "auto, cpu or cuda")
        self.endpoints  # noqa: B018 - refuses what it cannot read
        require(self, "temperature", 0 <= self.temperature < math.inf, "0 or more")
        require(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        require(self, "max_tokens", self.max_tokens >= 1, "at least 1")
        require(self, "samples", self.samples >= 1, "at least 1")
        if self.kind == "local" and self.samples > 1:
            raise ValueError(
                f"samples = {self.samples}: a local judge is deterministic; set samples to 1"
            )
        require(self, "timeout_seconds", 0 < self.timeout_seconds < math.inf, "above 0 seconds")
        require(self, "max_retries", self.max_retries >= 0, "0 or more")
        whole = 0 < self.completion_seconds < math.inf
        require(self, "completion_seconds", whole, "above 0 seconds")
        require(self, "concurrency", self.concurrency >= 1, "at least 1")
        for name in ("price_input", "price_cached", "price_output", "budget"):
            price = getattr(self, name)
            require(self, name, price is None or 0 <= price < math.inf, "0 or more")
        for role in ROLES:
            try:
                self.of(role)
            except ValueError as error:
                raise ValueError(f"{role}.{error}") from error

    def of(self, role: str) -> "JudgeConfig":
        """The settings of one role's judge: its own, and for the rest those of all."""
        if all(getattr(self, name) == RoleConfig() for name in ROLES):
            return self
        own = {f.name: getattr(getattr(self, role), f.name) for f in fields(RoleConfig)}
        changes: dict[str, Any] = {k: value for k, value in own.items() if value is not None}
        return replace(self, **changes | {name: RoleConfig() for name in ROLES})

    def read_rubrics(self) -> dict[str, Rubric]:
        """The rubrics of all roles. Raises ValueError where the file of one's own is not right."""
        return load_rubrics(self.rubrics) if self.rubrics else RUBRICS

    @property
    def endpoints(self) -> list[tuple[str, str]]:
        """The address ("": OpenAI's own) and key variable of each endpoint, in turn.

        Raises:
            ValueError: an address or a name that cannot be one, or numbers of them that differ.
        """
        urls = [url.strip() for url in self.base_url.split(",")]
        names = [name.strip() for name in self.api_key_variable.split(",")]
        # A value that is refused here could be a secret, so these messages leave it out.
        if not all(_is_plain_address(url) for url in urls) or (len(urls) > 1 and "" in urls):
            raise ValueError(
                "base_url: must be empty or an http(s) address without user, password or query, "
                "or several, separated by commas"
            )
        if not all(re.fullmatch(r"[A-Z_][A-Z0-9_]*", name) for name in names):
            raise ValueError(
                "api_key_variable: must be the name of an environment variable in capitals, "
                "not the key itself"
            )
        if len(urls) > 1 and len(names) not in (1, len(urls)):
            raise ValueError(
                f"api_key_variable: {len(names)} names for {len(urls)} addresses in base_url; "
                "give one for all, or one for each"
            )
        count = max(len(urls), len(names))
        pairs = zip(urls * (count // len(urls)), names * (count // len(names)), strict=True)
        return list(dict.fromkeys(pairs))


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
