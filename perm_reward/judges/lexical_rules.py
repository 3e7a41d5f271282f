"""The rules of the lexical judge: each looks at one thing and says how far it holds, and where.

A rule returns a share in [0, 1] and what it found in the text. Merits are shares of points to earn,
faults of points to lose; how many, the tables in `perm_reward.judges.lexical` say. "Linked" means
that a sentence also holds a content word of the seeker's record: a phrase that fits any record earns
less than one that is tied to this one.

What is found is named by words alone, without marks around them, since a text could hold
"Score: 5" and the reply must hold one score only.
"""

from perm_reward.judges.lexical_text import RUN, Found, Record, Sentence, Text, runs
from perm_reward.judges.lexicon import FEELING_PHRASES, FUNCTION_WORDS, PRAISE

Finding = tuple[float, str]

_YOU = frozenset(("you", "your", "yours", "yourself"))
_SHOWN = 8  # of a long list of findings


def ramp(value: float, none: float, full: float) -> float:
    """0 at `none`, 1 at `full`, a straight line between, level outside; `full` may be the smaller."""
    return min(1.0, max(0.0, (value - none) / (full - none)))


def _listed(found: list[str]) -> str:
    """What was found, each once, in order."""
    distinct = list(dict.fromkeys(found))
    more = [f"and {len(distinct) - _SHOWN} more"] if len(distinct) > _SHOWN else []
    return ", ".join(distinct[:_SHOWN] + more) or "nothing"


def _count(text: Text, category: str) -> tuple[int, str]:
    found = text.phrases[category]
    return len(found), _listed([phrase for _, phrase in found])


def _links(text: Text, record: Record, sentence: Sentence) -> list[str]:
    """The words of a sentence that the scenario or the query also hold, each stem once."""
    span = range(sentence.start, sentence.end)
    by_stem = {text.stems[i]: text.words[i] for i in span if text.stems[i] in record.stems}
    return list(by_stem.values())


def _within(found: list[Found], sentence: Sentence) -> list[Found]:
    return [one for one in found if sentence.start <= one.start < sentence.end]


# --- merits: what is understood -------------------------------------------------------------------


def names_feelings(text: Text, record: Record) -> Finding:
    """0.7 for the best feeling, 0.3 for the next; each counts whole if the record names its family.

    A feeling that the record does not name may still be right, which rules cannot tell: it counts
    0.6, or nothing if the record names only feelings of the opposite tone.
    """
    credits = {}
    for _, phrase in text.feelings:
        family = FEELING_PHRASES[phrase]
        if family in record.feelings:
            credits[family] = (1.0, f"{phrase} ({family}, in the record)")
        elif not record.contradicts(family):
            credits[family] = (0.6, f"{phrase} ({family}, not named in the record)")
        else:
            credits[family] = (0.0, f"{phrase} ({family}, against the record)")
    best = sorted(credits.values(), key=lambda credit: -credit[0])[:2]
    weights = (0.7, 0.3)
    share = sum(weight * credit for weight, (credit, _) in zip(weights, best, strict=False))
    return share, _listed([shown for _, shown in best])


def uses_own_words(text: Text, record: Record) -> Finding:
    """Six different content words of the scenario or the message, and more of them earn no more."""
    by_stem = {
        stem: word
        for stem, word in zip(text.stems, text.words, strict=True)
        if stem in record.stems
    }
    return ramp(len(by_stem), 0, 6), _listed(list(by_stem.values()))


def names_cause(text: Text, record: Record) -> Finding:
    """A cause word with up to three linked words within reach: 0.2 each, 0.4 if a feeling is near."""
    best, shown = 0.0, "nothing"
    for sentence in text.sentences:
        for start, phrase in _within(text.phrases["cause"], sentence):
            reach = Sentence(max(sentence.start, start - 10), min(sentence.end, start + 15), False)
            links = _links(text, record, reach)[:3]
            feeling = bool(_within(text.feelings, reach))
            share = 0.2 * len(links) + (0.4 if links and feeling else 0.0)
            if share > best:
                best, shown = share, _listed([phrase, *links] + ["a feeling"] * feeling)
    return best, shown


def looks_underneath(text: Text, record: Record) -> Finding:
    """Half for two words of the persona, half for a linked word of need or value (0.2 unlinked)."""
    who = [
        word
        for stem, word in zip(text.stems, text.words, strict=True)
        if stem in record.persona_stems and stem not in record.stems
    ]
    share, need = 0.0, []
    for sentence in text.sentences:
        if found := _within(text.phrases["need"], sentence):
            weight = 0.5 if _links(text, record, sentence) else 0.2
            if weight > share:
                share, need = weight, [found[0].phrase]
    return share + 0.5 * ramp(len(set(who)), 0, 2), _listed(need + who)


