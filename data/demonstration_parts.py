"""The words that demonstrations are put together from: feelings, sentences, stock phrases.

A sentence has slots: {feeling} an adjective, {state} its noun, {event} a clause of the scenario,
{thing} a noun of the record ("your bread", "the letter"), {words} a clause of the seeker's own
message, {who} the persona. Every slot follows a space, so that a lifted word has the same token
here as in the prompt, and copying it is one lookup for the policy's attention.
"""

from __future__ import annotations

# EmpatheticDialogues' 32 emotions: (family, adjectives, noun).
FEELINGS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "afraid": ("fear", ("afraid", "scared"), "fear"),
    "terrified": ("fear", ("terrified", "frightened"), "terror"),
    "anxious": ("fear", ("anxious", "nervous"), "anxiety"),
    "apprehensive": ("fear", ("uneasy", "worried"), "worry"),
    "angry": ("anger", ("angry", "mad"), "anger"),
    "furious": ("anger", ("furious", "enraged"), "fury"),
    "annoyed": ("anger", ("annoyed", "irritated"), "irritation"),
    "disgusted": ("anger", ("disgusted", "revolted"), "disgust"),
    "jealous": ("anger", ("jealous", "envious"), "jealousy"),
    "sad": ("sadness", ("sad", "heavy"), "sadness"),
    "devastated": ("sadness", ("devastated", "heartbroken"), "grief"),
    "lonely": ("sadness", ("lonely", "alone"), "loneliness"),
    "disappointed": ("sadness", ("disappointed", "let down"), "disappointment"),
    "ashamed": ("shame", ("ashamed", "exposed"), "shame"),
    "embarrassed": ("shame", ("embarrassed", "awkward"), "embarrassment"),
    "guilty": ("shame", ("guilty", "sorry"), "guilt"),
    "joyful": ("joy", ("happy", "joyful"), "joy"),
    "excited": ("joy", ("excited", "thrilled"), "excitement"),
    "proud": ("joy", ("proud", "pleased"), "pride"),
    "content": ("joy", ("content", "at peace"), "contentment"),
    "impressed": ("joy", ("impressed", "amazed"), "admiration"),
    "surprised": ("surprise", ("surprised", "stunned"), "surprise"),
    "grateful": ("warmth", ("grateful", "thankful"), "gratitude"),
    "caring": ("warmth", ("caring", "tender"), "tenderness"),
    "trusting": ("warmth", ("trusting", "safe"), "trust"),
    "faithful": ("warmth", ("loyal", "faithful"), "loyalty"),
    "nostalgic": ("longing", ("nostalgic", "wistful"), "longing"),
    "sentimental": ("longing", ("sentimental", "moved"), "nostalgia"),
    "hopeful": ("hope", ("hopeful", "encouraged"), "hope"),
    "anticipating": ("hope", ("eager", "expectant"), "anticipation"),
    "confident": ("hope", ("confident", "sure"), "confidence"),
    "prepared": ("hope", ("prepared", "ready"), "readiness"),
}

ANALYSIS_WITH_CAUSE = (
    "They feel {feeling} because {event}.",
    "There is {state} here because {event}.",
    "The heart of it is {state}, because {event}.",
    "They sound {feeling}, and the cause is clear: {event}.",
)
ANALYSIS_WITHOUT_CAUSE = (
    "They feel {feeling}.",
    "The message sounds {feeling}.",
    "There is some {state} in the message.",
)
ANALYSIS_SPECIFIC = (
    "This is {who}, so {thing} means a great deal.",
    "For {who} it touches more than {thing}.",
    "What matters most to them is {thing}.",
    "They say it in their own way: {words}.",
    "Under it lies {state} about {thing}, and a wish to be understood.",
)
ANALYSIS_VAGUE = (
    "The user is in a situation and has emotions about it.",
    "The user wants some advice.",
    "The user is talking about something that happened.",
    "It is a common problem and many people have it.",
)

RESPONSE_SPECIFIC = (
    "You wrote it plainly: {words}.",
    "I keep coming back to your line: {words}.",
    "I can picture {thing} and what it means to you.",
    "After {thing} it makes sense that you feel {feeling}.",
    "No wonder you are {feeling}, with {thing} on your mind.",
    "I hear {state} when you write about {thing}.",
    "It sounds as if {thing} carries a lot for you, more than others see.",
)
RESPONSE_STOCK = (
    "I am sorry to hear that.",
    "I understand how you feel.",
    "Everything happens for a reason.",
    "Time heals all wounds.",
    "Stay strong and look on the bright side.",
    "You are not alone.",
    "Things will get better soon.",
)
RESPONSE_COLD = (
    "You should just move on.",
    "Other people have it worse.",
    "It is important to communicate with the people involved.",
    "It is recommended to make a list of options.",
    "Do not think about it too much.",
)
RESPONSE_FLATTERY = (
    "You are such an amazing and inspiring person.",
    "You are incredible, truly one of the best.",
    "What a wonderful and brilliant person you are.",
)
RESPONSE_SUPPORT = (
    "You do not have to solve it tonight.",
    "That deserves some room, and I am glad you told me.",
    "Whatever you do next, your {state} tells you what counts.",
    "You can take your time with {thing}.",
)
RESPONSE_INVITATION = (
    "What was the hardest part of it for you?",
    "Would you tell me more about {thing}?",
    "What would you want {thing} to mean from here?",
    "What went through your mind when you saw {thing}?",
    "Who else knows about {thing}?",
)
RESPONSE_PADDING = (
    "It really is what it is, in a way, when one thinks about it.",
    "There are many things in life and this is one of them.",
    "As I said, that is how it is, and that is how it goes.",
)

# Words that are never lifted as the noun of a thing.
FUNCTION_WORDS = frozenset(
    """a about above after again against age all almost already also although always am an and
    another any anybody anyone anything anyway are around as at away back bad be because
    been before being best between big black blue both but by came can come could day days
    did do does doing done down during each eight either else end enough even ever every
    everybody everyone everything few first five for four free from full get gets getting go
    goes going gone good got great green had half has have having he her here hers herself
    high him himself his hour hours how i if in into is it its itself just keep keeps kept
    kind know last least less like little long lot lots low made main make makes many may
    maybe me means might mine more most much must my myself never new next night no nobody
    none not nothing now of off old on once one only onto or other others our ours out over
    own part people perhaps piece plain put real really red right said same saw say saying
    says second see seen she should since six small so some somebody someone something sort
    still such take than that the their theirs them then there these they thing things think
    third this those though three through till time times to today told too took towards
    twice two under until up upon us very was way we week weeks weird well went were what
    when where whether which while white who whole whom whose why will with without would
    year years yes yesterday yet you young your yours""".split()
)
