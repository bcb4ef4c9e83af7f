"""Sections of radiology reports, and what they say about earlier examinations.

Headings are read as the reports of MIMIC-CXR write them: capitals and a colon at the start of a
line. The last section of a name counts: it is the one that was signed.
"""

import re

_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ()/,\-]*[A-Z)]):", re.MULTILINE)

SECTIONS = {
    "impression": ("IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "OPINION"),
    "findings": ("FINDINGS", "FINDING"),
}
"""Headings that begin a section."""

_EXAM = (
    r"(?:(?:chest\s+)?(?:study|studies|exam(?:ination)?s?|radiographs?|films?|x-?rays?|images?|"
    r"imaging|ct|cxr)\b\s*)?"
)
_DATE = r"(?:\s*(?:from|of|dated|on|at)?\s*(?:_{2,}|\d{1,2}/\d{1,2}(?:/\d{2,4})?))?"
_EARLIER = rf"(?:the\s+)?(?:most\s+recent\s+)?(?:prior|previous|earlier|preceding)\s*{_EXAM}{_DATE}"
_DATED = r"(?:the\s+)?(?:(?:study|exam(?:ination)?|radiograph|film)\s+(?:from|of|dated)\s+)?_{2,}"

_PHRASES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf",?\s*\b(?:as|when)?\s*(?:compared|in\s+comparison|comparison\s+is\s+made)\s+(?:to|with)\s+"
        rf"(?:{_EARLIER}|{_DATED}),?",
        rf",?\s*\b(?:since|from|than|relative\s+to|similar\s+to)\s+(?:{_EARLIER}|{_DATED}),?",
        r"\b(?:as\s+)?(?:again|previously)\s+(?:is\s+|are\s+)?(?:seen|noted|demonstrated|described),?",
        r",?\s*\b(?:essentially\s+|grossly\s+|largely\s+|relatively\s+)?(?:unchanged|stable)\b"
        r"(?:\s+in\s+(?:appearance|position|size|extent))?",
        r"\binterval\b",
    )
)
_ONLY_CHANGE = re.compile(
    r"(?:\d+\.\s*)?(?:there\s+(?:is|has\s+been)\s+)?(?:no|little)\s+(?:(?:significant|relevant|"
    r"substantial|appreciable|acute|overall|other|interval)\s+)*change"
    r"(?:\s+in\s+(?:the\s+)?(?:appearance\s+of\s+the\s+)?(?:chest|lungs))?"
    rf"(?:,?\s+(?:since|from|as\s+compared\s+(?:to|with)|compared\s+(?:to|with))\s+"
    rf"(?:{_EARLIER}|{_DATED}))?\s*[.!]?",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<!\b\d[.])(?<=[.!?])\s+(?=[A-Z0-9(])")
_EMPTY = re.compile(r"(?:\d+\.)?\W*(?:(?:is|are|the|and|there|chest|exam(?:ination)?|study)\W*)*")


def section(report: str, name: str) -> str | None:
    """The text of a report's section in one line; None if it has none or an empty one.

    Args:
        report: the whole text.
        name: a key of SECTIONS.
    """
    headings = list(_HEADING.finditer(report))
    found = None
    for position, heading in enumerate(headings):
        if " ".join(heading[1].split()) in SECTIONS[name]:
            end = headings[position + 1].start() if position + 1 < len(headings) else len(report)
            found = report[heading.end() : end]
    return " ".join(found.split()) or None if found is not None else None


def without_priors(text: str) -> str:
    """Takes out of a section what compares with earlier examinations, by fixed phrases.

    Sentences that only say that nothing changed go whole; of others, the comparing words. What the
    phrases do not cover stays. Nothing is left ("") of a text that does nothing but compare.
    """
    kept = []
    for sentence in _SENTENCE.split(text):
        if _ONLY_CHANGE.fullmatch(sentence):
            continue
        shorter = sentence
        for phrase in _PHRASES:
            shorter = phrase.sub(" ", shorter)
        if shorter != sentence:
            shorter = re.sub(r"\s+([.,;:])", r"\1", " ".join(shorter.split())).lstrip(",;: ")
            if _EMPTY.fullmatch(shorter):
                continue
            shorter = shorter[:1].upper() + shorter[1:]
        kept.append(shorter)
    text = " ".join(kept)
    return "" if _EMPTY.fullmatch(text) else text