def joins_contrasts(text: Text, record: Record) -> Finding:
    """One linked sentence that sets one thing against another (0.3 unlinked)."""
    return _linked_phrase(text, record, "contrast", unlinked=0.3)


def validates(text: Text, record: Record) -> Finding:
    """One linked sentence that lets the feeling be (0.4 unlinked)."""
    return _linked_phrase(text, record, "validation", unlinked=0.4)


def opens_a_way(text: Text, record: Record) -> Finding:
    """One linked offer of a next step or of rest, without an order (0.4 unlinked)."""
    return _linked_phrase(text, record, "way_forward", unlinked=0.4)


def _linked_phrase(text: Text, record: Record, category: str, unlinked: float) -> Finding:
    best, shown = 0.0, "nothing"
    for sentence in text.sentences:
        if found := _within(text.phrases[category], sentence):
            links = _links(text, record, sentence)
            share = 1.0 if links else unlinked
            if share > best:
                best, shown = share, _listed([found[0].phrase, *links[:2]])
    return best, shown


# --- merits: how it is said -----------------------------------------------------------------------


def speaks_to_the_person(text: Text, record: Record) -> Finding:
    """Half of the sentences say "you"."""
    to_you = sum(_says_you(text, sentence) for sentence in text.sentences)
    share = ramp(to_you, 0, max(1.0, len(text.sentences) / 2))
    return share, f"you, in {to_you} of {len(text.sentences)} sentences"


def _says_you(text: Text, sentence: Sentence) -> bool:
    return not _YOU.isdisjoint(text.words[sentence.start : sentence.end])


def joins_person_and_story(text: Text, record: Record) -> Finding:
    """In one sentence: you, two linked words (0.3 each), and a feeling or its acceptance (0.4)."""
    best, shown = 0.0, "nothing"
    for sentence in text.sentences:
        links = _links(text, record, sentence)[:2]
        if not links or not _says_you(text, sentence):
            continue
        warm = _within(text.feelings, sentence) or _within(text.phrases["validation"], sentence)
        share = 0.3 * len(links) + (0.4 if warm else 0.0)
        if share > best:
            best, shown = share, _listed(["you", *links] + [one.phrase for one in warm[:1]])
    return best, shown


def invites_to_go_on(text: Text, record: Record) -> Finding:
    """Among the last two sentences: an open question, linked (1) or not (0.6), or less.

    A closed question counts half of an open one, words of invitation without a question 0.5.
    """
    best, shown = 0.0, "nothing"
    for sentence in text.sentences[-2:]:
        opening = Sentence(sentence.start, min(sentence.end, sentence.start + 4), False)
        links = _links(text, record, sentence)[:2]
        share, kind = 0.0, ""
        if sentence.is_question and sentence.end - sentence.start >= 4:
            is_open = bool(_within(text.phrases["open_question"], opening))
            share = (1.0 if links else 0.6) * (1.0 if is_open else 0.5)
            kind = "an open question" if is_open else "a closed question"
        elif _within(text.phrases["invitation"], sentence):
            share, kind = 0.5, "an invitation"
        if share > best:
            best, shown = share, _listed([kind, *links])
    return best, shown


def varies(text: Text, record: Record) -> Finding:
    """Three sentences or more that begin differently."""
    openings = {tuple(text.words[one.start : one.start + 2]) for one in text.sentences}
    share = ramp(len(text.sentences), 0, 3) * len(openings) / max(1, len(text.sentences))
    return share, f"{len(openings)} openings in {len(text.sentences)} sentences"


def has_plain_sentences(text: Text, record: Record) -> Finding:
    """Sentences of 4 to 25 words, in a text of at least 20 words."""
    plain = sum(4 <= one.end - one.start <= 25 for one in text.sentences)
    share = ramp(len(text.words), 0, 20) * plain / max(1, len(text.sentences))
    return share, f"{plain} of {len(text.sentences)} sentences"


def has_sensible_length(text: Text, record: Record) -> Finding:
    """25 to 90 words; less down to 6 and up to 160."""
    count = len(text.words)
    return ramp(count, 6, 25) * ramp(count, 160, 90), f"{count} words"


def says_much_in_few_words(text: Text, record: Record) -> Finding:
    """42 % content words or more, in 25 to 90 words; nothing for 25 %."""
    content = sum(map(bool, text.stems)) / max(1, len(text.words))
    length, shown = has_sensible_length(text, record)
    return length * ramp(content, 0.25, 0.42), f"{content:.0%} content words, {shown}"


def is_there(text: Text, record: Record) -> Finding:
    """Twenty words: what has no fault earns nothing before it says something."""
    return ramp(len(text.words), 0, 20), f"{len(text.words)} words"


# --- faults ---------------------------------------------------------------------------------------


