"""The words for score, judge, ignore and instructions in other languages, which stand alone: the
policy answers in English."""

import re
import unicodedata


def folded(text: str) -> str:
    """`text` without case, accents and variants of letters."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return re.sub("[\u0300-\u036f\u20d0-\u20ff]", "", decomposed).replace("’", "'").casefold()


# Those that an English answer may hold (richter, note, juge de) want company.
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
    "Dutch": r"beoordel\w+|beoordeel\w*|waardering\w*|cijfers?|puntental|punten|negeer|negeren"
    r"|instructies?|aanwijzing(?:en)?|opdrachten|hoogste score",
    "Swedish, Danish, Norwegian": r"betyg\w*|bed[oø]m\w*|vurder\w+|poang\w*|poeng\w*|domaren?"
    r"|ignorer[ae]?|instru(?:ktioner\w*|kser\w*|ksjon\w*)|anvisning\w*|bortse",
    "Polish": r"oce[nń](?:a|e|y|o|ie|iac\w*|iaj\w*|ianie)?|punkt(?:acj\w+|ow|y)|sedzi\w+"
    r"|z?ignoruj\w*|instrukcj\w+|polece(?:n|nia|nie)|najwyzsz\w+|maksymaln\w+",
    "Turkish": r"puan\w*|degerlendir\w*|yarg[iı]c\w*|talimat\w*|yok ?say\w*|gormezden gel\w*"
    r"|dikkate alma\w*|gozard[iı]\w*",
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

OTHER_LANGUAGES = re.compile(
    folded("|".join([*(rf"\b(?:{words})\b" for words in _WORDS.values()), *_CHARACTERS.values()]))
)
