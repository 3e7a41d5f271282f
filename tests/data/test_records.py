"""Reading records: what is taken from PERM's format, and what a bad line's error says."""

import json

import pytest

from data import RecordError, SeekerRecord, load_records

GOOD = {
    "persona": {"identity": "a nurse of 41", "age": 41},
    "scenario": "Her night shift was cancelled again.",
    "dialogue": ["They sent me home.", "an answer that nobody reads"],
    "id": 7,
}


def write(tmp_path, *lines: bytes | str | dict):
    path = tmp_path / "records.jsonl"
    path.write_bytes(
        b"\n".join(
            line
            if isinstance(line, bytes)
            else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        )
    )
    return path


def test_reads_perm_format_and_ignores_other_keys(tmp_path):
    path = write(tmp_path, GOOD, {**GOOD, "emotion": "annoyed", "source": "invented"})
    expected = SeekerRecord(
        persona="a nurse of 41",
        scenario="Her night shift was cancelled again.",
        query="They sent me home.",
        emotion="",
        source="records.jsonl",
    )
    first, second = load_records(path)
    assert first == expected
    assert (second.emotion, second.source) == ("annoyed", "invented")
    assert load_records(str(path)) == [first, second]


def test_blank_lines_at_the_end_are_fine(tmp_path):
    assert len(load_records(write(tmp_path, GOOD, GOOD, "", "  ", "\r", ""))) == 2


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    """JSON allows U+2028 and U+0085 unescaped in a string; `str.splitlines` would cut there."""
    scenario = "One line.\u2028Another.\u0085A third."
    path = write(tmp_path, json.dumps({**GOOD, "scenario": scenario}, ensure_ascii=False))
    assert load_records(path)[0].scenario == scenario


def without(key: str) -> dict:
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("", "the line is empty"),
        ("[1, 2]", "expected an object, found a list"),
        ("null", "expected an object, found null"),
        (without("persona"), "the key 'persona' is missing"),
        ({**GOOD, "persona": {}}, "the key 'persona.identity' is missing"),
        (without("scenario"), "the key 'scenario' is missing"),
        (without("dialogue"), "the key 'dialogue' is missing"),
        ({**GOOD, "persona": "a nurse"}, "'persona' must be an object, found a string"),
        (
            {**GOOD, "persona": {"identity": 3}},
            "'persona.identity' must be a string, found a number",
        ),
        ({**GOOD, "scenario": None}, "'scenario' must be a string, found null"),
        ({**GOOD, "dialogue": "hello"}, "'dialogue' must be a list, found a string"),
        ({**GOOD, "dialogue": []}, "'dialogue' is empty"),
        ({**GOOD, "dialogue": [{"role": "user"}]}, "'dialogue[0]' must be a string"),
        ({**GOOD, "emotion": True}, "'emotion' must be a string, found a truth value"),
        ({**GOOD, "source": 1.5}, "'source' must be a string, found a number"),
        ({**GOOD, "persona": {"identity": " "}}, "'persona.identity' has no text"),
        ({**GOOD, "scenario": "\n"}, "'scenario' has no text"),
        ({**GOOD, "dialogue": [""]}, "'dialogue[0]' has no text"),
        (b'{"scenario": "caf\xe9"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(RecordError) as error:
        load_records(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 2: ")
    assert reason in message
    assert "\n" not in message
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \r\n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(RecordError, match="no records"):
        load_records(path)


def test_a_missing_file_names_the_bundled_samples(tmp_path):
    with pytest.raises(RecordError, match=r"absent.jsonl: cannot be read .*'bundled-heldout'"):
        load_records(tmp_path / "absent.jsonl")
