"""The second stage of prepare: a batch of pictures to rows of codes and features, on the device.

Legend: N images, D feature width, n tokens of a caption, h and w code rows and columns, p stored
cells of a grid of patches, b bytes of a cell.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from arra.data.decode import Decoded
from arra.data.grid_column import GridFormat, bad_cells, coarsened
from arra.data.shard_file import Row, arrow_type, bad_feature, stored_name
from arra.data.sources import Reject
from arra.encoders import Encoder
from arra.encoders.text import TextEncoder
from arra.image_tokenizers.interface import ImageTokenizer


@dataclass(frozen=True)
class Models:
    """What every picture and caption goes through.

    Attributes:
        tokenizer: makes the codes.
        encoders: by feature name.
        text_encoders: of captions, by feature name.
        device: where they are.
        grid_dtype: how grids of patches are stored.
    """

    tokenizer: ImageTokenizer
    encoders: Mapping[str, Encoder]
    text_encoders: Mapping[str, TextEncoder]
    device: str
    grid_dtype: str = "float16"

    @property
    def dims(self) -> dict[str, int]:
        """D of every global feature."""
        return {name: e.dim for name, e in self.encoders.items() if not e.gives_grids}

    @cached_property
    def grids(self) -> dict[str, GridFormat]:
        """The encoders whose patches are stored."""
        return {
            name: GridFormat(encoder.dim, encoder.grid, self.grid_dtype)
            for name, encoder in self.encoders.items()
            if encoder.gives_grids
        }

    @property
    def text_dims(self) -> dict[str, int]:
        """D of every text feature."""
        return {name: encoder.dim for name, encoder in self.text_encoders.items()}

    def encode(self, batch: Sequence[Decoded]) -> list[Row | Reject]:
        """One row or reject per item, in order. All pictures of a batch have one shape.

        Views go through the models in batches of the same length. A row stands or falls with them.
        """
        return self.begin(batch).rows()

    def begin(self, batch: Sequence[Decoded]) -> "Begun":
        """The same in two steps: a GPU computes while the caller makes the next batch ready."""
        watch = _Watch(self.device)
        captions = [item.text for item in batch]
        texts = {name: encoder(captions) for name, encoder in self.text_encoders.items()}
        flat = [each for item in batch for each in (item, *item.views)]
        seen = [
            self._see(flat[start : start + len(batch)]) for start in range(0, len(flat), len(batch))
        ]
        watch.stop()
        return Begun(self, batch, texts, seen, watch)

    def _see(self, batch: Sequence[Decoded]) -> "_Seen":
        """Codes and features of pictures, on their way to main memory."""
        codes_Nhw = self.tokenizer.encode(self._placed([item.pixels_CHW for item in batch]))
        assert codes_Nhw.ndim == 3
        assert len(codes_Nhw) == len(batch)
        found: dict[str, torch.Tensor] = {}
        for name, encoder in self.encoders.items():
            value = encoder.pool(self._placed([item.seen[name] for item in batch]))
            value = self._feature(name, value, codes_Nhw)
            found[name] = value.to("cpu", non_blocking=True)
        return _Seen(batch, codes_Nhw.to("cpu", non_blocking=True), found)

    def _placed(self, pictures: list[torch.Tensor]) -> torch.Tensor:
        """Pictures as one tensor on the device, which nobody waits for."""
        if not self.device.startswith("cuda"):
            return torch.stack(pictures).to(self.device)
        shape, dtype = (len(pictures), *pictures[0].shape), pictures[0].dtype
        pinned = torch.empty(shape, dtype=dtype, pin_memory=True)
        return torch.stack(pictures, out=pinned).to(self.device, non_blocking=True)

    def _feature(self, name: str, value: torch.Tensor, codes_Nhw: torch.Tensor) -> torch.Tensor:
        """(N, D) float16 of a global feature, (N, p, D) float32 of a grid."""
        count, dim = len(codes_Nhw), self.encoders[name].dim
        if name not in self.grids:
            assert value.shape == (count, dim)
            return value.to(torch.float16)
        own = self.grids[name].grid
        assert value.shape == (count, own[0] * own[1], dim)
        height, width = codes_Nhw.shape[1:]
        return coarsened(value, own, (height, width))


@dataclass(frozen=True)
class _Seen:
    """What the models say of pictures, when the device is done."""

    batch: Sequence[Decoded]
    codes_Nhw: torch.Tensor
    found: Mapping[str, torch.Tensor]

    def rows(self, models: Models) -> Iterator[Row | Reject]:
        codes_Nhw = self.codes_Nhw.numpy()
        found = {name: value.numpy() for name, value in self.found.items()}
        for position, item in enumerate(self.batch):
            features = {name: found[name][position] for name in models.dims}
            cells = {name: found[name][position] for name in models.grids}
            reason = _bad_features(item, features, cells)
            if reason is None:
                grids = {name: models.grids[name].pack(each) for name, each in cells.items()}
                yield _row(item, codes_Nhw[position], features, grids)
            else:
                yield Reject(item.row, item.id, reason)


@dataclass(frozen=True)
class Begun:
    """A batch that the device may still be busy with."""

    models: Models
    batch: Sequence[Decoded]
    texts: Mapping[str, Sequence[torch.Tensor]]
    seen: Sequence[_Seen]
    watch: "_Watch"

    def rows(self) -> list[Row | Reject]:
        """Waits for the device; one row or reject per item of the batch, in order."""
        self.watch.wait()
        made = (row for seen in self.seen for row in seen.rows(self.models))
        done: list[Row | Reject] = []
        for position, item in enumerate(self.batch):
            texts_nD = {name: value[position].numpy() for name, value in self.texts.items()}
            reason = _bad_text(item, texts_nD)
            whole, *views = (next(made) for _ in range(1 + len(item.views)))
            bad = next((row.reason for row in (whole, *views) if isinstance(row, Reject)), reason)
            if bad is not None:
                done.append(Reject(item.row, item.id, bad))
                continue
            rows = [
                replace(row, text_features=texts_nD)
                for row in (whole, *views)
                if isinstance(row, Row)
            ]
            done.append(replace(rows[0], views=tuple(rows[1:])))
        return done

    @property
    def seconds(self) -> float:
        """How long the device was busy with it, once `rows` are there."""
        return self.watch.seconds()


class _Watch:
    """Times what a device does, by its own clock: a GPU works behind the caller's back."""

    def __init__(self, device: str) -> None:
        self._stream = torch.cuda.current_stream(device) if device.startswith("cuda") else None
        self._marks: list[torch.cuda.Event | float] = []
        self.stop()

    def stop(self) -> None:
        """What is begun from now on does not count."""
        if self._stream is None:
            self._marks.append(time.perf_counter())
        else:
            self._marks.append(self._stream.record_event(torch.cuda.Event(enable_timing=True)))

    def wait(self) -> None:
        """Until the device has done what counts."""
        last = self._marks[-1]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()

    def seconds(self) -> float:
        """Between start and stop; call `wait` before."""
        first, last = self._marks
        if isinstance(first, float) and isinstance(last, float):
            return last - first
        assert isinstance(first, torch.cuda.Event)
        assert isinstance(last, torch.cuda.Event)
        return first.elapsed_time(last) / 1000


