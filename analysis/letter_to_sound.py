"""How a word that is not in the pronouncing dictionary may sound: a few rules of English spelling, enough to find where it is."""

from collections.abc import Callable

SHORTEST_PART = 3
"""Letters of a part of a compound: shorter entries of the dictionary are mostly abbreviations."""
LONGEST_RULE = 4
RULES = dict(
    rule.split("=")
    for rule in (
        "tion=SH AH N|sion=ZH AH N|ture=CH ER|ight=AY T|ough=AO|eigh=EY|igh=AY|tch=CH|dge=JH|sch=S K|eau=OW|ous=AH S|ing=IH NG|"
        "sh=SH|ch=CH|th=TH|ph=F|wh=W|ck=K|ng=NG|qu=K W|gh=G|kn=N|wr=R|ce=S EH|ci=S IH|cy=S IY|ge=JH EH|ee=IY|ea=IY|oo=UW|ou=AW|ow=OW|oi=OY|oy=OY|"
        "ai=EY|ay=EY|au=AO|aw=AO|ew=UW|ey=IY|ie=IY|oa=OW|ar=AA R|er=ER|ir=ER|ur=ER|or=AO R|"
        "bb=B|cc=K|dd=D|ff=F|gg=G|ll=L|mm=M|nn=N|pp=P|rr=R|ss=S|tt=T|zz=Z|"
        "a=AE|b=B|c=K|d=D|e=EH|f=F|g=G|h=HH|i=IH|j=JH|k=K|l=L|m=M|n=N|o=AA|p=P|q=K|r=R|s=S|t=T|u=AH|v=V|w=W|x=K S|y=IY|z=Z"
    ).split("|")
)
"""Letters -> phones; the longest that fits is taken."""
FINAL_VOICED = frozenset("AA AE AH AO AW AY B D DH EH ER EY G IH IY L M N NG OW OY R UH UW V W Y".split())
"""Phones after which the ending s is Z."""
SIBILANTS = frozenset(("S", "Z", "SH", "ZH", "CH", "JH"))


def sounds(word: str, known: Callable[[str], str | None]) -> str:
    """ARPAbet phones of a lower-case word. known: the dictionary's phones of a word, or None; used for compounds and endings.

    Empty for a word without letters.
    """
    word = word.strip("'")
    if word.endswith(("'s", "s")) and (stem := known(word.removesuffix("s").removesuffix("'"))):
        last = stem.split()[-1]
        return f"{stem} {'IH Z' if last in SIBILANTS else 'Z' if last in FINAL_VOICED else 'S'}"
    word = word.replace("'", "")
    for cut in range(SHORTEST_PART, len(word) - SHORTEST_PART + 1):
        if (first := known(word[:cut])) and (second := known(word[cut:])):
            return f"{first} {second}"
    return by_rules(word)


def by_rules(word: str) -> str:
    """ARPAbet phones of letters a to z by `RULES` alone."""
    if len(word) > 3 and word.endswith("e") and word[-2] not in "aeiou":
        word = word[:-1]  # silent
    phones, at = [], 0
    while at < len(word):
        length = next(n for n in range(LONGEST_RULE, 0, -1) if word[at : at + n] in RULES and at + n <= len(word))
        phones.append(RULES[word[at : at + length]])
        at += length
    return " ".join(phones)
