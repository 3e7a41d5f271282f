import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from perm_reward.judges import JudgeConfig, RoleConfig, make_judge
from perm_reward.rubrics import ROLES

SECRET = "sk-proj-0123456789abcdef"


@pytest.mark.parametrize(
    "name, value",
    [
        ("kind", "gpt"),
        ("device", "gpu"),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("timeout_seconds", 0),
        ("timeout_seconds", math.inf),
        ("max_retries", -1),
        ("concurrency", 0),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} = {value}: must be .+$"):
        JudgeConfig(**{name: value})


def test_an_empty_model_is_refused():
    with pytest.raises(ValueError, match='^model = "": must be '):
        JudgeConfig(model="")


@pytest.mark.parametrize(
    "name, value",
    [
        ("api_key_variable", SECRET),
        ("api_key_variable", "gsk_0123456789abcdef"),
        ("api_key_variable", ""),
        ("base_url", f"http://user:{SECRET}@127.0.0.1/v1"),
        ("base_url", f"http://127.0.0.1/v1?key={SECRET}"),
        ("base_url", f"http://127.0.0.1/v1#{SECRET}"),
        ("base_url", "127.0.0.1:8000"),
        ("base_url", "ftp://127.0.0.1"),
        ("base_url", "http://127.0.0.1:port/v1"),
        ("base_url", "http://"),
    ],
)
def test_a_key_in_the_wrong_setting_is_refused_and_not_repeated(name, value):
    """People paste the key where its variable's name belongs; the message must not spread it."""
    with pytest.raises(ValueError, match=f"^{name}: must be .+$") as caught:
        JudgeConfig(**{name: value})
    assert not value or value not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_setting_of_one_role_is_checked_and_named():
    with pytest.raises(ValueError, match=r"^bystander.temperature = -1: must be "):
        JudgeConfig(bystander=RoleConfig(temperature=-1))


def test_a_role_has_what_is_its_own_and_the_rest_of_all():
    config = JudgeConfig(
        kind="openai",
        model="large",
        temperature=0.3,
        reception=RoleConfig(model="other", samples=4),
    )
    assert (config.of("reception").model, config.of("reception").samples) == ("other", 4)
    assert config.of("reception").temperature == 0.3
    assert (config.of("bystander").model, config.of("bystander").samples) == ("large", 1)


@pytest.mark.parametrize(
    "urls, keys, endpoints",
    [
        ("", "A", [("", "A")]),
        ("", "A, B", [("", "A"), ("", "B")]),
        ("http://a/v1,http://b/v1", "A", [("http://a/v1", "A"), ("http://b/v1", "A")]),
        ("http://a/v1, http://b/v1", "A,B", [("http://a/v1", "A"), ("http://b/v1", "B")]),
        ("http://a/v1", "A,B", [("http://a/v1", "A"), ("http://a/v1", "B")]),
        ("http://a/v1", "A,A", [("http://a/v1", "A")]),
    ],
)
def test_several_addresses_and_keys_are_endpoints(urls, keys, endpoints):
    assert JudgeConfig(base_url=urls, api_key_variable=keys).endpoints == endpoints


@pytest.mark.parametrize(
    "urls, keys, message",
    [
        ("http://a/v1,http://b/v1,http://c/v1", "A,B", "^api_key_variable: 2 names for 3 "),
        ("http://a/v1,", "A", "^base_url: "),
        ("http://a/v1", "A,", "^api_key_variable: "),
    ],
)
def test_addresses_and_keys_that_do_not_match_are_refused(urls, keys, message):
    with pytest.raises(ValueError, match=message):
        JudgeConfig(base_url=urls, api_key_variable=keys)


URL = "http://127.0.0.1:9/v1"


def test_kinds_make_their_judges():
    def kinds(config):
        return {role: type(judge).__name__ for role, judge in make_judge(config).judges.items()}

    assert set(kinds(JudgeConfig()).values()) == {"LexicalJudge"}
    mixed = JudgeConfig(base_url=URL, reception=RoleConfig(kind="openai"))
    assert kinds(mixed) == dict.fromkeys(ROLES, "LexicalJudge") | {"reception": "OpenAIJudge"}


def test_roles_that_are_asked_alike_share_a_judge_whatever_their_samples_and_prices():
    config = JudgeConfig(
        kind="openai",
        base_url=URL,
        expression=RoleConfig(samples=3, price_input=1.0),
        bystander=RoleConfig(temperature=1.0),
    )
    panel = make_judge(config)
    judges = panel.judges
    assert judges["expression"] is judges["resonation"] is judges["reception"]
    assert judges["bystander"] is not judges["resonation"]
    assert panel.samples == dict.fromkeys(ROLES, 1) | {"expression": 3}


def test_judges_at_one_endpoint_share_its_limit():
    config = JudgeConfig(kind="openai", base_url=URL, bystander=RoleConfig(model="other"))
    judges = make_judge(config).judges
    [one], [other] = judges["reception"].endpoints, judges["bystander"].endpoints
    assert one is other


@pytest.mark.parametrize("concurrency, world", [(64, 8), (10, 4), (3, 3)])
def test_the_limit_of_an_endpoint_is_that_of_all_processes(concurrency, world):
    config = JudgeConfig(kind="openai", base_url=URL, concurrency=concurrency)
    shares = []
    for rank in range(world):
        [endpoint] = make_judge(config, share=(rank, world)).judges["reception"].endpoints
        shares.append(endpoint.concurrency)
    assert sum(shares) == concurrency and max(shares) - min(shares) <= 1


def test_more_processes_than_calls_in_flight_are_refused():
    config = JudgeConfig(kind="openai", base_url=URL, concurrency=3)
    with pytest.raises(ValueError, match="^judge.concurrency = 3: must be at least .* 4"):
        make_judge(config, share=(3, 4))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("samples", {"kind": "local", "samples": 3}),
        ("reception.samples", {"kind": "local", "reception": RoleConfig(samples=3)}),
        ("reception.samples", {"kind": "openai", "reception": RoleConfig("local", samples=3)}),
        ("reception.samples", {"samples": 3, "reception": RoleConfig("local")}),
    ],
)
def test_several_samples_of_a_local_judge_are_refused(name, settings):
    """They would be the same number, several times."""
    with pytest.raises(ValueError) as caught:
        JudgeConfig(**settings)
    assert str(caught.value) == f"{name} = 3: a local judge is deterministic; set samples to 1"
    JudgeConfig(kind="local", reception=RoleConfig("openai", samples=3))


