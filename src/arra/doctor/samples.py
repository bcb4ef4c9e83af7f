"""Some rows as pictures: what was in the source beside what the codes decode to.

Legend: N images, h and w code rows and columns, H and W pixels.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from arra.data.framing import Framing, framing_of
from arra.data.images import BadImage, to_pil, to_uint8
from arra.data.manifest import Manifest
from arra.doctor.findings import Check, Finding, counted, first
from arra.doctor.originals import Row, SourcePictures
from arra.doctor.scan import SplitScan, values_of
from arra.image_tokenizers.interface import ImageTokenizer

DIFFERENT = 0.5
"""Share of equal codes below which a row's picture and its original are two pictures. The same
picture encoded on other hardware agrees in all but a few codes of a thousand."""


@dataclass(frozen=True)
class Shown:
    """A row as pictures.

    Attributes:
        row: split and row.
        id, caption: of the row.
        original: framed as the models saw it; None if it cannot be had.
        decoded: its codes as a picture; None if there is no tokenizer.
        agreement: share of codes that the tokenizer makes of the original today.
        psnr: of the decoded picture, dB.
    """

    row: Row
    id: str
    caption: str
    original: Image.Image | None = None
    decoded: Image.Image | None = None
    agreement: float | None = None
    psnr: float | None = None


@dataclass
class Pictures:
    """Makes pictures of rows. What is missing is None, and `why` says why.

    Attributes:
        tokenizer: that of the manifest, or None.
        originals: the source of the manifest, or None.
        why: findings about what is missing.
    """

    folder: Path
    manifest: Manifest
    scans: Mapping[str, SplitScan]
    tokenizer: ImageTokenizer | None = None
    originals: SourcePictures | None = None
    why: list[Finding] = field(default_factory=list)

    def show(self, rows: Sequence[Row]) -> list[Shown]:
        """The pictures of some rows, in order."""
        found: dict[Row, Image.Image] = {}
        if self.originals is not None:
            try:
                found = self.originals.read(self.scans, rows)
            except (ValueError, OSError) as error:
                why = f"originals: the source cannot be read ({_short(error)})"
                self.why.append(Finding("not checked", why, "samples"))
                self.originals = None
        framing = framing_of(self.manifest.size, self.manifest.framing)
        return [self._shown(row, found.get(row), framing) for row in rows]

    def _shown(self, row: Row, original: Image.Image | None, framing: Framing) -> Shown:
        split, number = row
        shards = self.scans[split].shards
        id_, caption, codes, height, width = (
            values_of(self.folder, shards, name, [number])[number]
            for name in ("id", "text", "image_ids", "grid_height", "grid_width")
        )
        framed = None
        if original is not None:
            with contextlib.suppress(BadImage):  # told as a row without an original
                framed = framing.frame(original)
        if self.tokenizer is None or height * width != len(codes):
            return Shown(row, id_, caption or "", framed)
        codes_1hw = torch.tensor(codes).reshape(1, height, width)
        with torch.inference_mode():
            decoded_1CHW = self.tokenizer.decode(codes_1hw)
            agreement = psnr = None
            if framed is not None:
                seen_1CHW = to_uint8([framed])
                again_1hw = self.tokenizer.encode(seen_1CHW)
                same = again_1hw.shape == codes_1hw.shape
                agreement = float((again_1hw == codes_1hw).double().mean()) if same else 0.0
                psnr = _psnr(seen_1CHW, decoded_1CHW)
        decoded = to_pil(decoded_1CHW)[0]
        return Shown(row, id_, caption or "", framed, decoded, agreement, psnr)


def _psnr(one_NCHW: torch.Tensor, other_NCHW: torch.Tensor) -> float | None:
    if one_NCHW.shape != other_NCHW.shape:
        return None
    error = float((one_NCHW.double() - other_NCHW.double()).square().mean())
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def open_pictures(
    folder: Path,
    manifest: Manifest,
    plan: Mapping[str, Any] | None,
    scans: Mapping[str, SplitScan],
    source: str | None,
    image_tokenizer: str | None,
) -> Pictures:
    """Opens the tokenizer and the source that the manifest names, or others in their place."""
    from arra.image_tokenizers import load_image_tokenizer

    pictures = Pictures(folder, manifest, scans)
    spec = image_tokenizer or manifest.tokenizer.spec
    try:
        tokenizer = load_image_tokenizer(spec)
    except (ValueError, OSError) as error:
        why = f"codes as pictures: the image tokenizer {spec} cannot be opened ({_short(error)})"
        remedy = "name its folder with --image-tokenizer"
        pictures.why.append(Finding("not checked", why, "samples", remedy=remedy))
    else:
        if tokenizer.fingerprint == manifest.tokenizer.fingerprint:
            pictures.tokenizer = tokenizer
        else:
            what = f"the image tokenizer {spec} is not the one that made the codes (fingerprint)"
            remedy = "name the folder of the right one with --image-tokenizer"
            pictures.why.append(Finding("warning", what, "manifest.json", remedy=remedy))
    if plan is None:
        why = "originals: plan.json, which says how to find them, is not readable"
        pictures.why.append(Finding("not checked", why, "samples"))
        return pictures
    try:
        pictures.originals = SourcePictures(folder, manifest, plan, source)
    except (ValueError, OSError) as error:
        remedy = "name the source's place with --source"
        why = f"originals: {_short(error)}"
        pictures.why.append(Finding("not checked", why, "samples", remedy=remedy))
    return pictures


def _short(error: Exception) -> str:
    return " ".join(str(error).split())


def chosen_rows(scans: Mapping[str, SplitScan], count: int) -> list[Row]:
    """Rows at equal distances over all splits, further views left out."""
    rows = [
        (split, int(row))
        for split, scan in scans.items()
        for row in _spread(np.flatnonzero(scan.keys["main"] == scan.keys["id"]), count)
    ]
    return [rows[int(place)] for place in _spread(np.arange(len(rows)), count)]


def _spread(values: np.ndarray, count: int) -> Iterable[int]:
    if not len(values):
        return []
    places = np.linspace(0, len(values) - 1, min(count, len(values)))
    return [int(v) for v in values[places.round().astype(int)]]


def samples_check(pictures: Pictures, shown: Sequence[Shown]) -> Check:
    """Whether the samples' codes are what the tokenizer makes of their originals."""
    findings = list(pictures.why)
    compared = [each for each in shown if each.agreement is not None]
    without = [each.id for each in shown if each.original is None]
    if pictures.originals is not None and without:
        why = f"{counted(len(without), 'sample')} without an original that can be read"
        findings.append(Finding("not checked", why, "samples", len(without), first(without)))
    wrong = [each for each in compared if (each.agreement or 0.0) < DIFFERENT]
    if wrong:
        what = f"{counted(len(wrong), 'sample')} whose codes are not those of the original"
        named = first(f"{each.id}: {each.agreement:.0%} of codes agree" for each in wrong)
        remedy = "the source has changed since: prepare the data again"
        findings.append(Finding("warning", what, wrong[0].row[0], len(wrong), named, remedy))
    facts: dict[str, Any] = {"samples": len(shown), "compared": len(compared)}
    summary = f"{len(shown)} looked at"
    if compared:
        facts["agreement"] = float(np.mean([each.agreement or 0.0 for each in compared]))
        psnr = [each.psnr for each in compared if each.psnr is not None]
        summary = (
            f"{len(compared)} encoded again from the source: {facts['agreement']:.1%} of codes "
            f"are the same"
        )
        if psnr:
            facts["psnr"] = float(np.mean(psnr))
            summary += f"; decoded at {facts['psnr']:.1f} dB"
    elif pictures.tokenizer is not None:
        summary = f"{len(shown)} decoded, no originals to compare with"
    return Check("samples", summary, findings, facts)
