"""Captions to words, as the official COCO evaluation does it, without Java.

The official tool runs Stanford's PTBTokenizer 3.4.1 (Penn Treebank rules, lower-casing) and then
drops a list of punctuation tokens. Scores depend on it to the third digit, so this module gives
the same tokens. The kinds of rules are those of that family of tokenisers, whose design is public;
what each rule takes, its word lists and its kinds of characters were found by watching what the
Java tool does to some millions of made-up lines. ``tools/make_golden_tokens.py`` compares the two.

How it works, in three steps:

1. ``_shape_table`` writes the caption a second time, character for character, with each exotic
   character replaced by a plain one of the same kind (``ñ`` and ``猫`` by a letter, ``”`` by
   ``"``, ``👍`` by "unknown"), so that the rules need only know a few kinds.
2. At each place every rule of ``_RULES`` is tried on the shape, and **the longest match wins**, an
   earlier rule on a tie; what a rule looks at beyond its token counts towards the length. So
   ``st.`` beats ``st``, and ``U.S.-made`` beats ``U.S.``.
3. The token is cut out of the caption itself, written the Treebank way (``(`` is ``-lrb-``),
   lower-cased, and dropped if it is punctuation.

Most words of most captions are plain, and what becomes of them doesn't depend on their
neighbours: those are looked up (``_plain_words``) and the three steps are skipped.

Known differences from the Java tool, all far from captions: letters that Unicode gained after
version 6.0 and marks of a few Indic scripts are words here, unknown and dropped there; soft hyphens
are always dropped; a period inside a run of letters and digits (``5p.m.c'mon``, ``Ph.D.I``) may
split elsewhere. Of 80,000 lines of random snippets 28 differ. Each caption is tokenised by itself,
while the Java tool sees all captions as one text: see ``following``.
"""

import re
import unicodedata
from functools import lru_cache

# --- step 1: kinds of characters ----------------------------------------------------------------

_LETTER, _MARK, _SYMBOL, _UNKNOWN, _HYPHEN, _SUPERSCRIPT = "é\u0301§\0‐²"
_SHAPES = {
    **dict.fromkeys("\t\n\v\f\r\x85\xa0\u2028\u2029\u3000", " "),
    **dict.fromkeys(map(chr, range(0x2000, 0x200B)), " "),
    **dict.fromkeys("\x92’", "’"),
    **dict.fromkeys("\x91‘‛", "‘"),
    **dict.fromkeys("\x93\x94“”«»‹›", "”"),
    **dict.fromkeys("\x96\x97–—―", "—"),
    "…": "…",
    **dict.fromkeys("\u058a‐‑", _HYPHEN),
    **dict.fromkeys("¹²³⁰⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", _SUPERSCRIPT),
    **dict.fromkeys("¢£€\x80¤₠¼½¾⅓⅔", _SYMBOL),
}
_OTHER_SYMBOLS = re.compile(
    "[¡¥-©¬®-´¶¸¹¿×÷;·։־׀׃׆׳״\u0600-\u0603\u0606-\u060c؛؞؟٪٭۔܀-܍߶-߸।॥฿๏᾽‖‗‚„-‣‰-‸※‾-⁂⁄⁺-⁾₊-₎₤"
    "℀℁℃-℆℈℉℔№-℘℞-℣℥℧℩℮℺℻⅀-⅄⅊-⅍⅏⅕-⅞←-⯿、。〒・！-／：-＠［-｀｛-･￠￡￥￦]"
)


