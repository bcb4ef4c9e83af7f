"""One model of a stock server, over its OpenAI-compatible API: requests, answers and errors.

The servers are vLLM and SGLang: OpenAI's own API can neither keep to given tokens nor say their
ids.
"""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

WORDS_SHOWN = 200
"""Characters of a server's own message that ours repeat."""


@dataclass(frozen=True)
class Dialect:
    """What a server calls things that OpenAI's API lacks.

    Checked against vLLM 0.32.0 (entrypoints/openai/completion/protocol.py) and SGLang
    (python/sglang/srt/entrypoints/openai/protocol.py, 004c82e).
    """

    allows_ids: bool  # takes `allowed_token_ids`; if not, a bias lifts the codes above the rest
    every_code: int  # `top_k` that keeps all


DIALECTS = {"vllm": Dialect(True, 0), "sglang": Dialect(False, -1)}
"""By what a server's list of models says of their owner."""
LIFT = 100.0
"""Added to the logits of codes: the most that the API allows. Others are then e^100 times less
likely than they were; a code's own logit keeps about five digits after the point."""


class Server:
    """The HTTP side: one model of one server.

    Args:
        url: of the server, with or without /v1 at its end.
        name: of the model there; needed where it serves several.
        timeout: seconds that one answer may take.

    Raises:
        ValueError: nothing answers there, or it is no such server or has no such model.
    """

    def __init__(self, url: str, name: str | None = None, timeout: float = 600.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{url} is no address of a server: write it as http://HOST:PORT")
        self.timeout = timeout
        listed = self._ask("/v1/models").get("data")
        cards = {c["id"]: c for c in listed or () if isinstance(c, dict) and "id" in c}
        if name is None and len(cards) != 1:
            raise ValueError(f"{self.url} serves {_named(cards)}: say which is the painter")
        self.name = next(iter(cards)) if name is None else name
        if self.name not in cards:
            raise ValueError(f"{self.url} has no model {self.name!r}, it serves {_named(cards)}")
        card = cards[self.name]
        self.owner = str(card.get("owned_by"))
        if self.owner not in DIALECTS:
            raise ValueError(
                f"{self.url} is a server of {self.owner!r}: pictures can be had from "
                f"{' or '.join(DIALECTS)}, which can keep to image codes"
            )
        self.dialect = DIALECTS[self.owner]
        self.max_length: int | None = card.get("max_model_len")

    def version(self) -> tuple[int, ...]:
        """Of vLLM, (major, minor)."""
        said = str(self._ask("/version").get("version"))
        return tuple(int(part) for part in said.split(".")[:2] if part.isdigit())

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """The one answer to a request at /v1/completions."""
        answer = self._ask("/v1/completions", {"model": self.name, **request})
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise ValueError(f"{self.url} answered without a completion: is it an OpenAI server?")
        return choices[0]

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"{self.url}{path} refused (HTTP {error.code}): {_said(error.read())}"
            ) from None
        except TimeoutError:
            raise ValueError(
                f"{self.url}{path} gave no answer within {self.timeout:g} s: ask for fewer "
                f"pictures at once, or wait longer"
            ) from None
        except OSError as error:  # refused, no such host, cut off
            reason = getattr(error, "reason", error)
            raise ValueError(
                f"no server answers at {self.url} ({reason}): start it first"
            ) from None
        except ValueError:  # not JSON
            answer = None
        if not isinstance(answer, dict):
            raise ValueError(f"{self.url}{path} answered no JSON: is it an OpenAI server?")
        return answer


def _named(cards: dict[str, Any]) -> str:
    return ", ".join(sorted(cards)) or "no model"


def _said(body: bytes) -> str:
    """A server's own words about an error, in one line."""
    text = body.decode(errors="replace")
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    if isinstance(told, dict):
        inner = told.get("error", told)
        text = str(inner.get("message", text) if isinstance(inner, dict) else inner)
    return " ".join(text.split())[:WORDS_SHOWN] or "it gave no reason"
