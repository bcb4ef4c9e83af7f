"""Which language a caption is in, by py3langid: offline, its model comes with the package."""

from functools import cache
from importlib.metadata import version
from typing import Any

UNLIKELY = 0.1
"""A caption is left out if another language is ten times likelier. On 1,000 COCO captions that is
none, on 1,000 PartiPrompts 8, on 1,000 names of emoji (two words mostly) 27; "Hund am Strand" and
"un perro en la playa" are told from English."""


class Languages:
    """Tells captions of one language from others.

    Args:
        wanted: ISO 639-1 code of the language that is kept.

    Raises:
        ValueError: py3langid is not installed, or does not know the language.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        known = sorted(_identifier().labels)
        if wanted not in known:
            raise ValueError(f"--language {wanted!r} is not one of {', '.join(known)}")
        self.identity = [wanted, "py3langid", version("py3langid")]

    def refuses(self, text: str) -> str | None:
        """Why a caption is left out, or None."""
        ranked = _identifier().rank(text)  # best first
        likeliest, best = ranked[0]
        if dict(ranked)[self.wanted] >= UNLIKELY * best:
            return None
        return f"the caption's language is {likeliest}, not {self.wanted}"


@cache
def _identifier() -> Any:
    try:
        from py3langid import langid
    except ModuleNotFoundError:
        raise ValueError(
            "--language needs a package that tells languages: pip install 'arra[language]'; a "
            "column that says the language can be used without it, --where 'LANGUAGE == en'"
        ) from None
    # Not langid.classify: it keeps a global without probabilities.
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
