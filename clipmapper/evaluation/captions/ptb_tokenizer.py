"""The words of a caption, as COCO's caption evaluation counts them, without Java.

coco-caption pipes captions through Stanford's `PTBTokenizer` 3.4.1 (lower case, one caption a line) and drops
punctuation marks (Chen et al. 2015, arXiv 1504.00325, section 3.1). The rules below were written from the
tokenizer's output and not from its source. They give the same words on all 202,654 captions of COCO val2014.
Where one or two marks were put at random into captions, they differed in 39 of 6,000. Not covered, because
captions have none: web and mail addresses, markup, emoticons, telephone numbers in brackets.
"""

import re
from functools import lru_cache

# What the tokenizer writes for characters outside ASCII, before and after splitting.
_CHARACTERS = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "...", "\u00a0": " ", "\n": " "}
)
_SYMBOLS = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"€": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4"},
}

# coco-caption's list; a double quotation mark reaches it as `` or ''. The list has brackets too, by names in
# capitals (-LRB-), which the lower-case output never has: brackets stay in as words, in published scores too.
_DROPPED = frozenset(['"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_SPLIT_WORDS = {
    **{"cannot": "can not", "gimme": "gim me", "gonna": "gon na", "gotta": "got ta", "lemme": "lem me"},
    **{"wanna": "wan na", "'tis": "'t is", "'twas": "'t was"},
}

# Their full stop belongs to them.
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie cmdr
co col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov
hon inc ind insp intl jan jos jr jul jun kan kans ky lt ltd maj mar md messrs mich minn mme mo mon mont mr
mrs ms mt natl neb nev nov oct okla penn pfc ph plc pres prof profs pte pty pvt rd rep reps rev rt sen sens
sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wm wyo
"""
# The same, with a capital only ("Ill." is a state, "ill." is not).
_STATES = "ark az del ill la mass miss ore pa tex wash "
_BEFORE_A_NUMBER = "art ca fig figs no nos op pp prop"
# After these, with a capital, a letter's full stop ended the sentence before ("exit P. The").
_STARTERS = """
A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once
One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
"""


def _one_of(words: str) -> str:
    return "|".join(words.split())


_LETTER = r"[^\W\d_]"
_ALNUM = r"[^\W_]"
_END = rf"(?!{_ALNUM})"
_PART = rf"(?:[dol]'(?={_ALNUM}{{2}}))?{_ALNUM}+"

# The longest match wins, and of equally long ones the first. What a rule looks ahead at counts for its length
# when it stands in the group "ahead", as in the lexer generator behind the original.
_RULES = [
    re.compile(rule, re.IGNORECASE)
    for rule in (
        rf"{_PART}(?:_{_ALNUM}+)*",
        rf"{_PART}(?:-{_PART})*(?:/{_ALNUM}+(?:-{_ALNUM}+)*){{0,2}}",
        r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}",
        r"[-+]?(?:\d+(?:[.,:]\d+)*|[.,:]\d+(?:[.,:]\d+)*)",
        # don't → do n't, dog's → dog 's
        rf"{_LETTER}+?(?P<ahead>n't)",
        rf"n't{_ALNUM}*",
        rf"'(?:s|m|d|re|ve|ll|em|til|cause|n'?|tis|twas){_END}",
        r"'\d\ds?(?![\w'])",
        # words with an apostrophe: o'clock (above), graffiti'ed, y'all → y' all, ol'
        rf"{_LETTER}+[aeiou]'[aeiou]{_LETTER}*|ma'am|[eon]e?'er{_END}|c'mon{_END}",
        rf"[dly]'(?={_LETTER})",
        r"(?:dunkin|somethin|ol)'",
        # T.V., e.g., U.S, dog.The (no space after the full stop)
        rf"{_LETTER}(?:\.{_LETTER})+s?{_END}(?:\.?-{_PART}|\.)?",
        rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)+(?:-{_PART})*",
        rf"(?:{_one_of(_ABBREVIATIONS)})\.",
        rf"(?-i:{_one_of(_STATES.title() + _STATES.upper())})\.",
        rf"(?:{_one_of(_BEFORE_A_NUMBER)})\.(?P<ahead>\s*\d)",
        rf"{_LETTER}\.(?!\s+(?-i:{_one_of(_STARTERS)}){_END})",
        rf"{_ALNUM}+\.(?P<ahead>[,;:])",
        # AT&T, but a & b
        r"(?-i:[A-Z]+(?:&[A-Z]+)+)",
        r"c\+\+|(?-i:[A-Z]{1,2}\$)",
        rf"[#@]{_LETTER}\w*",
        r"\.\.\.+|-+|[?!]+|\*+|_+|>+|''|``|.",
    )
]
# A word between spaces, by far the most frequent case.
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?=\s)")
_SPACE = re.compile(r"\s*")


@lru_cache(maxsize=1 << 15)
def ptb_tokenise(caption: str, following: str = "") -> tuple[str, ...]:
    """The words of one caption in lower case, without punctuation marks.

    `following` is the start of the caption that comes next. The tokenizer reads all captions as one text: a
    capital letter with a full stop, or "art.", at the very end of a caption keeps or loses its full stop
    depending on the caption after it (3 of COCO val2014's 202,654 captions). Without `following` the caption
    is taken by itself, so that scores do not depend on the order of the images.

    >>> ptb_tokenise("The dog's 1st T.V. isn't on (yet).")
    ('the', 'dog', "'s", '1st', 't.v.', 'is', "n't", 'on', '-lrb-', 'yet', '-rrb-')
    """
    text = caption.translate(_CHARACTERS).rstrip()
    end = len(text)
    text = f"{text}\n{following}"
    place = _SPACE.match(text).end()
    words = []
    while place < end:
        token, length = _longest_match(text, place, end)
        words += _written(token)
        place = _SPACE.match(text, place + length).end()
    return tuple(word for word in words if word not in _DROPPED)


def _longest_match(text: str, place: int, end: int) -> tuple[str, int]:
    """The token at `place`, and its length."""
    if plain := _PLAIN_WORD.match(text, place):
        return plain.group(), plain.end() - place
    best_reach, best_end = 0, place + 1
    for rule in _RULES:
        if found := rule.match(text, place):
            reach = found.end()
            if reach > best_reach:
                ahead = found.groupdict().get("ahead")
                best_reach, best_end = reach, reach - len(ahead or "")
    return text[place:best_end], best_end - place


def _written(token: str) -> list[str]:
    """Write a token as the tokenizer does: one word, or several for contractions without an apostrophe."""
    token = token.lower()
    if token in _SPLIT_WORDS:
        return _SPLIT_WORDS[token].split()
    return [_SYMBOLS.get(token, token).replace(" ", "\u00a0")]
