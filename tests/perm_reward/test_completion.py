import pytest

from perm_reward.completion import parse_completion

GOOD_FORMS = [
    "# Analysis\nA\n# Response\nR",
    "\n\n# Analysis\n\nA\n\n# Response\n\nR\n",
    "# Analysis\r\nA\r\n# Response\r\nR\r\n",
    "## analysis:\nA\n## RESPONSE:\nR",
    "###### Analysis\nA\n# Response\nR",
    "#Analysis\nA\n#Response\nR",
    "  # Analysis\nA\n\t# Response\nR",
    "# **Analysis**\nA\n# **Response:**\nR",
    "**# Analysis**\nA\n**# Response**:\nR",
    "# __Analysis__\nA\n# *Response*\nR",
    "# Analysis: A\n# Response: R",
    "# Analysis \nA\n# Response :\nR",
]


@pytest.mark.parametrize("text", GOOD_FORMS)
def test_well_formed(text):
    parsed = parse_completion(text)
    assert (parsed.analysis, parsed.response, parsed.well_formed) == ("A", "R", True)


BROKEN_FORMS = {
    "nothing at all": "",
    "only blanks": " \n ",
    "no headings": "I am sorry to hear that.",
    "no response": "# Analysis\nA",
    "no analysis": "# Response\nR",
    "swapped": "# Response\nR\n# Analysis\nA",
    "analysis twice": "# Analysis\nA\n# Analysis\nA\n# Response\nR",
    "response twice": "# Analysis\nA\n# Response\nR\n# Response\nR",
    "starts over": "# Analysis\nA\n# Response\nR\n# Analysis\nA",
    "text before": "Sure!\n# Analysis\nA\n# Response\nR",
    "reasoning before": "<think>hm</think>\n# Analysis\nA\n# Response\nR",
    "empty analysis": "# Analysis\n\n# Response\nR",
    "empty response": "# Analysis\nA\n# Response\n \n",
    "not a heading": "Analysis\nA\nResponse\nR",
    "heading within a line": "# Analysis A # Response R",
    "longer heading": "# Analysis of it\nA\n# Response\nR",
    "seven hashes": "####### Analysis\nA\n# Response\nR",
}


@pytest.mark.parametrize("text", BROKEN_FORMS.values(), ids=BROKEN_FORMS)
def test_broken_forms_give_no_text_to_any_judge(text):
    parsed = parse_completion(text)
    assert (parsed.analysis, parsed.response, parsed.well_formed) == ("", "", False)


def test_other_headings_and_the_words_themselves_belong_to_the_text():
    parsed = parse_completion(
        "# Analysis\nHer response was fear.\n## Needs\nRest.\n"
        "# Response\nMy analysis: rest.\n# PS\nDo."
    )
    assert parsed.analysis == "Her response was fear.\n## Needs\nRest."
    assert parsed.response == "My analysis: rest.\n# PS\nDo."
