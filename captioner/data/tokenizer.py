"""Captions to words, as the official COCO evaluation does it, without Java.

The official tool runs Stanford's PTBTokenizer 3.4.1 (Penn Treebank rules, lower-casing) and then
drops a list of punctuation tokens. Scores depend on it to the third digit, so this module gives
the same tokens. The kinds of rules are those of that family of tokenisers, whose design is public;
what each rule matches, its word lists and its kinds of characters were found by watching what the
Java tool does to some millions of made-up lines. ``tools/make_golden_tokens.py`` compares the two.

How it works, in three steps:

1. ``_shape_table`` gives the caption's *shape*, a copy in which each unusual character is replaced
   by one that stands for its kind (``ñ`` and ``猫`` by ``é``, ``“`` by ``”``, ``👍`` by the unknown
   character), so that the rules need only know a few kinds.
2. At the start of each token the rules of ``_RULES`` are tried on the shape, and **the longest
   match wins**, the earlier rule on a tie; what a rule requires after its token counts towards the
   length. So ``st.`` beats ``st``, and ``U.S.-made`` beats ``U.S.``. The time for a text is linear
   in its length: the comment above ``_RULES`` says why.
3. The token is cut out of the caption itself, written the Treebank way (``(`` is ``-lrb-``),
   lower-cased, and dropped if it is punctuation.

Most words of most captions are plain, and what becomes of them doesn't depend on their
neighbours: those are looked up (``_plain_words``) and the three steps are skipped.

Known differences from the Java tool, all far from captions: letters that Unicode gained after
version 6.0 and marks of a few Indic scripts are words here, unknown and dropped there; soft hyphens
are always dropped; a period inside a run of letters and digits (``5p.m.c'mon``, ``Ph.D.I``) may
split elsewhere. Of 80,000 lines of random snippets 28 differ. HTML entities become characters here
even in addresses and tags (``&lt;b&gt;``), but not accented letters (``caf&eacute;``). Each caption
is tokenised by itself, while the Java tool sees all captions as one text: see ``following``.
"""

import re
import unicodedata
from functools import cache, lru_cache

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

_ALPHA = f"[A-Za-z{_LETTER}]"
_ALNUM = f"[A-Za-z0-9{_LETTER}]"
_PART_START = f"[A-Za-z{_LETTER}{_MARK}]"
_PART = f"{_PART_START}[A-Za-z0-9{_LETTER}{_MARK}]*"
_WORD = f"{_PART}(?:[.!?]{_PART})*"
_APOSTROPHE = "['’]"
_QUOTE = "['’`‘]"  # what may be meant as an apostrophe
_CLITIC = "(?:[msdMSD]|re|ve|ll|RE|VE|LL)"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_SLASHED = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_COMPOUND_PART = f"(?:[dDoOlL]{_QUOTE}{_ALNUM})?{_ALNUM}+"
_COMPOUND = f"{_COMPOUND_PART}(?:[-_{_HYPHEN}]{_COMPOUND_PART})*"
_ADDRESS = '[^ "<>|()]'
_ADDRESS_END = '[^ "<>|(){}.,!?-]'
_PATH = f"/{_ADDRESS}+{_ADDRESS_END}"
_DOMAIN = f"[a-z#%&*+~‘’”—…{_LETTER}]"
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


def _abbreviation(words: str) -> str:
    """Return a pattern for any of the words with a period.

    It looks for the period first: to compare most words of a text with the whole list is slow.
    """
    return rf"(?=[A-Za-z]+\.){_any_of(words)}\."


class _Rule:
    """A kind of token.

    Attributes:
        first: Matches the shape characters that such a token can start with. It only saves time.
        pattern: The token as group 1, then what must follow it; the length of both counts. If the
            rule has a ``run``, that is the second alternative: where there is no such token, the
            match has no group 1 and ends where the run ends.
    """

    def __init__(self, first: str, token: str, ahead: str = "", run: str = "") -> None:
        self.first = re.compile(first)
        self.pattern = re.compile(f"({token}){ahead}" + (f"|{run}" if run else ""))


