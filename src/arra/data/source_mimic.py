"""MIMIC-CXR-JPG with the reports of MIMIC-CXR (PhysioNet, version 2; access is credentialed).

    mimic-cxr-2.0.0-metadata.csv.gz   dicom_id, subject_id, study_id, ViewPosition, …
    mimic-cxr-2.0.0-split.csv.gz      dicom_id, study_id, subject_id, split
    files/p10/p10000032/s50414267/<dicom_id>.jpg
    files/p10/p10000032/s50414267.txt                 from MIMIC-CXR's mimic-cxr-reports.zip

The caption is the prompt of the ARRA paper: "{view} view chest x-ray image, {impression}".
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from arra.data.radiology_reports import SECTIONS, section, without_priors
from arra.data.source_options import check_options
from arra.data.sources import (
    Record,
    Reject,
    bad_text,
    digest,
    group_names,
    missing_column,
    pick_split,
)
from arra.files import sha256_of

_SPLITS = {"train": "train", "validate": "val", "test": "test"}
_OPTIONS = {"priors": ("kept", "removed"), "reports": (), "prompt": ("view", "none")}
_NEEDED = {
    "metadata": ("dicom_id", "subject_id", "study_id", "ViewPosition"),
    "split": ("dicom_id", "subject_id", "study_id", "split"),
}
_DICOM = re.compile(r"[0-9A-Za-z][0-9A-Za-z-]*")
_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class _Image:
    """One line of the split's table; `view` is empty where the metadata does not say it."""

    dicom: str
    subject: str
    study: str
    view: str
    reason: str | None

    @property
    def patient_folder(self) -> str:
        return f"files/p{self.subject[:2]}/p{self.subject}"


def tables(folder: Path) -> dict[str, Path] | None:
    """The tables `metadata` and `split` of a MIMIC-CXR-JPG folder, or None if it is none."""
    found = {}
    for table in _NEEDED:
        there = sorted(folder.glob(f"mimic-cxr-*-{table}.csv*"))
        there = [path for path in there if path.name.endswith((".csv", ".csv.gz"))]
        if not there:
            return None
        found[table] = there[0]
    return found


def open_mimic(
    folder: Path,
    split: str | None,
    text_column: str,
    image_column: str,
    name: str,
    options: Mapping[str, str],
) -> "MimicSource":
    """The rows of one official split, which never divides a patient.

    Args:
        text_column: `text` or `impression` puts the impression into the prompt, `findings` those.
        options: `priors=removed` takes out comparisons with earlier examinations; `prompt=none`
            leaves the section as the caption, for a template of one's own;
            `reports=FOLDER` is where `files/p10/…/s50414267.txt` are, if not in the same folder.

    Raises:
        ValueError: another column, a table without its columns, or a patient in two splits.
    """
    check_options(name, options, _OPTIONS)
    if image_column != "image":
        raise missing_column(name, "image", image_column, ["image"])
    if text_column not in ("text", *SECTIONS):
        raise missing_column(name, "text", text_column, ["text", *SECTIONS])
    paths = tables(folder)
    assert paths is not None
    rows = {table: _read(path, _NEEDED[table]) for table, path in paths.items()}
    by_split = _by_split(rows, paths["split"])
    chosen = pick_split(name, tuple(by_split), split)
    reports = Path(options.get("reports", str(folder))).expanduser()
    if not (reports / "files").is_dir():
        raise ValueError(f"{name}: {reports} holds no folder `files`; reports=FOLDER names another")
    part = "impression" if text_column == "text" else text_column
    removed = options.get("priors") == "removed"
    prompted = options.get("prompt") != "none"
    shas = [sha256_of(path) for path in paths.values()]
    return MimicSource(
        name,
        chosen,
        tuple(by_split),
        by_split[chosen],
        folder,
        reports,
        part,
        removed,
        prompted,
        digest("mimic", shas, chosen, part, removed, prompted),
    )


def _read(path: Path, needed: tuple[str, ...]) -> list[dict[str, str | None]]:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        rows = list(reader)
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None
    missing = [column for column in needed if column not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}")
    return rows


