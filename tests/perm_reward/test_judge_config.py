import math

import pytest

from perm_reward.judges import JudgeConfig, make_judge

SECRET = "sk-proj-0123456789abcdef"


@pytest.mark.parametrize(
    "name, value",
    [
        ("kind", "gpt"),
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


def test_kinds_make_their_judges():
    assert type(make_judge(JudgeConfig())).__name__ == "LexicalJudge"
    judge = make_judge(JudgeConfig(kind="openai", base_url="http://127.0.0.1:9/v1"))
    assert type(judge).__name__ == "OpenAIJudge"
    assert judge.label == "openai: gpt-4o-mini at http://127.0.0.1:9/v1"