def test_a_local_model_goes_where_it_is_told(monkeypatch):
    made = []
    monkeypatch.setattr(
        "perm_reward.judges.local.load_score_reader",
        lambda name, device, rubrics: made.append(str(device)),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    policy = torch.device("cuda", 3)
    for setting, beside, where in [
        ("auto", policy, "cuda:3"),
        ("auto", torch.device("cpu"), "cpu"),
        ("auto", None, "cuda:1"),
        ("cpu", policy, "cpu"),
        ("cuda", torch.device("cpu"), "cuda:1"),
    ]:
        make_judge(JudgeConfig(kind="local", device=setting), device=beside)
        assert made.pop() == where and not made
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_judge(JudgeConfig(kind="local"))
    assert made == ["cpu"]
    with pytest.raises(ValueError, match="^judge.device = cuda: PyTorch finds no CUDA device"):
        make_judge(JudgeConfig(kind="local", device="cuda"))


def test_a_local_model_is_loaded_once_whatever_it_ignores(monkeypatch):
    made = []
    monkeypatch.setattr(
        "perm_reward.judges.local.LocalJudge",
        lambda config, **how: made.append(config) or SimpleNamespace(label=config.model),
    )
    config = JudgeConfig(kind="local", model="a", reception=RoleConfig(temperature=1.0))
    make_judge(config)
    make_judge(replace(config, bystander=RoleConfig(model="b")))
    assert [one.model for one in made] == ["a", "a", "b"]