def copies(text: Text, record: Record) -> Finding:
    """Words in runs that the record holds too: free up to half of the text, all lost at 85 %."""
    copied_until = copied = 0
    for start, run in enumerate(runs(text.words)):
        if run in record.runs:
            copied += start + RUN - max(start, copied_until)
            copied_until = start + RUN
    share = copied / max(1, len(text.words))
    return ramp(share, 0.5, 0.85), f"{share:.0%} of the words in runs of the record"


def repeats(text: Text, record: Record) -> Finding:
    """Three words in a row that came before: free up to 8 %, all lost at 40 %; sentences likewise."""
    threes = list(zip(text.words, text.words[1:], text.words[2:], strict=False))
    again = 1 - len(set(threes)) / max(1, len(threes)) if threes else 0.0
    wholes = [tuple(text.words[one.start : one.end]) for one in text.sentences]
    twice = len(wholes) - len(set(wholes))
    share = max(ramp(again, 0.08, 0.4), ramp(twice, 0, max(2.0, len(wholes) / 2)))
    return share, f"{again:.0%} of word triples, {twice} sentences"


def lists_words(text: Text, record: Record) -> Finding:
    """Too few function words for sentences (30 % down to 15 %), or sentences of 45 to 90 words."""
    count = len(text.words)
    function = sum(word in FUNCTION_WORDS for word in text.words) / max(1, count)
    longest = max((one.end - one.start for one in text.sentences), default=0)
    share = max(ramp(function, 0.3, 0.15), ramp(longest, 45, 90))
    return share, f"{function:.0%} function words, longest sentence {longest} words"


def lists_feelings(text: Text, record: Record) -> Finding:
    """More than four feelings (all lost at eight), or feelings in 15 to 30 % of the words."""
    families = {FEELING_PHRASES[phrase] for _, phrase in text.feelings}
    density = len(text.feelings) / max(10, len(text.words))
    share = max(ramp(len(families), 4, 8), ramp(density, 0.15, 0.3))
    return share, f"{len(families)} kinds, {density:.0%} of the words"


def contradicts_feeling(text: Text, record: Record) -> Finding:
    """Half for each feeling whose tone is against all that the record names."""
    against = [
        one.phrase for one in text.feelings if record.contradicts(FEELING_PHRASES[one.phrase])
    ]
    return ramp(len(against), 0, 2), _listed(against)


def is_too_long(text: Text, record: Record) -> Finding:
    """Free up to 160 words, all lost at 400."""
    return ramp(len(text.words), 160, 400), f"{len(text.words)} words"


def asks_too_much(text: Text, record: Record) -> Finding:
    """Two questions are free, all is lost at five."""
    questions = sum(one.is_question for one in text.sentences)
    return ramp(questions, 2, 5), f"{questions} questions"


def uses_stock_phrases(text: Text, record: Record) -> Finding:
    """A third for each phrase that fits any sorrow."""
    count, shown = _count(text, "stock")
    return ramp(count, 0, 3), shown


def flatters(text: Text, record: Record) -> Finding:
    """Half for each praise of the person: a set phrase, or "you are / such / what a" with praise."""
    _, shown = _count(text, "flattery")
    found = [] if shown == "nothing" else [phrase for _, phrase in text.phrases["flattery"]]
    for position, word in enumerate(text.words):
        if word in PRAISE:
            before = text.words[max(0, position - 5) : position]
            if "you" in before or "such" in before or "what" in before:
                found.append(word)
    return ramp(len(found), 0, 2), _listed(found)


def waves_off(text: Text, record: Record) -> Finding:
    """Half for each order, lecture or belittling."""
    count, shown = _count(text, "dismissal")
    return ramp(count, 0, 2), shown


def pads(text: Text, record: Record) -> Finding:
    """A third for each phrase that adds nothing."""
    count, shown = _count(text, "padding")
    return ramp(count, 0, 3), shown


def stays_vague(text: Text, record: Record) -> Finding:
    """A third for each phrase that would be true of anybody."""
    count, shown = _count(text, "vague")
    return ramp(count, 0, 3), shown


def speaks_about_the_person(text: Text, record: Record) -> Finding:
    """Half for each "the user" in words that are meant for that user."""
    count, shown = _count(text, "third_person")
    return ramp(count, 0, 2), shown


def exaggerates(text: Text, record: Record) -> Finding:
    """A third for each absolute word after the first."""
    count, shown = _count(text, "absolute")
    return ramp(count, 1, 4), shown


def promises(text: Text, record: Record) -> Finding:
    """Half for each claim that nobody can make: how it will end, that one has been there, "studies"."""
    count, shown = _count(text, "promise")
    return ramp(count, 0, 2), shown


def adds_names(text: Text, record: Record) -> Finding:
    """A quarter for each name or number that the record does not hold.

    All that rules can see of invented facts; whether anything else is made up, they cannot tell.
    """
    new = [name for name in text.names if name not in record.words and name not in FUNCTION_WORDS]
    return ramp(len(set(new)), 0, 4), _listed(new)
