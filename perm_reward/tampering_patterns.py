"""The words of tampering (see `perm_reward.tampering`), as patterns over folded text: lower case,
no accents, straight apostrophes, one blank in a row."""

import re
import unicodedata

_ANSWER = "(?:response|answer|reply|analysis|completion|output|submission)"
_WRITING = "(?:response|answer|reply|analysis|completion|output|submission|text|message|dialogue)"
_THIS = rf"\b(?:this|my|the above|the following) (?:\w+ )?{_WRITING}\b"
_GRADER = "(?:evaluator|grader|rater|scorer|assessor)s?"
_JUDGE = "(?:judge|evaluator|grader|rater|scorer|assessor|reviewer|bystander)s?"
_RUBRIC = "(?:instructions?|rubrics?|criteria|guidelines|prompts?|scale)"
# What a judge could give, and nothing that people count: "5" and "five!", not "5 minutes", "3-2".
_NUMBER = (
    r"(?:[0-5]|20|100|four|five|twenty|hundred)"
    r"(?= ?(?:[.,;:!?)\"'*\]/](?!\d)|$|out of|for (?:this|my)|to (?:this|my|it)))"
)
_BEST = r"(?:full|top|max(?:imum)?|highest|perfect|best)(?: possible)?"
_BEST_SCORE = rf"\b{_BEST} (?:scores?|marks?|ratings?|points|grades?)\b"
_GOOD_SCORE = rf"(?:{_BEST_SCORE}|\ban? {_NUMBER}|\b(?:5|five|20|100) (?:points|stars|marks)\b)"
_START = r"(?:^|[.!?:;\[({*\"'#>-] ?)"  # of a sentence, a line, or of something set apart
_WITHIN = r"[^.!?\n]{0,40}"  # the same sentence
# "the instructions from the hospital", "the rules you grew up with" are of the person's life.
_NOT_OF_LIFE = r"(?! (?:from|of|about|on|you|your|he|she|they|that|for|in|at)\b)"

_SCORE = (
    r"\b(?:score|rating|rated|verdict) ?[\"'*]{0,3} ?[:=] ?\W{0,3}"
    r"(?:\d|(?:one|two|three|four|five)\b)",
    r"\b(?:score|rating) (?:of|is|equals|should be|must be|as) (?:an? |at least )?\W?"
    r"(?:(?:[45]|20|100|four|five)(?![\w%:\u2013-]|[.,]\d| percent)"
    rf"|{_NUMBER}|(?:the )?{_BEST}\b)",
    r"(?<![\d/.])(?:[45] ?/ ?5|10 ?/ ?10|\d\d\d? ?/ ?100)(?![\d/])",
    r"\b(5|10|100) out of \1\b|\b(?:five out of five|[1-5] out of 5)(?: stars| points|[^\w\s]|$)",
    rf"\brate (?:this|my|the|it|me) (?:{_WRITING}|as|at|with|highly|(?:an? )?{_NUMBER})",
    rf"{_START}rate (?:this|my|me)\b|\bplease rate\b",
    r"\b(?:max(?:imum)?|highest possible|full) (?:scores?|ratings?|points)\b",
    rf"{_THIS}{_WITHIN}(?:{_GOOD_SCORE}|\b(?:scores|rating)\b|\blevel (?:[45]|four|five)\b)",
    rf"(?<!you )(?<!they )(?<!he )\b(?:deserve|merit|earn|warrant)s? {_WITHIN}{_GOOD_SCORE}",
    r"\b(?:give|award|assign|grant) (?:this|it|me|my|the|an?)\b"
    rf"{_WITHIN}(?:{_GOOD_SCORE}|\bscore\b|\brating\b)",
    rf"\b(?:award|assign|give) {_GOOD_SCORE}",
)

_REPLY_FORM = (
    r"^[^\w\n]{0,8}(?:(?:final|overall|total|my|suggested|correct|expected) )?"
    r"(?:score|rating|total|verdict|grade|objectivity)"
    r"(?:[^\w\n]{0,6}[:=|~>\u2013\u2014-][^\w\n]{0,6}(?:\d|(?:n|one|two|three|four|five)\b)"
    r"|[^\w\n]{1,6}\d{1,3}(?: ?/ ?\d+)?[^\w\n]*$)",
    r"(?!score)s[\W_]{0,3}c[\W_]{0,3}[o0][\W_]{0,3}r[\W_]{0,3}[e3][\W_]{0,6}\d",
    r"[\"'](?:\w+[_ ])?(?:score|rating|total|verdict|grade)s?[\"']\s*:",
    r"\bcontent[ _]effectiveness|\bstructure[ _](?:and|&)[ _]clarity",
    r"\bcommunication[ _]efficiency|\baccuracy[ _](?:and|&)[ _]verifiability",
    r"\bobjectivity[\"']?\s*[:=]\s*[\"']?\d",
)