class _Shapes(dict[int, str]):
    """A table for ``str.translate`` that works out the kind of a character when it is first met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if code < 0x7F and character.isprintable():
            shape = character
        elif category == "Nd" and code < 0x10000:
            shape = "0"
        elif code < 0x10000 and character.isalpha():
            shape = _LETTER
        elif (category in ("Mn", "Mc") and code < 0x0F00) or 0x02C2 <= code <= 0x0385:
            shape = _MARK
        else:
            shape = _SYMBOL if _OTHER_SYMBOLS.match(character) else _UNKNOWN
        self[code] = shape
        return shape


_shape_table = _Shapes({ord(character): shape for character, shape in _SHAPES.items()})

# --- step 2: the rules ----------------------------------------------------------------------------

_E = f"[A-Za-z{_LETTER}]"  # a letter
_W = f"[A-Za-z0-9{_LETTER}]"  # a letter or digit
_PART = f"[A-Za-z{_LETTER}{_MARK}][A-Za-z0-9{_LETTER}{_MARK}]*"
_WORD = f"{_PART}(?:[.!?]{_PART})*"
_A = "['’]"  # an apostrophe
_Q = "['’`‘]"  # or what may be meant as one
_CLITIC = "(?:[msdMSD]|re|ve|ll|RE|VE|LL)"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_SLASHED = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_COMPOUND_PART = f"(?:[dDoOlL]{_Q}{_W})?{_W}+"
_COMPOUND = f"{_COMPOUND_PART}(?:[-_{_HYPHEN}]{_COMPOUND_PART})*"
_ADDRESS = '[^ "<>|()]'
_ADDRESS_END = '[^ "<>|(){}.,!?-]'
_PATH = f"/{_ADDRESS}+{_ADDRESS_END}"
_HOST = '[^ "<>|(){}.,!?]'
_MAIL_HOST = '[^ "<>|().]'
_LOCAL_NUMBER = r"\d{3,4}[- ]?\d{3,5}"  # of a telephone
_EYES, _NOSE, _MOUTH = "[:;=]", "[-o*']", r"[()\[\]{|@\\DdPpO]"
_EYE = "[-^x=~<>']"  # of ^_^

# Found by trying all words of up to four letters and the vocabulary of real captions.
_ABBREVIATIONS = """
    al cf co ct dr ft ga jr ky lt md mo mr ms mt ph rd rt sq sr st va vs vt wm adj adm adv ala apr
    aug ave bhd cie col cos cpl dak dec det drs ens esq est etc ext feb fla fri gen gov hon inc ind
    jan jos jul jun kan ltd maj mar mme mon mrs neb nev nov oct pfc plc pvt rep rev sen sep seq sfc
    sgt spc ste sys tel thu tue wed wis wyo alex ariz assn asst atty bldg blvd brig bros capt cmdr
    colo conn corp dept elec govs insp intl invt kans mich minn mlle mont msgr natl okla penn pres
    prof reps sens sept supt tenn tues univ wisc assoc attys bancorp calif comdr lieut messrs profs
    supts thurs treas mfg mtg pte pty ppte ppty ptes ptys
"""
_CAPITALISED_ABBREVIATIONS = "Az La Pa Ark Del Ill Ore Tex Mass Miss Wash"
_ABBREVIATIONS_OF_NUMBERS = "ca no op pp art fig nos figs prop"
_FILE_SUFFIXES = """
    bat bmp c cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png
    ppt ps py sql tar txt wav x xml zip
"""
_SENTENCE_STARTERS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many
    More Now Once One Other Our She Since So Some Such That The Their Then There These They This We
    What When While Yet You
"""


def _any_of(words: str) -> str:
    """Return a pattern for any of the words; longer ones first, since Python takes the first."""
    return "(?:" + "|".join(sorted(words.split(), key=len, reverse=True)) + ")"