# For the time to be linear, whatever the text, a rule must not read far beyond the token that wins,
# or the same characters are read again for each of the next tokens. Most rules read little more
# than one word, number, compound or series of equal characters, and another rule matches all of
# that. The others have a limit (``{0,256}``) or a run: the stretch of text that the rule reads. If
# there is no such token at the start of its run, there is none inside the run either, so that the
# rule isn't tried again before the run's end.
_RULES = (
    # Words that are two.
    _Rule("[cC]", "(?i:can)", "(?i:not)"),
    _Rule("[gGwW]", "(?i:gon|wan)", "(?i:na)"),
    _Rule("[gG]", "(?i:got)", "(?i:ta)"),
    _Rule("[lLgG]", "(?i:lem|gim)", "(?i:me)"),
    _Rule("'", "'[tT]", "(?i:is|was)"),
    # Words: "dog", "dog" before "'s", "do" before "n't", the clitics themselves.
    _Rule(_PART_START, _WORD, f"{_APOSTROPHE}{_CLITIC}"),
    _Rule("[A-Za-z]", "[A-Za-z]*[A-MO-Za-mo-z]", f"[nN]{_APOSTROPHE}[tT]"),
    _Rule(_PART_START, _WORD),
    _Rule("'", f"'{_CLITIC}", "[^A-Za-z]"),
    _Rule("’", f"’{_CLITIC}"),
    # Apostrophes inside and before words.
    _Rule("'", "'n", " "),
    _Rule("’", "’n"),
    _Rule("['’dDjJlL]", f"{_APOSTROPHE}n{_APOSTROPHE}|[lLdDjJ]{_APOSTROPHE}|{_APOSTROPHE}[2-9]0s"),
    _Rule("[yY]", f"[yY]{_APOSTROPHE}", _ALPHA),
    _Rule(
        "['’cCdDoOsS]",
        f"(?i:dunkin{_APOSTROPHE}|somethin{_APOSTROPHE}|ol{_APOSTROPHE}|{_APOSTROPHE}em|"
        f"{_APOSTROPHE}till?|{_APOSTROPHE}cause|cap{_APOSTROPHE}n|c{_APOSTROPHE}est)",
    ),
    _Rule("[cCeElLnNsS]", "(?i:c'mon|nor'easter|e'er|s'mores|ev'ry|li'l|nat'l)"),
    _Rule(
        _ALPHA,
        f"{_ALPHA}+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]{_ALPHA}*|[A-HJ-XZn]{_QUOTE}{_ALPHA}{{2,}}",
    ),
    _Rule("[nN]", f"[nN]{_APOSTROPHE}[tT]", "[^A-Za-z]"),
    _Rule("[cC]", r"(?i:cont'd)\."),
    _Rule(_APOSTROPHE, f"{_APOSTROPHE}[0-9][0-9]", " "),
    # Addresses, names, tags, entities; punctuation at the end of an address isn't part of it.
    _Rule("[hH]", f"(?i:https?)://{_ADDRESS}+{_ADDRESS_END}"),
    _Rule(
        "w",
        rf"www\.(?:{_HOST}+\.)+[A-Za-z]{{2,4}}(?:{_PATH})?",
        run=rf"www\.(?:{_HOST}+\.)*{_HOST}*",
    ),
    _Rule(
        _DOMAIN,
        rf"(?:{_DOMAIN}+\.)+(?:com|net|org|edu)(?:{_PATH})?",
        run=rf"(?:{_DOMAIN}+\.)*{_DOMAIN}*",
    ),
    _Rule(
        "[A-Za-z0-9<]",
        rf"<?[A-Za-z0-9]{_ADDRESS}{{0,256}}@{_MAIL_HOST}+(?:\.{_MAIL_HOST}+)*>?",
    ),
    _Rule("[@#]", f"@[a-zA-Z_][a-zA-Z_0-9]*|#{_ALPHA}+"),
    _Rule("<", r"</?[A-Za-z][^ <>]*(?: +[A-Za-z][^<>]{0,999})?>|<[!?][A-Za-z-][^<>]{0,999}>"),
    _Rule("&", "&(?i:#[0-9]+|HT|TL|UR|LR|QC|QL|QR|ODQ|CDQ);"),
    # Numbers, fractions, telephone numbers, money.
    _Rule("[0-9.:,+-]", f"[-+]?{_NUMBER}"),
    _Rule("[0-9]", r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}"),
    _Rule(
        r"[0-9(+]",
        rf"(?:\(\d{{2,3}}\) ?|\+?\d{{2,4}}[- ](?:\d{{2,4}}[- ])?){_LOCAL_NUMBER}",
    ),
    _Rule("[A-Z$#]", r"[A-Z]*\$|#"),
    # Abbreviations keep their period; a single letter does unless a sentence starts after it.
    _Rule("[A-Za-z]", f"(?i:{_abbreviation(_ABBREVIATIONS)})"),
    _Rule("[A-Z]", _abbreviation(_CAPITALISED_ABBREVIATIONS)),
    _Rule("[A-Za-z]", f"(?i:{_abbreviation(_ABBREVIATIONS_OF_NUMBERS)})", " ?[0-9]"),
    _Rule("[A-Za-z]", r"[A-Za-z]\."),
    _Rule(
        "[A-Za-z]",
        "[A-Za-z]",
        rf"\. +{_any_of(_SENTENCE_STARTERS + _SENTENCE_STARTERS.upper())} ",
    ),
    _Rule("[A-Za-z]", rf"(?:{_ACRONYM}|Ph\.D|Ed\.D)\."),
    _Rule(f"{_PART_START}|[0-9]", f"(?:{_WORD}|{_COMPOUND})\\.", "[,;:]"),
    _Rule(
        _ALNUM,
        rf"{_ALNUM}+(?:\.{_ALNUM}+)*\.(?i:{_any_of(_FILE_SUFFIXES)})",
        "[^A-Za-z0-9]",
        run=rf"{_ALNUM}+(?:\.{_ALNUM}+)*",
    ),
    # Compounds: "and/or", "o'clock", "black-and-white", "AT&T", "1,000-foot", "U.S.-made".
    _Rule("[A-Za-z0-9]", f"{_SLASHED}(?:/{_SLASHED}){{1,2}}"),
    _Rule(_ALNUM, _COMPOUND),
    _Rule("[A-Z]", "[A-Z]+(?:[+&][A-Z]+)+"),
    _Rule("[A-Za-z0-9]", rf"[A-Za-z0-9][A-Za-z0-9.,]{{0,256}}+(?:-(?:{_ACRONYM}\.|[A-Za-z0-9]+))+"),
    _Rule(
        "[acfpCFS-]",
        r"pro-|anti-|S&P-500|S&Ls|C\.D\.s|-(?i:[lr][rcs]b)-|[cC]\+\+|[cCfF]#",
    ),
    # Punctuation that hangs together, then any single character.
    _Rule("[<>:;=]", f"[<>]?{_EYES}{_NOSE}?{_MOUTH}", "[^A-Za-z0-9]"),
    _Rule(rf"{_EYE}|\(", rf"{_EYE}_{_EYE}|\({_EYE}[-_.]?{_EYE}\)"),
    _Rule(
        rf"[.?!_*\\#@<>'’`‘”{_SUPERSCRIPT}-]",
        r"\.{3,5}|(?:\. ){2,4}\.|[?!]+|-+|_+|\*+|(?:\\\*){1,3}|#+|@+|<<|>>|''|[’`‘”]{1,2}|"
        + f"{_SUPERSCRIPT}+",
    ),
    _Rule(".", "."),
)