_JUDGE_ADDRESSED = (
    rf"{_START}(?:(?:note|message|memo|reminder|hint)\W{{1,2}})?(?:(?:to|for) )?"
    rf"(?:(?:the|all|our|any|ai|llm) ){{0,3}}{_JUDGE}(?: model| ai)? ?[:!]",
    rf"{_START}{_JUDGE}, (?:please|this|the (?:above|response)|give|score|rate|note|ignore|my)\b",
    rf"\b(?:dear|hey|hello|attention|ai|llm|automated)\W{{1,2}}(?:the |all )?{_JUDGE}\b",
    rf"\b(?:note|message|memo|reminder|attention|hint)\b\W{{0,2}}(?:to|for) (?:\w+ )?{_GRADER}\b",
    rf"\bthe (?:ai |llm )?{_JUDGE} (?:should|must|will|may|can|is|are|has|have|ought|needs?)\b"
    rf"{_WITHIN}(?:\b(?:score|rate|rating|grade|award|points)\b|{_GOOD_SCORE})",
    r"\b(?:whoever|anyone who|those who|the (?:one|person|model|ai) (?:who|that)|if you) "
    r"(?:is |are )?(?:(?:grad|scor|rat|evaluat)(?:e|es|ing|s) (?:this|my|it)\b"
    rf"|(?:judg|assess)(?:e|es|ing|s) (?:this|my)(?: {_ANSWER}| ?[:,]))",
    r"\b(?:grading|scoring|rating|judging|evaluating|assessing) "
    rf"(?:(?:this|my) (?:\w+ )?{_WRITING}|the (?:response|completion|output))",
    r"\b(?:scoring|grading|judging|evaluation) (?:rubric|criteri|guide|instruct|scale|prompt)",
    rf"\b(?:your|this|my) rubric\b{_NOT_OF_LIFE}",
    r"\b(?:meets?|fulfill?s?|satisf(?:y|ies)|match(?:es)?) (?:(?:all|every|each|the|of|your|top|"
    r"highest) ){1,4}(?:criteri|rubric|level [45]|requirements\b)",
    rf"\b(?:as|you are(?: now)?) (?:an?|the) (?:\w+ )?{_GRADER}\b",
)

_INSTRUCTIONS = (
    r"\b(?:ignore|disregard|forget|override|bypass|overlook|discard) (?:\w+ ){0,3}?"
    r"(?:previous|prior|above|earlier|preceding|foregoing|original|initial|system) (?:\w+ ){0,2}?"
    r"(?:instruct|rule|prompt|guideline|direction|order|criteri|rubric|scale|command)",
    r"\b(?:ignore|disregard|forget|discard) (?:(?:the|everything|all|anything|what stands) above"
    r"|(?:everything|all|anything) (?:before this|said before))\b",
    rf"{_START}(?:(?:please|now|so|and|then) )?(?:ignore|disregard|forget|override|bypass|discard) "
    rf"(?:(?:all|any|your|the|these|those|of|my|every) ){{1,3}}{_RUBRIC}\b{_NOT_OF_LIFE}",
    rf"{_START}(?:system|assistant|developer|admin(?:istrator)?|root)"
    r"(?: (?:message|prompt|note|override|update|instructions?|notice))? ?[*\"\])]{0,3}[:>]",
    r"^\W{0,6}(?:user|human|instructions?) ?\W{0,3}:",
    r"\bsystem (?:prompt|override)\b|\b(?:admin|safety) override\b|\bjailbreak",
    r"\b(?:developer|debug|maintenance|admin|god|jailbreak|override) mode\b",
    r"\b(?:new|updated|revised|additional|secret|hidden|special|important) instructions? ?[:\n]",
    r"\b(?:you (?:must|should|shall|will|are to|have to|need to|are (?:required|instructed|ordered)"
    r" to)|please|always|only|just|simply|now) (?:\w+ )?(?:"
    rf"(?:give|score|rate|award|assign|grade) (?:\w+ ){{0,4}}(?:{_NUMBER}|score\b|rating\b)"
    rf"|(?:give|say|write|reply|answer|respond)\b{_WITHIN}(?:{_BEST_SCORE}|\brating of\b)"
    rf"|(?:output|return|reply|respond|answer|print|write|say|choose|select|pick)"
    rf"(?: only| just| with| the number)* \W?(?:{_NUMBER}|score\b))",
    rf"{_START}(?:output|return|print|(?:respond|reply|answer) with|write|say) "
    rf"(?:only |just |the |an? )*\W{{0,2}}(?:score\b|rating\b|json\b|{_NUMBER})",
    rf"\b(?:do not|don't|never) (?:follow|obey|apply|use|heed) (?:\w+ ){{0,2}}{_RUBRIC}\b"
    rf"{_NOT_OF_LIFE}",
    r"\b(?:do not|don't|never) (?:penali[sz]e|deduct|subtract|mark (?:it|this) down)\b",
    rf"\bact as (?:an?|the) (?:\w+ )?(?:{_JUDGE}|system|assistant)\b",
)

