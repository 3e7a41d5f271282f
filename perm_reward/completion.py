"""A completion's text → its analysis and its response."""

import re
from dataclasses import dataclass

_BOLD = r"(?:\*{1,3}|__)"
_HEADING = re.compile(
    rf"^[ \t]*{_BOLD}?#{{1,6}}[ \t]*{_BOLD}?(analysis|response){_BOLD}?[ \t]*(?::{_BOLD}?|$)",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class ParsedCompletion:
    """The two parts of a completion; both are empty when it is not well formed."""

    analysis: str
    """what is going on and what the seeker feels; for the resonation judge only"""
    response: str
    """what is said to the seeker; for the other three judges"""
    well_formed: bool
    """whether the completion kept to the form it was asked for"""


def parse_completion(text: str) -> ParsedCompletion:
    """Split a completion at its headings `# Analysis` and `# Response`.

    A heading stands at the start of a line: one to six `#`, the word, and nothing more, except that
    a colon may follow, and text after the colon. Case does not matter, nor does bold, so
    `## **response:** I hear you` is a heading; `# Analysis of my day` is text.

    Well formed is exactly one analysis heading, then exactly one response heading, with text under
    each and none before the first. A missing, repeated or swapped heading leaves open which text
    a judge should read, so nothing is guessed. Any other heading belongs to the part it stands in.
    """
    text = text.replace("\r\n", "\n")
    headings = list(_HEADING.finditer(text))
    if [heading[1].lower() for heading in headings] == ["analysis", "response"]:
        before = text[: headings[0].start()].strip()
        analysis = text[headings[0].end() : headings[1].start()].strip()
        response = text[headings[1].end() :].strip()
        if analysis and response and not before:
            return ParsedCompletion(analysis, response, well_formed=True)
    return ParsedCompletion("", "", well_formed=False)
