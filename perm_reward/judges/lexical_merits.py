"""What earns points from the lexical judge: how far each merit goes, in [0, 1], and where.

"Linked" means that a sentence also holds a content word of the scenario or of the message: a phrase
that fits any record earns less than one that is tied to this one.
"""

from bisect import bisect_left

from perm_reward.judges.lexical_text import Finding, Found, Record, Sentence, Text, listed, ramp
from perm_reward.judges.lexicon import FEELING_PHRASES

_YOU = frozenset(("you", "your", "yours", "yourself"))


def _links(text: Text, record: Record, sentence: Sentence) -> list[str]:
    """The words of a sentence that the scenario or the message also hold, each stem once."""
    span = range(sentence.start, sentence.end)
    by_stem = {text.stems[i]: text.words[i] for i in span if text.stems[i] in record.stems}
    return list(by_stem.values())


def _within(found: list[Found], sentence: Sentence) -> list[Found]:
    # The positions ascend, so a long text costs no scan of all its phrases for each sentence.
    first = bisect_left(found, (sentence.start,))
    return found[first : bisect_left(found, (sentence.end,), lo=first)]


def _says_you(text: Text, sentence: Sentence) -> bool:
    return not _YOU.isdisjoint(text.words[sentence.start : sentence.end])


# --- what is understood ---------------------------------------------------------------------------


def names_feelings(text: Text, record: Record) -> Finding:
    """0.7 for the best feeling, 0.3 for the next; each counts whole if the record names its family.

    A feeling that the record does not name may still be right, which rules cannot tell: it counts
    0.6, or nothing if the seeker states only feelings of the opposite tone.
    """
    credits = {}
    for _, phrase in text.feelings:
        family = FEELING_PHRASES[phrase]
        if family in record.feelings:
            credits[family] = (1.0, f"{phrase} ({family}, in the record)")
        elif not record.contradicts(family):
            credits[family] = (0.6, f"{phrase} ({family}, not named in the record)")
        else:
            credits[family] = (0.0, f"{phrase} ({family}, against what they say)")
    best = sorted(credits.values(), key=lambda credit: -credit[0])[:2]
    share = sum(weight * credit for weight, (credit, _) in zip((0.7, 0.3), best, strict=False))
    return share, listed([shown for _, shown in best])


def uses_own_words(text: Text, record: Record) -> Finding:
    """Eight different content words of the scenario or the message; more earn no more."""
    links = _links(text, record, Sentence(0, len(text.words), is_question=False))
    return ramp(len(links), 0, 8), listed(links)


def names_cause(text: Text, record: Record) -> Finding:
    """A cause word, up to three linked words near it (0.2 each) and with them a feeling (0.4)."""
    best, shown = 0.0, "nothing"
    for sentence in text.sentences:
        for start, phrase in _within(text.phrases["cause"], sentence):
            reach = Sentence(max(sentence.start, start - 10), min(sentence.end, start + 15), False)
            links = _links(text, record, reach)[:3]
            feelings = [one.phrase for one in _within(text.feelings, reach)[:1]] if links else []
            share = 0.2 * len(links) + 0.4 * len(feelings)
            if share > best:
                best, shown = share, listed([phrase, *links, *feelings])
    return best, shown


def looks_underneath(text: Text, record: Record) -> Finding:
    """Half for two words of the persona, half for a linked word of need or value (0.2 unlinked)."""
    who = {
        stem: word
        for stem, word in zip(text.stems, text.words, strict=True)
        if stem in record.persona_stems and stem not in record.stems
    }
    need, shown = _linked_phrase(text, record, "need", unlinked=0.4)
    found = [] if need == 0 else [shown]
    return 0.5 * need + 0.5 * ramp(len(who), 0, 2), listed([*found, *who.values()])


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
                best, shown = share, listed([found[0].phrase, *links[:2]])
    return best, shown


def joins_person_and_story(text: Text, record: Record) -> Finding:
    """In one sentence: you, three linked words (0.2 each), a feeling or its acceptance (0.4)."""
    best, shown = 0.0, "nothing"
    for sentence in text.sentences:
        links = _links(text, record, sentence)[:3]
        if links and _says_you(text, sentence):
            warm = _within(text.feelings, sentence) + _within(text.phrases["validation"], sentence)
            share = 0.2 * len(links) + (0.4 if warm else 0.0)
            if share > best:
                best, shown = share, listed(["you", *links, *(one.phrase for one in warm[:1])])
    return best, shown


def invites_to_go_on(text: Text, record: Record) -> Finding:
    """Among the last two sentences: an open question, linked (1) or not (0.6), or less.

    A closed question counts half of an open one; words of invitation without a question, 0.5.
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
            best, shown = share, listed([kind, *links])
    return best, shown


# --- how it is said -------------------------------------------------------------------------------


def speaks_to_the_person(text: Text, record: Record) -> Finding:
    """Half of the sentences say "you"."""
    to_you = sum(_says_you(text, sentence) for sentence in text.sentences)
    share = ramp(to_you, 0, max(1.0, len(text.sentences) / 2))
    return share, f"you, in {to_you} of {len(text.sentences)} sentences"


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
    """30 % content words or more, in 25 to 90 words; nothing for 15 %."""
    content = sum(map(bool, text.stems)) / max(1, len(text.words))
    length, shown = has_sensible_length(text, record)
    return length * ramp(content, 0.15, 0.3), f"{content:.0%} content words, {shown}"


def says_something(text: Text, record: Record) -> Finding:
    """Twenty words: to be without a fault earns nothing before something is said."""
    return ramp(len(text.words), 0, 20), f"{len(text.words)} words"