def _bad_features(
    item: Decoded, features: Mapping[str, np.ndarray], cells: Mapping[str, np.ndarray]
) -> str | None:
    reasons = {name: bad_feature(feature_D) for name, feature_D in features.items()}
    reasons |= {name: bad_cells(cells_pD) for name, cells_pD in cells.items()}
    for name, reason in reasons.items():
        if reason is not None:
            view = f" of the view {item.id}" if item.view_of is not None else ""
            return f"feature {name!r}{view} is {reason} in float16"
    return None


def _bad_text(item: Decoded, texts_nD: Mapping[str, np.ndarray]) -> str | None:
    for name, text_nD in texts_nD.items():
        if not np.isfinite(text_nD).all():
            return f"text feature {name!r} is NaN or infinite in float16"
    index = item.extra.get("image_index")
    if isinstance(index, int) and not 0 <= index < 2**15:
        return f"image_index {index} is not between 0 and {2**15 - 1}"
    return None


def _row(
    item: Decoded,
    codes_hw: np.ndarray,
    features: Mapping[str, np.ndarray],
    grids: Mapping[str, np.ndarray],
) -> Row:
    sample, index = item.extra.get("sample"), item.extra.get("image_index")
    view = "" if item.view_of is None else item.id.removeprefix(item.view_of)  # "#flip"
    return Row(
        id=item.id,
        sample=item.id if sample is None else f"{sample}{view}",
        image_index=index if isinstance(index, int) else 0,
        text=item.text,
        codes_hw=codes_hw,
        features=features,
        extra=item.extra,
        grids=grids,
        view_of=item.view_of,
    )


def shard_columns(columns: Mapping[str, type]) -> dict[str, type]:
    """A source's extra columns as a shard stores them; `sample` and `image_index` are the format's
    own, by which a source says that several rows belong together."""
    taken = {"sample"} | ({"image_index"} if columns.get("image_index") is int else set())
    return {name: kind for name, kind in columns.items() if name not in taken}


def manifest_columns(columns: Mapping[str, type]) -> dict[str, Any]:
    """Names and types of extra columns as the manifest lists them."""
    return {stored_name(n): str(arrow_type(k)) for n, k in shard_columns(columns).items()}
