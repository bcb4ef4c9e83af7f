"""What captions go through before a T5 whose features a published painter was trained on.

LlamaGen cleans every caption, twice, in training and in sampling (FoundationVision/LlamaGen
ce98ec4, language/t5.py, class T5Embedder, which has it from PixArt and DeepFloyd IF): a model of
theirs has never seen a capital letter or a bracket. The rules below are those, in that order.

One thing is left out: the repair of text that was decoded by the wrong code page ("Ã©" for "é"),
for which the original needs the package ftfy. Its other repairs are here (`_settled`).
"""

import html
import re
import unicodedata
from html.parser import HTMLParser
from urllib.parse import unquote_plus

_DOMAIN = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_SLASHES = r"(?:/{1,3}|[a-z0-9%])"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_CJK = "\u31c0-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"  # strokes, phonetic, enclosed, ideographs
_DASHES = (
    "\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)

_Rules = list[tuple[re.Pattern[str], str]]


def _rules(*pairs: tuple[str, str]) -> _Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


_ADDRESSES = _rules(
    ("<person>", "person"),
    (rf"\b(?:https?:{_SLASHES}|{_DOMAIN})", ""),
    (rf"\b(?:www:{_SLASHES}|{_DOMAIN})", ""),
)
"""Before tags are taken out."""

_MARKS = _rules(
    (r"@\w+\b", ""),  # nicknames
    (f"[{_CJK}]+", ""),
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_TYPES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINTS = re.compile("[-_]")
_JOINTS_KEPT = 3
"""With more hyphens and underscores than these, words were joined by them: they become spaces."""

_LEFTOVERS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second sign is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    ("^[\"']([\\w\\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)

_LIGATURES = str.maketrans(
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"}
    | {"Ĳ": "IJ", "ĳ": "ij", "ŉ": "ʼn", "Ǆ": "DŽ", "ǅ": "Dž", "ǆ": "dž"}
    | {"Ǉ": "LJ", "ǈ": "Lj", "ǉ": "lj", "Ǌ": "NJ", "ǋ": "Nj", "ǌ": "nj", "Ǳ": "DZ", "ǲ": "Dz"}
    | {"ǳ": "dz"}
)
_CURLED = str.maketrans(dict.fromkeys("ʼ‘’‚‛", "'") | dict.fromkeys("“”„‟", '"'))
_WIDE = re.compile("[\u3000\uff01-\uffef]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc]")


def clean_caption(text: str) -> str:
    """The caption as LlamaGen's T5 sees it: lower case, without markup, addresses and brackets.

    Cleaning may leave nothing of a caption that is only such things.
    """
    return _cleaned(_cleaned(text))


def _cleaned(text: str) -> str:
    text = unquote_plus(text).strip().lower()
    text = _applied(_ADDRESSES, text)
    text = _applied(_MARKS, _without_tags(text))
    if len(_JOINTS.findall(text)) > _JOINTS_KEPT:
        text = _JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(_settled(text))).strip()
    return _applied(_LEFTOVERS, text).strip()


def _applied(rules: _Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _settled(text: str) -> str:
    """One spelling of the same text: ligatures, full-width letters, quotes, composed accents."""
    text = html.unescape(text) if "<" not in text else text
    text = text.translate(_LIGATURES)
    text = _WIDE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = _CONTROL.sub("", text.translate(_CURLED))
    return unicodedata.normalize("NFC", text)


class _Text(HTMLParser):
    """Collects what stands between the tags."""

    SILENT = ("script", "style", "template")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in self.SILENT

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in self.SILENT and self._silent > 0

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def _without_tags(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)
