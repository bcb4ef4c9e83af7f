"""Pictures judged straight from the model that paints them, with no files in between.

A prompt that occurs again (captions of real images do) goes on with the seeds behind those that it
had, else it would be the same picture: real images of one caption differ.

A picture is a function of prompt, seed and settings, so one that is asked for again is painted
again, and is the same one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from PIL.Image import Image

from arra.data.progress import Meter
from arra.evaluate.image_set import Picture, digest_of, hash_of, hash_of_texts, key_of
from arra.generate.pictures import open_painter, settings_of
from arra.generate.settings import GenerateConfig

KEPT_BYTES = 512 * 2**20
"""Pixels that are kept for a second look; beyond that, pictures are painted again."""


class PaintedSet:
    """What a model paints of some prompts. The set's hash is known when all were painted once.

    Args:
        config: model, sampling, `num` pictures a prompt with the seeds `seed`, `seed` + 1, ...;
            where it occurs for the k-th time `seed` + (k - 1) `num`, ...
        prompts: in the place of the config's own.

    Attributes:
        settings: everything but the prompts that decides the pictures.
    """

    def __init__(self, config: GenerateConfig, prompts: Sequence[str]) -> None:
        self.source, self.config = config.model, config
        self._pipe, self._sampling = open_painter(config)
        self._asked: list[tuple[str, int]] = []
        again = Counter[str]()
        for prompt in prompts:
            first = config.seed + config.num * again[prompt]
            self._asked += [(prompt, first + j) for j in range(config.num)]
            again[prompt] += 1
        self.settings = settings_of(config, self._pipe, self._sampling, ())
        del self.settings["prompts"]
        self.names: Sequence[str] = [
            f"{number // config.num:05d}-{number % config.num}" for number in range(len(self))
        ]
        self.captions: Sequence[str] | None = [prompt for prompt, _ in self._asked]
        self.seeds: Sequence[int] | None = [seed for _, seed in self._asked]
        self.runs: Sequence[int] | None = [
            config.seed + number % config.num for number in range(len(self))
        ]
        self._digests: list[bytes | None] = [None] * len(self)
        self._sizes: set[tuple[int, int]] = set()
        self._kept: dict[int, Image] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._asked)

    def __iter__(self) -> Iterator[Picture]:
        with Meter("paint", len(self)) as meter:
            for index, image in self._painted(range(len(self))):
                meter.add(1)
                yield self._picture(index, image)

    def at(self, indices: Sequence[int]) -> list[Picture]:
        """The pictures with these numbers; those that were not kept are painted again."""
        found = {index: self._kept[index] for index in indices if index in self._kept}
        found |= self._painted([index for index in dict.fromkeys(indices) if index not in found])
        return [self._picture(index, found[index]) for index in indices]

    def described(self) -> dict[str, Any]:
        """See ImageSet."""
        digests = [digest for digest in self._digests if digest is not None]
        assert len(digests) == len(self), "a painter's pictures are described after they are seen"
        assert self.captions is not None
        return {
            "source": self.source,
            "split": None,
            "n": len(self),
            "sha256": hash_of(digests),
            "distinct": len(set(digests)),
            "sizes": [list(size) for size in sorted(self._sizes)],
            "captions_sha256": hash_of(digests, self.captions),
            "prompts_sha256": hash_of_texts(self.captions),
            "painted": self.settings,
        }

    @property
    def side(self) -> int:
        """Pixels of the shorter side, known before the first picture."""
        return min(self._pipe.grid) * self._pipe.image_tokenizer.factor

    def _painted(self, indices: Sequence[int]) -> Iterator[tuple[int, Image]]:
        prompts = [self._asked[index][0] for index in indices]
        seeds = [self._asked[index][1] for index in indices]
        requests = self._pipe.requests(prompts, seeds, self._sampling)
        for number, image in self._pipe.pictures(requests, self.config.slots):
            self._keep(indices[number], image)
            yield indices[number], image

    def _keep(self, index: int, image: Image) -> None:
        size = 3 * image.width * image.height
        if index not in self._kept and self._kept_bytes + size <= KEPT_BYTES:
            self._kept[index] = image
            self._kept_bytes += size

    def _picture(self, index: int, image: Image) -> Picture:
        digest = self._digests[index]
        if digest is None:
            digest = self._digests[index] = digest_of(image)
        self._sizes.add(image.size)
        assert self.runs is not None
        prompt, _ = self._asked[index]
        return Picture(index, self.names[index], image, prompt, self.runs[index], key_of(digest))
