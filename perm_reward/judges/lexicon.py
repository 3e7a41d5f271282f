"""The words that the lexical judge knows: feelings in families, and phrases of good and bad habit.

Plain lists of everyday English, to be read and argued with; nothing here is learned from data.
Texts are compared in lower case with short forms written out ("i'm" is "i am", "don't" is "do not",
"it's" is "it is"), so phrases are listed in that form.
"""

# --- feelings -------------------------------------------------------------------------------------

# Feelings that are near enough to count as one another: (tone, words and phrases that name them),
# the tone being 1 for pleasant, -1 for unpleasant, 0 for either.
_FAMILIES: dict[str, tuple[int, str]] = {
    "fear": (
        -1,
        """afraid, scared, scary, terrified, terrifying, frightened, frightening, fright, fear,
        fears, fearful, terror, anxious, anxiety, nervous, nerves, worry, worried, worries,
        worrying, uneasy, unease, dread, dreading, apprehensive, apprehension, panic, panicked,
        panicking, alarmed, petrified, tense, unsafe, on edge""",
    ),
    "anger": (
        -1,
        """angry, anger, mad, furious, fury, rage, enraged, annoyed, annoying, annoyance,
        irritated, irritating, irritation, frustrated, frustrating, frustration, resentful,
        resentment, outraged, outrage, indignant, indignation, bitterness, livid, seething,
        exasperated, infuriated, infuriating, betrayed, betrayal, fed up""",
    ),
    "disgust": (
        -1,
        """disgusted, disgusting, disgust, revolted, revolting, revulsion, sickened, sickening,
        repulsed, repulsive, appalled, appalling, nauseated, nausea, queasy""",
    ),
    "jealousy": (-1, "jealous, jealousy, envious, envy, envying, overlooked, passed over"),
    "sadness": (
        -1,
        """sad, sadness, grief, grieve, grieving, heartbroken, heartbreaking, heartbreak,
        devastated, devastating, devastation, sorrow, mourning, mourn, miserable, misery,
        crushed, hurt, hurting, painful, despair, despairing, hopeless, unhappy, tearful,
        gutted, shattered, heartache, ache, aching, loss, depressed, heavy, heavy heart""",
    ),
    "loneliness": (
        -1,
        """lonely, loneliness, alone, isolated, isolation, abandoned, unseen, invisible,
        forgotten, excluded, unwanted, unheard, left out, left behind""",
    ),
    "disappointment": (
        -1,
        """disappointed, disappointing, disappointment, disillusioned, discouraged,
        disheartened, deflated, let down""",
    ),
    "shame": (
        -1,
        """ashamed, shame, shameful, embarrassed, embarrassing, embarrassment, humiliated,
        humiliating, humiliation, mortified, mortifying, awkward, exposed, foolish, self
        conscious""",
    ),
    "guilt": (-1, "guilty, guilt, remorse, regret, regrets, regretting, conscience, self blame"),
    "strain": (
        -1,
        """overwhelmed, overwhelming, exhausted, exhausting, exhaustion, tired, drained,
        stressed, stress, burdened, burden, torn, conflicted, confused, helpless, powerless,
        stuck, trapped, restless, worn out""",
    ),
    "joy": (
        1,
        """happy, happiness, joyful, joy, joyous, glad, gladness, delighted, delight, cheerful,
        elated, elation, overjoyed, bliss, blissful, over the moon""",
    ),
    "excitement": (
        1,
        """excited, exciting, excitement, thrilled, thrilling, eager, eagerness, anticipation,
        anticipating, expectant, enthusiastic, enthusiasm, giddy, impatient, looking forward""",
    ),
    "pride": (
        1,
        """proud, pride, accomplished, accomplishment, triumphant, triumph, confident,
        confidence, self assured, assured, ready, readiness, prepared""",
    ),
    "peace": (
        1,
        """content, contented, contentment, satisfied, satisfaction, pleased, peaceful, peace,
        calm, calmness, serene, serenity, relief, relieved, at peace, at ease""",
    ),
    "gratitude": (
        1,
        """grateful, thankful, gratitude, thankfulness, appreciative, appreciation, appreciate,
        indebted, touched, are moved, feel moved, feels moved, so moved, deeply moved""",
    ),
    "warmth": (
        1,
        """love, loving, tender, tenderness, caring, affection, affectionate, fond, fondness,
        loyal, loyalty, faithful, devoted, devotion, trust, trusting, trusted, closeness,
        protective, safe""",
    ),
    "hope": (
        1,
        "hopeful, hope, hopes, hoping, optimistic, optimism, encouraged, encouraging, faith",
    ),
    "awe": (
        1,
        """impressed, admire, admiration, admiring, awe, awed, amazed, amazement, astonished,
        astonishment, marvel""",
    ),
    "surprise": (
        0,
        """surprised, surprising, surprise, stunned, shocked, shock, startled, disbelief,
        taken aback""",
    ),
    "longing": (
        0,
        """nostalgic, nostalgia, wistful, wistfulness, longing, yearning, sentimental, miss,
        missed, homesick, homesickness, bittersweet""",
    ),
}