# A rule is a token and what must follow it; the length of both decides. What could run on for long
# and fail has a limit (``{0,256}``), so that the time for a text is linear in its length.
_RULES = tuple(
    re.compile(f"({token}){ahead}")
    for token, ahead in (
        # Words that are two.
        ("(?i:can)", "(?i:not)"),
        ("(?i:gon|wan)", "(?i:na)"),
        ("(?i:got)", "(?i:ta)"),
        ("(?i:lem|gim)", "(?i:me)"),
        ("'[tT]", "(?i:is|was)"),
        # Words: "dog", "dog" before "'s", "do" before "n't", the clitics themselves.
        (_WORD, f"{_A}{_CLITIC}"),
        ("[A-Za-z]*[A-MO-Za-mo-z]", f"[nN]{_A}[tT]"),
        (_WORD, ""),
        (f"'{_CLITIC}", "[^A-Za-z]"),
        (f"’{_CLITIC}", ""),
        # Apostrophes inside and before words.
        ("'n", " "),
        ("’n", ""),
        (f"{_A}n{_A}|[lLdDjJ]{_A}|{_A}[2-9]0s", ""),
        (f"[yY]{_A}", _E),
        (f"(?i:dunkin{_A}|somethin{_A}|ol{_A}|{_A}em|{_A}till?|{_A}cause|cap{_A}n|c{_A}est)", ""),
        ("(?i:c'mon|nor'easter|e'er|s'mores|ev'ry|li'l|nat'l)", ""),
        (f"{_E}+[aeiouyAEIOUY]{_Q}[aeiouA-Z]{_E}*|[A-HJ-XZn]{_Q}{_E}{{2,}}", ""),
        (f"[nN]{_A}[tT]", "[^A-Za-z]"),
        (r"(?i:cont'd)\.", ""),
        (f"{_A}[0-9][0-9]", " "),
        # Addresses, names, tags; punctuation at the end of an address isn't part of it.
        (f"(?i:https?)://{_ADDRESS}+{_ADDRESS_END}", ""),
        (rf"www\.(?:{_HOST}+\.)+[A-Za-z]{{2,4}}(?:{_PATH})?", ""),
        (rf"(?:[a-z#%&*+~‘’”—…{_LETTER}]+\.)+(?:com|net|org|edu)(?:{_PATH})?", ""),
        (rf"<?[A-Za-z0-9]{_ADDRESS}{{0,256}}@{_MAIL_HOST}+(?:\.{_MAIL_HOST}+)*>?", ""),
        (f"@[a-zA-Z_][a-zA-Z_0-9]*|#{_E}+", ""),
        (r"</?[A-Za-z][^ <>]*(?: +[A-Za-z][^<>]{0,999})?>|<[!?][A-Za-z-][^<>]{0,999}>", ""),
        # Numbers, fractions, telephone numbers, money.
        (f"[-+]?{_NUMBER}", ""),
        (r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}", ""),
        (rf"(?:\(\d{{2,3}}\) ?|\+?\d{{2,4}}[- ](?:\d{{2,4}}[- ])?){_LOCAL_NUMBER}", ""),
        (r"[A-Z]*\$|#", ""),
        # Abbreviations keep their period; a single letter does unless a sentence starts after it.
        (f"(?i:{_any_of(_ABBREVIATIONS)})\\.", ""),
        (f"{_any_of(_CAPITALISED_ABBREVIATIONS)}\\.", ""),
        (f"(?i:{_any_of(_ABBREVIATIONS_OF_NUMBERS)})\\.", " ?[0-9]"),
        (r"[A-Za-z]\.", ""),
        (r"[A-Za-z]", rf"\. +{_any_of(_SENTENCE_STARTERS + _SENTENCE_STARTERS.upper())} "),
        (rf"(?:{_ACRONYM}|Ph\.D|Ed\.D)\.", ""),
        (f"(?:{_WORD}|{_COMPOUND})\\.", "[,;:]"),
        (rf"{_W}+(?:\.{_W}+)*\.(?i:{_any_of(_FILE_SUFFIXES)})", "[^A-Za-z0-9]"),
        # Compounds: "and/or", "o'clock", "black-and-white", "AT&T", "1,000-foot", "U.S.-made".
        (f"{_SLASHED}(?:/{_SLASHED}){{1,2}}", ""),
        (_COMPOUND, ""),
        ("[A-Z]+(?:[+&][A-Z]+)+", ""),
        (rf"[A-Za-z0-9][A-Za-z0-9.,]{{0,256}}(?:-(?:{_ACRONYM}\.|[A-Za-z0-9]+))+", ""),
        (r"pro-|anti-|S&P-500|S&Ls|C\.D\.s|-(?i:[lr][rcs]b)-|[cC]\+\+|[cCfF]#", ""),
        # Punctuation that hangs together, then any single character.
        (f"[<>]?{_EYES}{_NOSE}?{_MOUTH}", "[^A-Za-z0-9]"),
        (rf"{_EYE}_{_EYE}|\({_EYE}[-_.]?{_EYE}\)", ""),
        (
            r"\.{3,5}|(?:\. ){2,4}\.|[?!]+|-+|_+|\*+|(?:\\\*){1,3}|#+|@+|<<|>>|''|[’`‘”]{1,2}|"
            + f"{_SUPERSCRIPT}+",
            "",
        ),
        (".", ""),
    )
)

# --- step 3: how tokens are written ---------------------------------------------------------------


def _pairs(characters: str, written: str) -> dict[str, str]:
    return dict(zip(characters, written.split(), strict=True))