@cache
def _rules_for(first: str) -> tuple[_Rule, ...]:
    """Return the rules for tokens that start with a shape character."""
    return tuple(rule for rule in _RULES if rule.first.match(first))


# --- step 3: how tokens are written ---------------------------------------------------------------


def _by_character(characters: str, forms: str) -> dict[str, str]:
    """Map each character to its form, the forms being separated by spaces."""
    return dict(zip(characters, forms.split(), strict=True))


_TREEBANK = {
    **_by_character("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-"),
    **_by_character("¢£€\x80¤₠", "cents # $ $ $ $"),
    **_by_character("¼½¾⅓⅔", "1/4 1/2 3/4 1/3 2/3"),
    **_by_character('"\x96\x97–—―…', "'' -- -- -- -- -- ..."),
}
_TREEBANK_QUOTES = _by_character("`\x91‘‛‹\x92’›\x93“«\x94”»", "` ` ` ` ` ' ' ' `` `` `` '' '' ''")
_QUOTES = re.compile("[’`‘”]+")
_RUN = re.compile(r"(-)-{1,3}|(\.)[. ]+")
_CONTRACTION = re.compile(f"{_APOSTROPHE}{_CLITIC}|[nN]{_APOSTROPHE}[tT]")
_SPACE = re.compile(r"\s")
# HTML entities, in any case but for the two quotes.
_ENTITIES = {
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&nbsp;": " ",
    "&md;": "—",
    "&mdash;": "—",
    "&ndash;": "—",
    "&quot;": '"',
    "&apos;": "'",
}
_ENTITY = re.compile("&(?i:amp|lt|gt|nbsp|[mn]dash|md);|&quot;|&apos;")
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
    text = _ENTITY.sub(lambda match: _ENTITIES[match[0].lower()], caption.replace("\xad", ""))
    end = len(text)
    text = _SPACE.sub(" ", f"{text} {following.strip()} ")
    shape = text.translate(_shape_table)
    words, start = [], 0
    failed_until: dict[_Rule, int] = {}
    while start < end:
        if shape[start] == " ":
            start += 1
            continue
        stop = _end_of_token(shape, start, end, failed_until)
        word = _treebank_form(text[start:stop], shape[start:stop])
        if word not in _PUNCTUATION:
            words.append(word)
        start = stop
    return words


