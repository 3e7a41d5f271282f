"""What costs points with the lexical judge: how far each fault goes, in [0, 1], and where."""

from collections import Counter

from perm_reward.judges.lexical_text import RUN, Finding, Record, Text, listed, ramp, runs
from perm_reward.judges.lexicon import FEELING_PHRASES, FUNCTION_WORDS, NEVER_AFTER, PRAISE

# --- texts that only look like an answer ----------------------------------------------------------


def copies(text: Text, record: Record) -> Finding:
    """Words in runs that the record holds too: free up to 55 % of the text, the worst at 90 %."""
    copied_until = copied = 0
    for start, run in enumerate(runs(text.words)):
        if run in record.runs:
            copied += start + RUN - max(start, copied_until)
            copied_until = start + RUN
    share = copied / max(1, len(text.words))
    return ramp(share, 0.55, 0.9), f"{share:.0%} of the words in runs of the record"


def repeats(text: Text, record: Record) -> Finding:
    """Word triples that came before (8-35 %), sentences too, or one word as 20-40 % of all."""
    threes = list(zip(text.words, text.words[1:], text.words[2:], strict=False))
    again = 1 - len(set(threes)) / len(threes) if threes else 0.0
    sentences = [tuple(text.words[one.start : one.end]) for one in text.sentences]
    twice = len(sentences) - len(set(sentences))
    most = max(Counter(text.words).values(), default=0) / max(10, len(text.words))
    share = max(
        ramp(again, 0.08, 0.35),
        ramp(twice, 0, max(2.0, len(sentences) / 2)),
        ramp(most, 0.2, 0.4),
    )
    return share, f"{again:.0%} of word triples, {twice} sentences, one word {most:.0%}"


def lists_words(text: Text, record: Record) -> Finding:
    """Too few function words for sentences (35 % down to 20 %), or one of 45 to 90 words."""
    function = sum(word in FUNCTION_WORDS for word in text.words) / max(1, len(text.words))
    longest = max((one.end - one.start for one in text.sentences), default=0)
    share = max(ramp(function, 0.35, 0.2), ramp(longest, 45, 90))
    return share, f"{function:.0%} function words, longest sentence {longest} words"


def breaks_grammar(text: Text, record: Record) -> Finding:
    """Words in a row as in "the of" or "to is": at 5 % to 25 % of the places where that can be.

    People's own texts stay under 10 %; their words in random order come to about 25 %.
    """
    pairs = [
        (text.words[i], text.words[i + 1])
        for sentence in text.sentences
        for i in range(sentence.start, sentence.end - 1)
        if text.words[i] in NEVER_AFTER
    ]
    broken = [f"{first} {second}" for first, second in pairs if second in NEVER_AFTER[first]]
    return ramp(len(broken) / max(8, len(pairs)), 0.05, 0.25), listed(broken)


def lists_feelings(text: Text, record: Record) -> Finding:
    """Feelings of more than four kinds (the worst: eight), or in 15 to 30 % of the words."""
    kinds = {FEELING_PHRASES[phrase] for _, phrase in text.feelings}
    density = len(text.feelings) / max(10, len(text.words))
    share = max(ramp(len(kinds), 4, 8), ramp(density, 0.15, 0.3))
    return share, f"{len(kinds)} kinds, {density:.0%} of the words"


def is_too_long(text: Text, record: Record) -> Finding:
    """Free up to 160 words, the worst at 400."""
    return ramp(len(text.words), 160, 400), f"{len(text.words)} words"


def asks_too_much(text: Text, record: Record) -> Finding:
    """Two questions are free, five are the worst."""
    questions = sum(one.is_question for one in text.sentences)
    return ramp(questions, 2, 5), f"{questions} questions"


# --- words that miss the person -------------------------------------------------------------------


def contradicts_feelings(text: Text, record: Record) -> Finding:
    """Half for each feeling whose tone is against all that the seeker states."""
    named = [phrase for _, phrase in text.feelings]
    against = [phrase for phrase in named if record.contradicts(FEELING_PHRASES[phrase])]
    return ramp(len(against), 0, 2), listed(against)


def uses_stock_phrases(text: Text, record: Record) -> Finding:
    """A third for each phrase that fits any sorrow."""
    return _counted(text, "stock", most=3)


def stays_vague(text: Text, record: Record) -> Finding:
    """A third for each phrase that would be true of anybody."""
    return _counted(text, "vague", most=3)


def pads(text: Text, record: Record) -> Finding:
    """A third for each phrase that adds nothing."""
    return _counted(text, "padding", most=3)


def waves_off(text: Text, record: Record) -> Finding:
    """Half for each order, lecture or belittling."""
    return _counted(text, "dismissal", most=2)


def speaks_about_the_person(text: Text, record: Record) -> Finding:
    """Half for each "the user" in words that are meant for that user."""
    return _counted(text, "third_person", most=2)


def promises(text: Text, record: Record) -> Finding:
    """Half for each claim it cannot back: how it will end, "I have been there", "studies show"."""
    return _counted(text, "promise", most=2)


def exaggerates(text: Text, record: Record) -> Finding:
    """A third for each absolute word after the first."""
    return _counted(text, "absolute", free=1, most=4)


def _counted(text: Text, category: str, *, free: int = 0, most: int) -> Finding:
    found = [phrase for _, phrase in text.phrases[category]]
    return ramp(len(found), free, most), listed(found)


def flatters(text: Text, record: Record) -> Finding:
    """Half for each praise of the person: a set phrase, or a word of praise soon after "you"."""
    found = [phrase for _, phrase in text.phrases["flattery"]]
    for position, word in enumerate(text.words):
        if word in PRAISE:
            before = text.words[max(0, position - 5) : position]
            if "you" in before or "such" in before or "what" in before:
                found.append(word)
    return ramp(len(found), 0, 2), listed(found)


def adds_names(text: Text, record: Record) -> Finding:
    """A quarter for each name or number that the record does not hold.

    All that rules can see of invented facts; whether anything else is made up, they cannot tell.
    """
    new = set(text.names) - record.words - FUNCTION_WORDS
    return ramp(len(new), 0, 4), listed(sorted(new))