def _by_split(
    rows: Mapping[str, list[dict[str, str | None]]], table: Path
) -> dict[str, list[_Image]]:
    """The images of each split in the table's order; those in one table only are rejects."""
    described = {row["dicom_id"]: row for row in rows["metadata"]}
    by_split: dict[str, list[_Image]] = {each: [] for each in _SPLITS.values()}
    owner: dict[str, str] = {}
    listed: set[str] = set()
    for row in rows["split"]:
        known = described.get(row["dicom_id"])
        split = _SPLITS.get(row["split"] or "")
        reason = None if known is not None else "the image is not in the metadata"
        if split is None:
            split, reason = "train", f"{row['split']!r} is no split"
        image = _image(row, known or {}, reason)
        if image.dicom in listed:
            image = _image(row, known or {}, "duplicate id")
        listed.add(image.dicom)
        if image.reason is None and owner.setdefault(image.subject, split) != split:
            raise ValueError(
                f"{table}: patient {image.subject} is in {owner[image.subject]} and in {split}"
            )
        by_split[split].append(image)
    for row in rows["metadata"]:
        if row["dicom_id"] not in listed:
            by_split["train"].append(_image(row, row, "the image is in no split"))
    return {split: images for split, images in by_split.items() if images}


def _image(
    row: Mapping[str, str | None], known: Mapping[str, str | None], reason: str | None
) -> _Image:
    dicom, subject, study = (row[key] or "" for key in ("dicom_id", "subject_id", "study_id"))
    if not (_DICOM.fullmatch(dicom) and _NUMBER.fullmatch(subject) and _NUMBER.fullmatch(study)):
        reason = "dicom_id, subject_id or study_id is not one"
    elif known and (known["subject_id"], known["study_id"]) != (subject, study):
        reason = "the tables disagree about the patient or study"
    return _Image(dicom, subject, study, (known.get("ViewPosition") or "").strip(), reason)


class MimicSource:
    """Chest X-rays with their view and a section of their report; reports are read with the rows.

    The extra columns `patient` and `study` are for audits, `view` for filters.
    """

    def __init__(
        self,
        name: str,
        split: str,
        splits: tuple[str, ...],
        images: list[_Image],
        folder: Path,
        reports: Path,
        part: str,
        priors_removed: bool,
        prompted: bool,
        fingerprint: str,
    ) -> None:
        self.name, self.split, self.splits, self.fingerprint = name, split, splits, fingerprint
        self.columns: dict[str, type] = {"view": str, "patient": str, "study": str}
        self.class_names: tuple[str, ...] = ()
        self._images, self._folder, self._reports = images, folder, reports
        self._part, self._priors_removed, self._prompted = part, priors_removed, prompted

    def __len__(self) -> int:
        return len(self._images)

    @property
    def groups(self) -> list[str]:
        """By patient."""
        return group_names(image.subject for image in self._images)

    def read(self, start: int, stop: int) -> Iterator[Record | Reject]:
        """Yields rows start..stop-1."""
        for row, image in enumerate(self._images[start:stop], start):
            reason, text = image.reason, ""
            if reason is None:
                text, reason = self._section(image)
            if reason is not None:
                yield Reject(row, image.dicom or None, reason)
                continue
            view = f"{image.view} view chest" if image.view else "chest"
            yield Record(
                image.dicom,
                self._folder / image.patient_folder / f"s{image.study}" / f"{image.dicom}.jpg",
                f"{view} x-ray image, {text}" if self._prompted else text,
                {"view": image.view or None, "patient": image.subject, "study": image.study},
                row,
            )

    def _section(self, image: _Image) -> tuple[str, str | None]:
        """The report's section, and why there is none."""
        path = self._reports / image.patient_folder / f"s{image.study}.txt"
        try:
            report = path.read_bytes().decode("utf-8-sig")
        except (FileNotFoundError, NotADirectoryError):
            return "", f"missing report {path}"
        except UnicodeDecodeError:
            return "", f"the report {path} is not valid UTF-8"
        text = section(report, self._part)
        if text is None:
            return "", f"the report has no section {self._part}"
        if self._priors_removed:
            text = without_priors(text)
            if not text:
                return "", f"the section {self._part} only compares with earlier examinations"
        return text, bad_text(text)