def _end_of_token(shape: str, start: int, end: int, failed_until: dict[_Rule, int]) -> int:
    """Return where the token at ``start`` ends, by the rule that sees the longest stretch.

    Args:
        shape: The whole text, as shape characters.
        start: Where the token starts.
        end: Where the caption ends. Tokens don't go beyond it, though what must follow them may.
        failed_until: Where the last run without a token ended, for each rule that met one in this
            text. Updated here.
    """
    longest = stop = start
    for rule in _rules_for(shape[start]):
        if rule in failed_until and start < failed_until[rule]:
            continue
        match = rule.pattern.match(shape, start)
        if not match:
            continue
        if match.lastindex is None:  # a run without a token
            failed_until[rule] = match.end()
        elif match.end() > longest and match.end(1) <= end:
            longest, stop = match.end(), match.end(1)
    return stop


def _treebank_form(text: str, shape: str) -> str:
    """Return a token the way the Treebank writes it, in lower case; "" if it is unknown."""
    if text.isascii() and text.isalnum():
        return text.lower()
    if shape in (_UNKNOWN, _HYPHEN):
        return ""
    if _CONTRACTION.fullmatch(shape):
        return shape.lower().replace("’", "'")
    if _QUOTES.fullmatch(shape):
        return "".join(_TREEBANK_QUOTES[character] for character in text)
    if _RUN.fullmatch(shape):
        return "--" if shape[0] == "-" else "..."
    if len(text) > 1:  # an address with brackets in it stays as it is, a smiley doesn't
        return text.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0").lower()
    return _TREEBANK.get(text, text).lower()