def _entries(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


TONES = {family: tone for family, (tone, _) in _FAMILIES.items()}

# --- phrases --------------------------------------------------------------------------------------

PHRASES: dict[str, tuple[str, ...]] = {
    # Good habits.
    "cause": _entries(
        """because, because of, since, after, due to, as a result, that is why, which is why, no
        wonder, now that, ever since, comes from, came from, the reason, so that, left them,
        leaves them, left you, leaves you, made them, makes them, made you, makes you"""
    ),
    "contrast": _entries(
        """but, although, though, even though, yet, while, whereas, despite, at the same time,
        and also, both, mixed with, underneath, beneath, under it, behind it, rather than"""
    ),
    "need": _entries(
        """need, needs, needing, wish, wishes, want, wants, longs, matters, matter, means,
        meant, meaning, value, values, sense of, identity, who they are, who she is, who he is,
        see themselves, sees himself, sees herself, self worth, dignity, belong, belonging,
        control, respect, respected, recognised, recognized, seen, understood, role, promise,
        duty, afraid of losing, holds dear, hopes to, proof, carries, deserves"""
    ),
    "validation": _entries(
        """makes sense, no wonder, of course you, of course it, anyone would, anybody would,
        understandable, you have every right, it is okay to, it is all right to, you are
        allowed, allowed to, it counts, that counts, that is a lot, so much to carry, carries a
        lot, a lot to carry, hard to carry, deserves, you deserve, i hear, i can hear, i can
        see, i can picture, i can imagine, it sounds, that sounds, sounds like, sounds as if,
        how could you not, nothing wrong with, you do not have to, you did not, you are not
        wrong"""
    ),
    "way_forward": _entries(
        """you could, you might, could you, might help, may help, could help, if you want, if
        you like, when you are ready, one thing, one small, small step, a first step, take your
        time, you can take, at your own pace, you do not have to, no need to, what if you,
        perhaps you, maybe you, it is enough to, for tonight, for now, before you, next time,
        let it, let yourself"""
    ),
    "invitation": _entries(
        """tell me, i would like to hear, i would love to hear, i want to hear, i am listening,
        i am here to listen, say more, if you want to talk, keep talking, happy to hear, go on"""
    ),
    "open_question": _entries(
        """what, how, which, who, where, when, tell me more, would you tell, would you like to
        tell, do you want to tell, could you tell, can you tell, will you tell"""
    ),
    # Bad habits.
    "stock": _entries(
        """sorry to hear, i understand how you feel, i know how you feel, i know exactly, i
        completely understand, i totally understand, everything happens for a reason, stay
        strong, be strong, stay positive, think positive, hang in there, keep your chin up, chin
        up, time heals, time will heal, bright side, silver lining, light at the end of the
        tunnel, this too shall pass, you are not alone, things will get better, it will get
        better, it gets better, it could be worse, it is what it is, god has a plan, meant to
        be, as an ai, as a language model, i am just an ai, i am here for you, here to help,
        your feelings are valid, feelings are valid, thank you for sharing, thanks for sharing,
        i appreciate you sharing, reach out, seek professional help, sending you, thoughts and
        prayers, take a deep breath, one day at a time, take care of yourself, be kind to
        yourself, you have got this, you got this, never give up, follow your heart, believe in
        yourself, congratulations on your, that must be hard, it must be hard, that must be
        difficult, it must be difficult, i can only imagine, difficult time, tough time, hope
        this helps, let me know if, feel free to, whatever you need"""
    ),
    "flattery": _entries(
        """one of the best, one in a million, i admire you, so brave, so strong, so wise, so
        talented, you inspire, you are inspiring, you are a hero, you are a star, you rock, no
        one like you, you are special, better than anyone"""
    ),
    "dismissal": _entries(
        """you should, you must, you need to, you have to, you ought, you had better, calm down,
        cheer up, get over, move on, let it go, just relax, stop worrying, do not worry, do not
        be sad, do not cry, do not think about it, do not be silly, have it worse, has it worse,
        at least you, no big deal, not a big deal, not so bad, overreacting, too sensitive, it
        is recommended, it is important to, it is advisable, grow up, your own fault, your
        fault, get a grip"""
    ),
    "padding": _entries(
        """it is important to note, it should be noted, at the end of the day, in a way, in some
        way, needless to say, as i said, as mentioned, when one thinks, one of them, many things
        in life, that is how it is, that is how it goes, it really is, as you know, in general,
        generally speaking, to be honest, the fact that, when it comes to, basically, literally,
        honestly, really really, very very, in this situation, in your situation, in any case,
        it goes without saying"""
    ),
    "absolute": _entries(
        """always, everyone, everybody, nobody, no one, completely, totally, absolutely,
        definitely, certainly, obviously, undoubtedly, without a doubt, guaranteed, perfect,
        perfectly, truly, incredibly, extremely, utterly, worst, every single, in the world, of
        all time"""
    ),
    "promise": _entries(
        """i promise, will be fine, will be okay, will be all right, will be alright, will get
        better, will pass, will work out, will get through, will heal, will regret, guaranteed,
        i know exactly, i know how, i have been there, i went through, happened to me, studies
        show, research shows, statistics, experts say, science says, it is proven, heals all,
        happens for a reason"""
    ),
    "third_person": _entries(
        "the user, this user, the seeker, the client, the patient, the speaker"
    ),
    "vague": _entries(
        """in a situation, has emotions, have emotions, some emotions, some feelings, some
        advice, something that happened, going through something, common problem, many people
        have, talking about something, a lot going on, wants help, wants support, needs support"""
    ),
}

FEELING_PHRASES = {
    entry: family for family, (_, words) in _FAMILIES.items() for entry in _entries(words)
}

# Praise of the person, when it follows "you are", "such a", "what a".
PRAISE = frozenset(
    """amazing incredible wonderful brilliant inspiring brave strong perfect extraordinary
    remarkable beautiful special fantastic awesome gifted genius kindest bravest strongest
    smartest best angel hero saint warrior superstar exceptional outstanding phenomenal
    magnificent""".split()
)

# --- words without content ------------------------------------------------------------------------

SHORT_FORMS = {
    "can't": ("can", "not"),
    "cannot": ("can", "not"),
    "won't": ("will", "not"),
    "shan't": ("shall", "not"),
    "let's": ("let", "us"),
}
SHORT_ENDINGS = {
    "n't": "not",
    "'re": "are",
    "'ve": "have",
    "'ll": "will",
    "'d": "would",
    "'m": "am",
}
# After these words, "'s" is "is"; after all others it shows possession and is dropped.
BEFORE_IS = frozenset("it that what there here he she who how where".split())

FUNCTION_WORDS = frozenset(
    """a about above after again against all almost already also although always am an and
    another any anybody anyone anything are around as at away back be became because become been
    before behind being below beside between both but by can could did do does doing done down
    during each either else enough even ever every everybody everyone everything few for from
    get gets getting give given go goes going gone got had has have having he her here hers
    herself him himself his how i if in into is it its itself just keep keeps kept less let like
    lot made make makes many may maybe me might mine more most much must my myself near never no
    nobody none nor not nothing now of off often on once one only onto or other others our ours
    ourselves out over own per perhaps put quite rather really same say says shall she should
    since so some somebody someone something soon still such than that the their theirs them
    themselves then there these they thing things this those though through till to too towards
    under until up upon us very was way we well went were what when where whether which while
    who whom whose why will with within without would yes yet you your yours yourself""".split()
)

# Words that a sentence almost never puts in a row: (one of these, followed by one of those).
_NEVER_IN_A_ROW = (
    (
        "the a an my your their our its",
        """of to and or but if is are was were be am does did has have had would could should
        because the a an my your their our i you he she it we they me him them""",
    ),
    (
        "of to from with at for into about by on in over",
        """is are was were am does did has had would could should can will of and or but because
        i he she we they so""",
    ),
    (
        "i he she we they",
        """of the a an my your their our its i he she we they me him them or to by from with for""",
    ),
    (
        "am is are was were be have has had do does did would could should can will must",
        "am is are was were has does did would could should can will must of",
    ),
)
NEVER_AFTER = {
    word: frozenset(those.split()) for these, those in _NEVER_IN_A_ROW for word in these.split()
}
