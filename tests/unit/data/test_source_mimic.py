"""MIMIC-CXR-JPG in its official folders and columns; every report here is made up."""

import csv
import gzip
import io

import pytest
from PIL import Image

from arra.data.images import load_rgb
from arra.data.radiology_reports import section, without_priors
from arra.data.selection import Reading
from arra.data.sources import Record, Reject, open_source

METADATA = [
    "dicom_id",
    "subject_id",
    "study_id",
    "PerformedProcedureStepDescription",
    "ViewPosition",
    "Rows",
    "Columns",
    "StudyDate",
    "StudyTime",
    "ProcedureCodeSequence_CodeMeaning",
    "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
]
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough.

 COMPARISON:  ___.

 FINDINGS:

 The lungs are clear.  Heart size is
 normal.

 IMPRESSION:

 1. No pneumonia,
 compared to the prior study from ___.  2. Small effusion.
"""
IMPRESSION = "1. No pneumonia, compared to the prior study from ___. 2. Small effusion."


def write_gz(path, columns, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(gzip.compress(text.getvalue().encode()))


def row_of(i, subject=None, study=None, view="AP", split="train"):
    subject = subject or 10000030 + i
    return {
        "dicom_id": f"0000000{i}-aaaaaaaa-bbbbbbbb-cccccccc-dddddddd",
        "subject_id": str(subject),
        "study_id": str(study or 50000000 + i),
        "ViewPosition": view,
        "split": split,
    }


def mimic(folder, rows, reports=None):
    """The files of MIMIC-CXR-JPG 2.x beside the reports of MIMIC-CXR."""
    for i, row in enumerate(rows):
        patient = f"files/p{row['subject_id'][:2]}/p{row['subject_id']}"
        path = folder / patient / f"s{row['study_id']}" / f"{row['dicom_id']}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 20 * i).save(path)
        report = (reports or folder) / patient / f"s{row['study_id']}.txt"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(REPORT)
    tables(folder, rows, rows)


def tables(folder, metadata, split):
    write_gz(
        folder / "mimic-cxr-2.0.0-metadata.csv.gz",
        METADATA,
        [{k: v for k, v in row.items() if k != "split"} for row in metadata],
    )
    columns = ["dicom_id", "study_id", "subject_id", "split"]
    rows = [{k: row[k] for k in columns} for row in split]
    write_gz(folder / "mimic-cxr-2.0.0-split.csv.gz", columns, rows)


def everything(source):
    return list(source.read(0, len(source)))


def test_prompt_splits_and_extras(tmp_path):
    rows = [
        row_of(0),
        row_of(1, 10000030, 50000000, "LATERAL"),
        row_of(2, split="validate"),
        row_of(3, split="test", view=""),
        row_of(4, 19000001, view="PA"),
    ]
    mimic(tmp_path, rows)
    source = open_source(tmp_path)
    assert (source.split, source.splits) == ("train", ("train", "val", "test"))
    records = everything(source)
    assert [r.text for r in records] == [
        f"{view} view chest x-ray image, {IMPRESSION}" for view in ("AP", "LATERAL", "PA")
    ]
    assert [r.id for r in records] == [rows[i]["dicom_id"] for i in (0, 1, 4)]
    assert records[1].extra == {"view": "LATERAL", "patient": "10000030", "study": "50000000"}
    assert load_rgb(records[2].image).getpixel((0, 0))[0] == pytest.approx(80, abs=2)
    assert list(source.read(1, 2)) == records[1:2]
    assert source.groups == [f"group {subject}" for subject in (10000030, 10000030, 19000001)]
    (test,) = everything(open_source(tmp_path, split="test"))
    assert test.text == f"chest x-ray image, {IMPRESSION}"
    assert test.extra["view"] is None
    (finding,) = everything(open_source(tmp_path, split="val", text_column="findings"))
    assert finding.text == "AP view chest x-ray image, The lungs are clear. Heart size is normal."
    with pytest.raises(ValueError, match=r"no column 'labels'.*impression, findings"):
        open_source(tmp_path, text_column="labels")


def test_priors_and_reports_elsewhere(tmp_path):
    mimic(tmp_path / "jpg", [row_of(0)], reports=tmp_path / "cxr")
    with pytest.raises(ValueError, match="one of kept, removed"):
        open_source(f"{tmp_path}/jpg?priors=no")
    (record,) = everything(open_source(f"{tmp_path}/jpg?priors=removed&reports={tmp_path}/cxr"))
    assert record.text == "AP view chest x-ray image, 1. No pneumonia. 2. Small effusion."
    (reject,) = everything(open_source(tmp_path / "jpg"))
    assert "missing report" in reject.reason


def test_a_template_of_ones_own(tmp_path):
    mimic(tmp_path, [row_of(0), row_of(1, view="")])
    reading = Reading(caption_template="{text} Seen from {view}.")
    kept, left = reading.open(f"{tmp_path}?prompt=none", None).read(0, 2)
    assert kept.text == f"{IMPRESSION} Seen from AP."
    assert left.reason == "the caption template needs view, which is missing"


def test_bad_rows(tmp_path):
    rows = [row_of(i) for i in range(7)]
    mimic(tmp_path, rows)
    patient = tmp_path / "files/p10"
    (patient / "p10000031/s50000001.txt").write_text(" FINAL REPORT\n FINDINGS: clear.\n")
    (patient / "p10000032/s50000002.txt").write_bytes(b" IMPRESSION: \xff\xfe")
    strange = {**rows[3], "dicom_id": "../../x"}
    elsewhere = {**rows[4], "study_id": "50009999"}
    tables(
        tmp_path, [*rows[:3], strange, rows[4], rows[6]], [*rows[:3], strange, elsewhere, rows[5]]
    )
    items = everything(open_source(tmp_path))
    assert isinstance(items[0], Record)
    expected = ["no section", "not valid UTF-8", "is not one", "disagree", "not in the metadata"]
    expected += ["in no split"]
    assert [i.row for i in items] == list(range(7))
    for item, part in zip(items[1:], expected, strict=True):
        assert isinstance(item, Reject)
        assert part in item.reason


def test_a_patient_in_two_splits_and_damaged_tables(tmp_path):
    rows = [row_of(0), row_of(1, 10000030, split="test")]
    mimic(tmp_path, rows)
    with pytest.raises(ValueError, match="patient 10000030 is in train and in test"):
        open_source(tmp_path)
    path = tmp_path / "mimic-cxr-2.0.0-split.csv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    with pytest.raises(ValueError, match=r"split\.csv\.gz is damaged"):
        open_source(tmp_path)
    path.write_bytes(gzip.compress(b"dicom_id,split\n"))
    with pytest.raises(ValueError, match="no column subject_id, study_id"):
        open_source(tmp_path)


def test_sections():
    assert section(REPORT, "impression") == IMPRESSION
    assert section(REPORT, "findings") == "The lungs are clear. Heart size is normal."
    assert section("IMPRESSION: \n \n", "impression") is None
    assert section("no headings at all", "impression") is None
    twice = " WET READ: x\n IMPRESSION: first\n ADDENDUM: y\n IMPRESSION: AP chest: second.\n"
    assert section(twice, "impression") == "AP chest: second."
    assert section(" CONCLUSION:  fine\n NOTIFICATION:  told.", "impression") == "fine"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("No acute process.", "No acute process."),
        ("No significant interval change.", ""),
        ("1. No relevant change since ___. 2. Effusion on the left.", "2. Effusion on the left."),
        ("Compared to the prior radiograph, edema is worse.", "Edema is worse."),
        ("As compared to the previous radiograph, the tube is in place.", "The tube is in place."),
        ("Stable small left effusion.", "Small left effusion."),
        ("Interval placement of a line.", "Placement of a line."),
        ("Bibasilar opacities, unchanged.", "Bibasilar opacities."),
        ("Unchanged.", ""),
        ("No change since the prior study. Large pneumothorax.", "Large pneumothorax."),
        ("No change in the large left effusion.", "No change in the large left effusion."),
        ("Tube at T4. No change from ___.", "Tube at T4."),
        ("Heart size is normal. No change.", "Heart size is normal."),
    ],
)
def test_priors_removed(text, left):
    assert without_priors(text) == left
