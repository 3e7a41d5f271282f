"""Demonstrations: reproducible, in the form, of uneven quality, made of the record's own words."""

import re
import statistics
import subprocess
import sys

import pytest

from data import SeekerRecord, load_records
from data.demonstrations import demonstrate, events, mix_records, own_words, things, who

RECORD = SeekerRecord(
    persona="A retired railway electrician of 74 in Lower Silesia, widowed three years.",
    scenario="He traced an army friend and wrote him four pages. The answer came after six weeks: "
    "a printed card from a daughter. When he read it, he sat down.",
    query="After fifty years I found my friend from the army. How can a man forget the long march?",
    emotion="disappointed",
)
ODD_RECORDS = [
    SeekerRecord(persona="x", scenario="?", query="..."),
    SeekerRecord(persona="(Ana)", scenario="{event} 100%", query="why {thing}?"),
    SeekerRecord(persona="医者", scenario="雨が降った。", query="もう疲れました"),
    SeekerRecord(persona="\n", scenario="a\n\nb", query="# Response\nmine", emotion="unheard-of"),
]


def test_lifted_words_are_the_records_own():
    assert who(RECORD) == "a retired railway electrician of 74 in Lower Silesia"
    assert events(RECORD) == ["he traced an army friend", "the answer came after six weeks"]
    assert own_words(RECORD) == ["How can a man forget the long march"]
    assert (True, "friend") in things(RECORD)
    assert (False, "army friend") in things(RECORD)


def test_the_same_call_gives_the_same_text_in_every_process():
    here = demonstrate(RECORD, seed=3, sample=5)
    code = (
        "from data import SeekerRecord\n"
        "from data.demonstrations import demonstrate\n"
        f"print(demonstrate({RECORD!r}, seed=3, sample=5), end='')"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout == here


def test_seed_sample_and_record_each_change_the_text():
    other = load_records("bundled")[0]
    texts = {demonstrate(RECORD, seed=seed, sample=k) for seed in range(4) for k in range(8)}
    assert len(texts) > 28
    assert demonstrate(other, seed=0, sample=0) not in texts


@pytest.mark.parametrize("record", [RECORD, *ODD_RECORDS])
def test_every_demonstration_has_the_form(record):
    for sample in range(50):
        text = demonstrate(record, sample=sample)
        assert re.fullmatch(r"# Analysis\n[^\n]+\n\n# Response\n[^\n]+", text), text
        assert "{" not in text.replace("{event}", "").replace("{thing}", "")


def test_lengths_and_unevenness_on_the_bundled_sample():
    records = load_records("bundled")
    lengths = [
        len(demonstrate(record, sample=sample).split()) for record in records for sample in range(8)
    ]
    assert 55 < statistics.mean(lengths) < 80
    assert max(lengths) < 130

    def share(pattern: str) -> float:
        texts = [demonstrate(record, sample=sample) for record in records for sample in range(8)]
        return statistics.mean(bool(re.search(pattern, text)) for text in texts)

    assert 0.3 < share(r"\bbecause |cause is clear") < 0.7
    assert 0.3 < share(r"\?$") < 0.7
    assert 0.05 < share(r"amazing|incredible|wonderful") < 0.3
    assert 0.3 < share(r"I am sorry to hear|I understand how|reason\.|wounds|strong|soon") < 0.8


def test_mixed_records_are_new_and_of_the_given_sentences():
    records = load_records("bundled")
    mixed = mix_records(records, 200, seed=1)
    assert mixed == mix_records(records, 200, seed=1)
    assert mixed != mix_records(records, 200, seed=2)
    assert len({record.query for record in mixed} - {record.query for record in records}) > 180
    for record in mixed:
        words_of_its_emotion = {
            word
            for source in records
            if source.emotion == record.emotion
            for word in f"{source.scenario} {source.query}".split()
        }
        assert set(f"{record.scenario} {record.query}".split()) <= words_of_its_emotion
