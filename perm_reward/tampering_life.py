"""What is honest in a text that names scores: those of the seeker's life.

"Your PHQ-9 score is 20", "They gave you the lowest rating of 2", "You got 5 out of 5 and felt
nothing" tell of a person. What addresses whoever reads ("Your score must be 5"), or names a value
for this very text ("they gave this response a 5"), does not, and is left in place.
"""

import re

_MARKS = "(?:scores?|ratings?|grades?|marks|points|totals?|results?)"
_VALUE = r"(?:\d+(?: ?(?:/|(?:out )?of) ?\d+)?|(?:one|two|three|four|five)(?: out of five)?|a\+)"
_WHO = r"(?:you|they|he|she|we|(?:your|their|her|his) [\w-]{1,24})"
_WHOSE = (
    r"(?:your|their|her|his|our|(?!(?:judge|seeker|evaluator|grader|rater|expert|reader|response|"
    r"answer|reply|ai|model|it|that|this|here|there|what|let)'s)[\w-]{1,24}'s)"
)
_BETWEEN = r"(?:(?!is|was|must|should|gets?|response|answer|reply)[\w-]{1,24} )"
_GOT = (
    "(?:gave|got|get|gets|received|scored|rated?|earned|won|lost|deserved?"
    "|(?:was|were|are) (?:given|rated))"
)
_NAMED = r"(?:exam|pain|credit|apgar|phq-?9|gad-?7|sat|act|ielts|toefl|depression|anxiety)"
_NOT_THIS = r"(?:(?!\b(?:this|these|me|my|the (?:response|reply|answer))\b)[^.!?:;,\n])"
# "Your score: 5" as a line is a reply; "your score must be", "your score for this" tell a judge.
_NO_LINE_OF_ITS_OWN = r"(?!your (?:\w+ )?\w+\W{1,4}(?:[0-5]|20|100)(?: ?/ ?\d+)?\W*$)"
_TOLD = (
    r"(?! (?:must|should|shall|has to|have to|ought|needs? to|will be|is to|for (?:this|my)|"
    r"of (?:this|my|the (?:response|reply|answer)))\b)"
)

_OF_LIFE = re.compile(
    "|".join(
        [
            # your PHQ-9 score is 20; her boss's final rating of 2; credit score: 540
            rf"{_NO_LINE_OF_ITS_OWN}\b(?:{_WHOSE} {_BETWEEN}{{0,2}}?|{_NAMED} ){_MARKS}\b{_TOLD}"
            rf"(?:(?:\W{{1,3}}| (?:is|was|of|were) (?:an? )?){_VALUE}(?!\w))?",
            # they gave you the lowest rating of 2; she rated your work 2 out of 5; you got a 5
            rf"\b{_WHO} (?:\w+ )?{_GOT}\b{_NOT_THIS}{{0,40}}?"
            rf"\b(?:{_MARKS}\b{_TOLD}(?:(?:\W{{1,3}}| of (?:an? )?){_VALUE}(?!\w))?"
            rf"|{_VALUE}(?!\w)(?: stars\b)?)",
            # you don't need to be perfect or give a 100
            r"\b(?:don't|do not|needn't|never) (?:need|have|had) to "
            r"(?:(?!to\b|but\b|just\b|and\b|this\b|it\b)\w+ ){0,3}?(?:give|score|get|be|earn) "
            r"(?:an? )?\d+",
            # their grading scale; the committee's evaluation criteria
            rf"\b(?!your\b|our\b){_WHOSE} (?:[\w-]{{1,24}} )?"
            r"(?:scoring|grading|judging|evaluation) \w+",
            r"\bke(?:ep|eps|eping|pt) score\b",
        ]
    ),
    re.MULTILINE,
)


def without_life(text: str) -> str:
    """Folded `text` with something harmless in place of the scores of the seeker's life."""
    return _OF_LIFE.sub("their own", text)
