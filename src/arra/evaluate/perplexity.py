"""Perplexity of a language model on text: did it forget how to write when it learned to paint?

Legend: B windows, T tokens of a padded window, N scored positions, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from arra.evaluate.finding import Finding
from arra.models.base import Backbone

WINDOW = 512  # tokens that one forward pass sees; fixed, so that values stay comparable
SCORED_AT_ONCE = 2048  # positions whose logits exist at the same time


@dataclass(frozen=True)
class Perplexity:
    """`perplexity` = exp(nll / tokens); `bits_per_byte` compares models of unlike tokenizers."""

    perplexity: float
    bits_per_byte: float
    nll: float  # nats, summed over all tokens
    tokens: int
    documents: int
    window: int

    def findings(self) -> dict[str, Finding]:
        """Both, of so many tokens."""
        return {
            "perplexity": Finding(self.perplexity, self.tokens, details=asdict(self)),
            "bits_per_byte": Finding(self.bits_per_byte, self.tokens),
        }


def read_documents(path: str | Path) -> list[str]:
    """Documents of a UTF-8 text file: parted by blank lines where it has any, else one a line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it first") from None
    lines = [line.rstrip() for line in text.strip().splitlines()]
    blocks = "\n".join(lines).split("\n\n") if "" in lines else lines
    documents = [block.strip("\n") for block in blocks if block.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text: give a file with one document a line")
    return documents


@torch.inference_mode()
def text_perplexity(
    backbone: Backbone, texts: Sequence[str], *, window: int = WINDOW, batch_size: int = 8
) -> Perplexity:
    """Token-weighted exp(mean negative log-likelihood) of `texts` under `backbone`.

    Every token of a document is scored once, after the family's own start token and at least half
    a window of context where the document has it. The softmax runs over the text vocabulary: the
    ids of the text tokenizer less the layout's image tokens. So a model that was grown by image
    codes and the model it was grown from answer the same question.
    """
    window = min(window, backbone.max_length)
    if window < 2:
        raise ValueError(f"a window of {window} tokens leaves nothing to predict: use at least 2")
    excluded_V = _outside_text(backbone)
    was_training = backbone.model.training
    backbone.model.eval()
    nll, tokens = 0.0, 0
    try:
        pending: list[tuple[list[int], int]] = []
        windows = [w for text in texts for w in _windows(_ids(backbone, text), window)]
        windows.sort(key=lambda item: len(item[0]))  # less padding; the sum does not care
        for item in windows:
            pending.append(item)
            if len(pending) == batch_size:
                nll += _nll(backbone, pending, excluded_V)
                pending = []
        if pending:
            nll += _nll(backbone, pending, excluded_V)
        tokens = sum(scored for _, scored in windows)
    finally:
        backbone.model.train(was_training)
    if tokens == 0:
        raise ValueError("the texts hold no token to score: give documents that are not empty")
    size = sum(len(text.encode("utf-8")) for text in texts)
    return Perplexity(
        perplexity=math.exp(nll / tokens),
        bits_per_byte=nll / math.log(2) / size,
        nll=nll,
        tokens=tokens,
        documents=len(texts),
        window=window,
    )


def _windows(ids: list[int], window: int) -> Iterator[tuple[list[int], int]]:
    """(ids, how many of the last are scored): windows overlap by half, tokens are scored once."""
    done = 1  # the start token is given, not predicted
    while done < len(ids):
        begin = 0 if done == 1 else max(done - window // 2, 0)
        end = min(begin + window, len(ids))
        yield ids[begin:end], end - done
        done = end


def _ids(backbone: Backbone, text: str) -> list[int]:
    return [*backbone.opening(), *backbone.text_ids(text)]


def _outside_text(backbone: Backbone) -> torch.Tensor:
    """Bool (V,): ids that a text token cannot have, image tokens and padded table rows.

    Raises:
        ValueError: the model has no text tokenizer.
    """
    if backbone.text_tokenizer is None:
        raise ValueError(f"{type(backbone.model).__name__} writes no text: it has no perplexity")
    excluded_V = torch.ones(backbone.vocab_size, dtype=torch.bool)
    excluded_V[: len(backbone.text_tokenizer)] = False
    excluded_V[backbone.layout.image_vocabulary()] = True
    if backbone.layout.rep is not None:
        excluded_V[backbone.layout.rep] = True
    return excluded_V.to(backbone.device)


def _nll(
    backbone: Backbone, windows: list[tuple[list[int], int]], excluded_V: torch.Tensor
) -> float:
    """Summed negative log-likelihood, in nats, of the last `scored` tokens of each window."""
    longest = max(len(ids) for ids, _ in windows)
    ids_BT = torch.full((len(windows), longest), backbone.layout.pad)
    positions, labels = [], []
    for row, (ids, scored) in enumerate(windows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        first = len(ids) - scored
        positions += [row * longest + t - 1 for t in range(first, len(ids))]
        labels += ids[first:]
    hidden_ND = backbone.last_hidden(ids_BT.to(backbone.device)).flatten(0, 1)[positions]
    labels_N = torch.tensor(labels, device=hidden_ND.device)
    total = 0.0
    for start in range(0, len(labels), SCORED_AT_ONCE):
        chunk = slice(start, start + SCORED_AT_ONCE)
        logits_NV = backbone.head(hidden_ND[chunk]).float().masked_fill(excluded_V, -torch.inf)
        losses_N = torch.nn.functional.cross_entropy(logits_NV, labels_N[chunk], reduction="none")
        total += float(losses_N.double().sum())
    return total