_WRITTEN = {
    **_pairs("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-"),
    **_pairs("¢£€\x80¤₠", "cents # $ $ $ $"),
    **_pairs("¼½¾⅓⅔", "1/4 1/2 3/4 1/3 2/3"),
    **_pairs('"\x96\x97–—―…', "'' -- -- -- -- -- ..."),
}
_WRITTEN_QUOTES = _pairs("`\x91‘‛‹\x92’›\x93“«\x94”»", "` ` ` ` ` ' ' ' `` `` `` '' '' ''")
_QUOTES = re.compile("[’`‘”]+")
_RUN = re.compile(r"(-)-{1,3}|(\.)[. ]+")
_CONTRACTION = re.compile(f"{_A}{_CLITIC}|[nN]{_A}[tT]")
_SPACE = re.compile(r"\s")
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}
_ENTITY = re.compile("|".join(_ENTITIES))
# The COCO evaluation's list. Its brackets are in capitals, so that it never drops one.
_PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", ""])

# --- reading a caption ----------------------------------------------------------------------------


def tokenize(caption: str, following: str = "") -> list[str]:
    """Return the lower-cased words of a caption, without punctuation.

    Args:
        caption: Any text. Line breaks count as spaces.
        following: The caption that comes after it in the file, for the sake of the official tool's
            quirk: whether a caption that ends in a single letter and a period (``plan D.``) keeps
            the period there depends on the first word of the next one.

    Returns:
        The tokens. A number with a fraction (``22 3/4``) or a telephone number is one token with
        no-break spaces in it, as in the official tool.
    """
    words: list[str] = []
    for chunk in caption.split():
        plain = _plain_words(chunk) if len(chunk) <= 24 else None
        if plain is None:
            return _scan(caption, following)
        words += plain
    return words


# Letters with hyphens and apostrophes, perhaps a comma or period at the end. Not single letters
# with a period: what they become depends on the next word.
_PLAIN = re.compile("[A-Za-z'-]*(?:[A-Za-z]{2}[.,]|[A-Za-z'-],?)|[.,]")
_ABBREVIATED_NUMBER = re.compile(f".*{_any_of(_ABBREVIATIONS_OF_NUMBERS)}\\.", re.IGNORECASE)


@lru_cache(maxsize=1 << 17)
def _plain_words(chunk: str) -> tuple[str, ...] | None:
    """Return the words of a piece of text between spaces, or None if its neighbours matter."""
    if not _PLAIN.fullmatch(chunk) or _ABBREVIATED_NUMBER.fullmatch(chunk):
        return None
    return tuple(_scan(chunk))


def _scan(caption: str, following: str = "") -> list[str]:
    """Cut a caption into tokens by the rules."""
    text = _ENTITY.sub(lambda match: _ENTITIES[match[0]], caption.replace("\xad", ""))
    end = len(text)
    text = _SPACE.sub(" ", f"{text} {following.strip()} ")
    shape = text.translate(_shape_table)
    words, start = [], 0
    while start < end:
        if shape[start] == " ":
            start += 1
            continue
        stop = _end_of_token(shape, start)
        word = _written(text[start:stop], shape[start:stop])
        if word not in _PUNCTUATION:
            words.append(word)
        start = stop
    return words


def _end_of_token(shape: str, start: int) -> int:
    """Return where the token at ``start`` ends, by the rule that sees the longest stretch."""
    longest = stop = start
    for rule in _RULES:
        match = rule.match(shape, start)
        if match and match.end() > longest:
            longest, stop = match.end(), match.end(1)
    return stop


def _written(text: str, shape: str) -> str:
    """Return a token the way the Treebank writes it, in lower case; "" if it is unknown."""
    if text.isascii() and text.isalnum():
        return text.lower()
    if shape in (_UNKNOWN, _HYPHEN):
        return ""
    if _CONTRACTION.fullmatch(shape):
        return shape.lower().replace("’", "'")
    if _QUOTES.fullmatch(shape):
        return "".join(_WRITTEN_QUOTES[character] for character in text)
    if _RUN.fullmatch(shape):
        return "--" if shape[0] == "-" else "..."
    if len(text) > 1:  # an address with brackets in it stays as it is, a smiley doesn't
        return text.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0").lower()
    return _WRITTEN.get(text, text).lower()
