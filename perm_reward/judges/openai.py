"""A judge behind any OpenAI-compatible endpoint: OpenAI, vLLM, llama.cpp, `transformers serve`…"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import openai

from perm_reward.judges import JudgeConfig, Traffic
from perm_reward.judges.complaints import complaint
from perm_reward.judges.endpoints import Call, Endpoint, ask, make_endpoint
from perm_reward.judges.faults import ErrorAnswer, failure_words
from perm_reward.judges.replies import Reply, read_reply, read_usage
from perm_reward.judges.request_form import Form, FoundOut, requested
from perm_reward.prompts import Messages, Seeker, judge_messages
from perm_reward.rubrics import RUBRICS, Rubric
from perm_reward.verdict import Verdict, parse_bystander, parse_score

_log = logging.getLogger(__name__)

# What a check has judged: short, and as good as any.
_CHECKED_ROLE = "expression"
_CHECKED_SEEKER = Seeker("A nurse", "Her night shift was cut without notice.", "I feel invisible.")
_CHECKED_TEXT = "It hurts to be passed over like that. I am with you."


class OpenAIJudge:
    """Asks a chat model, one call per verdict.

    A call that fails for good becomes a verdict without a score: no exception, no invented score.

    Args:
        config: the settings of all roles that it is asked about.
        endpoints: those of config.endpoints, in order, where other judges use them too: limits are
            an endpoint's, whatever the model. None: endpoints of its own.
        rubrics: what each role's judge is told.
        seed: of the run.

    Raises:
        ValueError: the environment holds no key, or one that cannot be sent. One line.
    """

    def __init__(
        self,
        config: JudgeConfig,
        endpoints: Sequence[Endpoint] | None = None,
        *,
        rubrics: Mapping[str, Rubric] = RUBRICS,
        seed: int = 0,
    ) -> None:
        self.config = config
        if endpoints is None:
            endpoints = [
                make_endpoint(config, *where, config.concurrency, seed)
                for where in config.endpoints
            ]
        self.endpoints = endpoints
        urls = dict.fromkeys(endpoint.connection.url for endpoint in self.endpoints)
        self.label = f"openai: {config.model} at {', '.join(urls)}"
        self.traffic = Traffic()
        self._rubrics = rubrics
        self._seed = seed

    async def judge(self, role: str, seeker: Seeker, judged_text: str) -> Verdict:
        """Ask for one verdict. Failures: "timeout", "http 500", "cut off", "unparsable"…"""
        call = Call(self.endpoints, self.traffic)

        async def attempt(endpoint: Endpoint) -> Reply:
            # Written only now: thousands of calls may start at once, and would hold up the loop,
            # and memory, with messages that wait their turn.
            messages = self._messages(role, seeker, judged_text)
            return await self._attempt(endpoint, call, role, messages)

        try:
            reply = await ask(call, attempt)
        except Exception as error:
            return Verdict(role, None, "", failure=failure_words(error), usage=call.usage)
        # Only what is kept is cleared of the key: a short one may well be part of a score.
        words = self._without_keys(reply.text)
        if reply.failure is not None:
            return Verdict(role, None, words, reply.failure, call.usage)
        parse = parse_bystander if role == "bystander" else parse_score
        score = parse(reply.text)
        if score is not None:
            return Verdict(role, score, words, usage=call.usage)
        failure = "unparsable" if words.strip() else "empty reply"
        return Verdict(role, None, words, failure, call.usage)

    def asked(self, role: str, seeker: Seeker, judged_text: str) -> dict[str, Any]:
        """All that determines a verdict, fit for JSON, as far as the endpoint takes it.

        A model of the same name elsewhere may be another one, so the addresses are part of it (they
        hold no secrets: see `JudgeConfig.endpoints`). The form of a request is not, schema or plain
        text: it is found out while a run goes on, and found anew, perhaps otherwise, by a run that
        is resumed, which would then not find what it has paid for.
        """
        return {
            "messages": self._messages(role, seeker, judged_text),
            "addresses": sorted({endpoint.connection.url for endpoint in self.endpoints}),
            "model": self.config.model,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "max_tokens": self.config.max_tokens,
        }

    async def close(self) -> None:
        """Close the endpoints' connections."""
        for endpoint in self.endpoints:
            await endpoint.close()

    def check(self) -> None:
        """Ask each endpoint for one verdict, and keep what that tells of the form that it takes.

        Whether the reply holds a score does not matter.

        Raises:
            ValueError: no server, a refused key, an unknown model or other refusal. One line.
        """
        for endpoint in self.endpoints:
            try:
                self._check(endpoint)
            except Exception as error:
                # "from None": the error in between holds the request, and with it the key.
                raise ValueError(complaint(error, self.config, endpoint.connection)) from None

    # --- one attempt ----------------------------------------------------------------------------

    async def _attempt(
        self, endpoint: Endpoint, call: Call, role: str, messages: Messages
    ) -> Reply:
        """Ask in the form that the endpoint takes; the first call of all finds it out."""
        found_out = self._found_out(endpoint)
        async with found_out.by_one_call_first():
            form = found_out.form
            while True:
                try:
                    body = await endpoint.send(call, requested(self.config, messages, form, role))
                    call.usage += read_usage(body)
                    reply = read_reply(body)
                    self._remember(form, endpoint)
                    return reply
                except (openai.APIStatusError, ErrorAnswer) as error:
                    other_form = found_out.form_after(error, form)
                    if other_form is None:
                        raise
                    form = other_form

    def _check(self, endpoint: Endpoint) -> None:
        """As `_attempt`, without an event loop: nothing runs yet."""
        found_out = self._found_out(endpoint)
        messages = self._messages(_CHECKED_ROLE, _CHECKED_SEEKER, _CHECKED_TEXT)
        form = found_out.form
        with endpoint.connection.client_of_a_check() as client:
            while True:
                request = requested(self.config, messages, form, _CHECKED_ROLE)
                try:
                    read_reply(client.post("/chat/completions", cast_to=object, body=request))
                    self._remember(form, endpoint)
                    return
                except (openai.APIStatusError, ErrorAnswer) as error:
                    other_form = found_out.form_after(error, form, times=2)
                    if other_form is None:
                        raise
                    form = other_form

    def _remember(self, form: Form, endpoint: Endpoint) -> None:
        """Keep the form that was answered. To sample otherwise than asked is not done silently."""
        found_out = self._found_out(endpoint)
        dropped = [name for name in ("temperature", "top_p") if name in form.left_out]
        if dropped and not found_out.is_settled:
            _log.warning(
                "%s at %s refuses %s: it is asked without, and samples as it likes",
                self.config.model,
                endpoint.connection.url,
                " and ".join(dropped),
            )
        found_out.remember(form)

    def _found_out(self, endpoint: Endpoint) -> FoundOut:
        return endpoint.found_out.setdefault(self.config.model, FoundOut())

    def _messages(self, role: str, seeker: Seeker, judged_text: str) -> Messages:
        return judge_messages(role, seeker, judged_text, rubrics=self._rubrics, seed=self._seed)

    def _without_keys(self, text: str) -> str:
        """Servers may repeat what they were sent, and replies are written to files."""
        for endpoint in self.endpoints:
            text = endpoint.connection.without_key(text)
        return text
