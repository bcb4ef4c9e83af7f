"""DICOM: rescaled, windowed, MONOCHROME1 inverted; nothing but pixels leaves the file."""

import contextlib
import io
import sys

import numpy as np
import pytest
from PIL import Image

from arra.data.images import BadImage, load_rgb
from arra.data.sources import Record, open_source

pydicom = pytest.importorskip("pydicom")

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16  # 12 bits


def dicom(pixels=RAMP, kind="MONOCHROME2", bits=12, **elements):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"  # digital X-ray
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientName, data.PatientID = "Name^Made Up", "ID-made-up"
    data.add_new(0x00091001, "LO", "private words")
    data.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    data.PhotometricInterpretation = kind
    data.Rows, data.Columns = pixels.shape[:2]
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * pixels.itemsize, bits, bits - 1
    data.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    out = io.BytesIO()
    data.save_as(out, enforce_file_format=True)
    return out.getvalue()


def grey(data):
    pixels = np.asarray(load_rgb(data))
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0].astype(int)


def test_range_of_the_values_without_a_window():
    assert (grey(dicom()) == np.arange(256).reshape(16, 16)).all()
    padded = RAMP.copy()
    padded[0, 0] = 4095
    assert grey(dicom(padded, PixelPaddingValue=4095))[15, 15] == 255
    assert (grey(dicom(np.full((16, 16), 7, np.uint16))) == 0).all()


def test_monochrome1_is_inverted():
    assert (grey(dicom(kind="MONOCHROME1")) == 255 - np.arange(256).reshape(16, 16)).all()


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_after_rescaling_as_pydicom_does_it(function):
    from pydicom.pixels import apply_modality_lut, apply_windowing

    elements = {
        "RescaleSlope": "2",
        "RescaleIntercept": "-1024",
        "WindowCenter": ["1000", "5"],
        "WindowWidth": ["1500", "9"],
        "VOILUTFunction": function,
    }
    data = dicom(**elements)
    dataset = pydicom.dcmread(io.BytesIO(data))
    shown = apply_windowing(apply_modality_lut(RAMP, dataset), dataset)
    low, high = -1024, 2 * 4095 - 1024
    expected = 255 * (shown - low) / (high - low)
    assert abs(grey(data) - expected).max() <= 1


def test_signed_values_and_a_threshold():
    pixels = (np.arange(256, dtype=np.int16) - 128).reshape(16, 16)
    data = dicom(pixels, bits=16, WindowCenter="0.5", WindowWidth="1")
    assert (grey(data) == np.where(pixels > 0, 255, 0)).all()


def test_colour():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert (np.asarray(load_rgb(dicom(pixels, "RGB", 8))) == pixels).all()


def test_nothing_but_pixels_leaves_the_file():
    image = load_rgb(dicom())
    out = io.BytesIO()
    image.save(out, "PNG")
    assert not image.info
    assert b"made" not in out.getvalue().lower()
    assert b"private" not in out.getvalue().lower()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_is_a_bad_image():
    whole = dicom(WindowCenter="1000", WindowWidth="1500")
    for cut in range(132, len(whole) - 1, 7):
        with pytest.raises(BadImage):
            load_rgb(whole[:cut])
    random = np.random.default_rng(0)
    for _ in range(100):
        broken = bytearray(whole)
        for at in random.integers(132, 700, 3):
            broken[at] = random.integers(256)
        with contextlib.suppress(BadImage):
            assert load_rgb(bytes(broken)).mode == "RGB"
    with pytest.raises(BadImage, match="limit"):
        load_rgb(dicom(Rows=60000, Columns=60000))


def test_in_folders_with_captions(tmp_path):
    (tmp_path / "a.dcm").write_bytes(dicom())
    (tmp_path / "a.txt").write_text("an eye")
    (record,) = open_source(tmp_path).read(0, 1)
    assert isinstance(record, Record)
    assert record.text == "an eye"
    assert isinstance(load_rgb(record.image), Image.Image)


def test_without_pydicom_the_remedy_is_said(monkeypatch):
    data = dicom()
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"arra\[dicom\]") as caught:
        load_rgb(data)
    assert not isinstance(caught.value, BadImage)  # one sentence, not a reject for every row


def test_palette():
    table = np.arange(256, dtype=np.uint16) * 257
    colours = {}
    for name, values in (("Red", table), ("Green", table[::-1]), ("Blue", table * 0)):
        colours[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        colours[f"{name}PaletteColorLookupTableData"] = values.tobytes()
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    shown = np.asarray(load_rgb(dicom(pixels, "PALETTE COLOR", 8, **colours)))
    assert (shown[:, :, 0] == pixels).all()
    assert (shown[:, :, 1] == 255 - pixels).all()
    assert (shown[:, :, 2] == 0).all()