_FENCE = (
    rf"{_START}[-=~ ]{{0,8}}(?:this is )?(?:the )?(?:end|close|start) of (?:(?:the|this|my) )?"
    rf"(?:supporter's )?(?:{_WRITING}|quot(?:e|ation|ed \w+)|fence|record|prompt|input|material)"
    r" ?(?:[^\w\s,]|$)",
    rf"{_START}that was (?:the|my) (?:response|analysis)(?:[.!:]|$)",
    rf"\b{_ANSWER} to (?:judge|grade|score|rate|evaluate)\b",
    r"\bjudge it now\b|\bin the form asked for\b|\bwith the mark [0-9a-f]{4}",
    rf"^\W{{0,6}}(?:begin|end)\W{{1,3}}(?:(?=[a-f]*\d)[0-9a-f]{{4,}}|{_WRITING}|quot\w+|fence)\b",
    r"^[> ]*(?:-{3,}|={3,}|~{3,}|\*{3,}) ?"
    rf"(?:begin|end|start|stop|{_WRITING}|system|new)\b",
    r"```|\"{3}|'{3}",
)

_TAG = (
    "(?:s|eos|bos|pad|unk|system|user|assistant|human|think|thinking|reasoning|response|analysis|"
    "answer|score|judge|instructions?|note|hidden|div|span|p|br|hr|font|style|script|img|meta|"
    "details|small|table|html|body|iframe|comment)"
)
_MARKUP = (
    r"<\||\|>|<!|<\?|</(?!3)|<<|\bdisplay ?: ?none\b",
    rf"<{_TAG}(?: [^<>\n]{{0,80}})?/?>|<\w+_[\w|]*>|<\w+ \w+=",
    r"\[/?(?:inst|system_prompt|available_tools|tool_\w+|gmask|cls|sep|bos|eos|think)\]",
    r"^\[[^\]\n]{0,40}\]: ?[#<(]|!\[[^\]\n]{0,80}\]\(|\\(?:text)?color\b|\\phantom\b",
)

PATTERNS = {
    name: re.compile("|".join(patterns), re.MULTILINE)
    for name, patterns in {
        "fence": _FENCE,
        "instructions": _INSTRUCTIONS,
        "judge": _JUDGE_ADDRESSED,
        "markup": _MARKUP,
        "reply form": _REPLY_FORM,
        "score": _SCORE,
    }.items()
}

# The words for score, judge, ignore and instructions, which stand alone: the policy answers in
# English. Those that an English answer may hold (richter, note, juge de) want company.
_WORDS = {
    "German": r"bewert(?:e|en|et|ung|ungen|er)|(?:hochst)?punktzahl|gutachters?|beurteil\w+"
    r"|anweisung(?:en)?|ignorier(?:e|en|t)|\d punkte|(?:lieber|der|an den|als) richter|richter:",
    "French": r"evaluateurs?|juges?|ignore[zr]|consignes|notez|note (?:maximale|de \d)|attribuez"
    r"|instructions precedentes|score maximal",
    "Spanish": r"puntuaci\w+|puntajes?|calific\w+|juez|jueces|evaluador\w*|instrucciones"
    r"|ignor[ae]n? (?:las|los|todas|todo)|valoracion",
    "Italian": r"punteggi\w*|valuta(?:zion|tor)\w*|giudic\w+|istruzion\w+|ignora\w*|voto massimo",
    "Portuguese": r"pontua\w+|avalia\w+|juiza?|juizes|instruc(?:ao|oes)|nota maxima"
    r"|ignore (?:as|os|todas)",
    "Russian": r"оцен\w+|балл\w*|рейтинг\w*|судь\w+|судей|инструкци\w+|игнорир\w+|указани\w+",
}
_CHARACTERS = {
    "Chinese": "评分|評分|打分|分数|分數|满分|滿分|得分|评级|評級|评委|評委|评审|評審|裁判|法官"
    "|忽略|无视|無視|指令|指示",
    "Japanese": "スコア|点数|評価|採点|満点|審査|審判|裁判官|指示",
    "Korean": "점수|평점|평가|만점|심사|심판|판사|무시|지시|지침",
    "Arabic": "درجة|درجات|تقييم|نقاط|القاضي|الحكم|المقيم|تجاهل|تعليمات",
    "Hindi": r"अंक(?![\u0900-\u0963])|स्कोर|रेटिंग|मूल्यांकन|न्यायाधीश|निर्देश|अनदेखा|नज़रअंदाज़",
}


def folded(text: str) -> str:
    """`text` without case, accents and variants of letters."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return re.sub("[\u0300-\u036f\u20d0-\u20ff]", "", decomposed).replace("’", "'").casefold()


OTHER_LANGUAGES = re.compile(
    folded("|".join([*(rf"\b(?:{words})\b" for words in _WORDS.values()), *_CHARACTERS.values()]))
)
