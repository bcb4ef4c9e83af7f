"""Pictures from a stock server of language models, vLLM or SGLang, over its OpenAI-compatible API.

The server holds the exported `model/` and samples tokens; prompts, the image format and the pixels
are made here. What the format dictates (sizes, row ends) is never sampled: a format with row ends
is asked for row by row, and the server's prefix cache keeps that cheap.

No such server knows guidance: this is sampling at cfg = 1. docs/stock-servers.md.

Legend: N pictures, h and w codes per side.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from arra.config_json import from_json
from arra.data.images import to_pil
from arra.files import read_json
from arra.generate.pipeline import INSIDE, repetitions
from arra.generate.pixels import to_pixels
from arra.generate.settings import Sampling
from arra.image_tokenizers import load_image_tokenizer
from arra.integrations.completions import LIFT, Server
from arra.models.loading import PIPELINE, model_place, read_skeleton
from arra.models.served import MASKS_CODES_BEFORE, codes_are_tokens


class ServedPainter:
    """Paints prompts with a model that a stock server holds.

    Args:
        folder: the exported painter, whose `model/` the server was started with. Its weights are
            not read here.
        url, name, timeout: see `Server`.
        at_once: requests under way at the same time; the server batches them.

    Raises:
        ValueError: the model is of a kind that no such server can paint with, the image tokenizer
            is not the one it was trained with, or the server is not as it must be.
    """

    def __init__(
        self,
        folder: str | Path,
        url: str,
        name: str | None = None,
        *,
        device: str = "cpu",
        timeout: float = 600.0,
        at_once: int = 64,
    ) -> None:
        folder = model_place(folder)
        if not (folder / PIPELINE).is_file():
            raise ValueError(f"{folder} is no exported painter: it has no {PIPELINE}")
        described = read_json(folder / PIPELINE)
        family, text_tokenizer, layout, _ = read_skeleton(folder)
        with torch.device("meta"):  # for how prompts are worded: no weights
            self._words = family.assemble(
                family.empty_model(folder / "model"), text_tokenizer, layout
            )
        if not codes_are_tokens(self._words):
            raise ValueError(
                f"{folder} is a {type(self._words.model).__name__}, whose image codes are no "
                f"tokens of a text tokenizer: no stock server can paint with it (`arra generate` "
                f"does)"
            )
        self.server = Server(url, name, timeout)
        self._refuse_masks()
        self.layout = layout
        height, width = described["grid"]
        self.grid = (height, width)
        self.sampling = from_json(Sampling, described["sampling"])
        self.at_once = at_once
        recorded = described["image_tokenizer"]
        inside = folder / INSIDE
        spec = inside if inside.is_dir() else recorded["spec"]
        self.image_tokenizer = load_image_tokenizer(spec, device)
        if self.image_tokenizer.fingerprint != recorded["fingerprint"]:
            raise ValueError(f"{spec} is not the image tokenizer that {folder} was trained with")

    def _refuse_masks(self) -> None:
        architecture = type(self._words.model).__name__
        first = MASKS_CODES_BEFORE.get(architecture)
        if self.server.owner == "vllm" and first and self.server.version() < first:
            raise ValueError(
                f"{self.server.url} is a vLLM that masks the image codes of {architecture}: use "
                f"vLLM {'.'.join(map(str, first))} or newer"
            )

    def __call__(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> list[Image]:
        """One RGB picture per prompt, in the order of the prompts; see `codes`."""
        codes_Nhw = self.codes(prompts, seeds, temperature=temperature, top_k=top_k, top_p=top_p)
        return to_pil(to_pixels(self.image_tokenizer, codes_Nhw))

    def codes(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """The image codes of each prompt, (N, h, w) int64, sampled without guidance.

        Args:
            prompts: an empty one paints without a condition.
            seeds: one per prompt; by default the k-th repetition of a prompt has seed k, from 0.
                The server draws with its own generator: not the pictures that `Pipeline` has for
                these seeds, unless at temperature 0.
            temperature, top_k, top_p: see `Sampling`; default: the model's own.

        Raises:
            ValueError: the server refuses, gives too few codes, or something that is no code.
        """
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        if seeds is None:
            seeds = repetitions(listed)
        if len(seeds) != len(listed):
            raise ValueError(f"{len(listed)} prompts need as many seeds, got {len(seeds)}")
        sampling = self.sampling.with_changes(1.0, temperature, top_k, top_p)
        with ThreadPoolExecutor(self.at_once) as pool:
            painting = [
                pool.submit(self._paint, prompt, seed, sampling)
                for prompt, seed in zip(listed, seeds, strict=True)
            ]
            try:
                return torch.stack([picture.result() for picture in painting])
            except ValueError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _paint(self, prompt: str, seed: int, sampling: Sampling) -> Tensor:
        """The codes (h, w) of one picture: one request for each stretch of codes."""
        forced = self.layout.plan(*self.grid).forced_S.tolist()
        ids = self._words.condition(prompt, self.grid)
        longest = self.server.max_length
        if longest is not None and len(ids) + len(forced) > longest:
            raise ValueError(
                f"{self.server.url} takes {longest} tokens, a picture with its prompt needs "
                f"{len(ids) + len(forced)}: start it with a larger --max-model-len"
            )
        painted: list[int] = []
        stretches = 0
        step = 0
        while step < len(forced):
            if forced[step] >= 0:
                ids.append(forced[step])
                step += 1
                continue
            end = step
            while end < len(forced) and forced[end] < 0:
                end += 1
            # A seed of its own for each stretch: with one seed, all rows would be drawn alike.
            got = self._ask(ids, end - step, seed * len(forced) + stretches, sampling)
            ids, painted = ids + got, painted + got
            stretches, step = stretches + 1, end
        return self.layout.ids_to_codes(torch.tensor(painted)).view(*self.grid)

    def _ask(self, ids: list[int], count: int, seed: int, sampling: Sampling) -> list[int]:
        """`count` ids of codes that follow `ids`."""
        dialect = self.server.dialect
        codes = self.layout.code_ids
        request: dict[str, Any] = {
            "prompt": ids,
            "max_tokens": count,
            "seed": seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or dialect.every_code,
            "top_p": sampling.top_p,
            # Said, so that a server's own defaults do not come in.
            **{"min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True},
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        if dialect.allows_ids:
            request["allowed_token_ids"] = codes
            request["spaces_between_special_tokens"] = False
        else:
            request["logit_bias"] = dict.fromkeys(map(str, codes), LIFT)
        choice = self.server.complete(request)
        got = choice.get("token_ids")
        if not isinstance(got, list):
            raise ValueError(
                f"{self.server.url} does not say the ids of tokens: use a newer version"
            )
        known = set(codes)
        strange = [token for token in got if token not in known]
        if strange or not self._names(got, choice.get("text")):
            said = str(choice.get("text")) or str(strange)
            raise ValueError(
                f"{self.server.url} answered {said[:60]!r} where image codes belong: it serves "
                f"another model, or does not keep to the tokens that it is allowed"
            )
        if len(got) != count:
            raise ValueError(
                f"{self.server.url} gave {len(got)} of {count} codes (finished by "
                f"{choice.get('finish_reason')!r}): its limit of tokens is too low "
                f"(max_new_tokens in generation_config.json, --max-model-len)"
            )
        return got

    def _names(self, ids: list[int], text: Any) -> bool:
        """Whether the server's tokenizer calls these ids what ours does: another painter's ids may
        be codes as well, and would make a picture of noise."""
        tokenizer = self._words.text_tokenizer
        assert tokenizer is not None
        ours = "".join(tokenizer.convert_ids_to_tokens(ids))
        return "".join(str(text).split()) == "".join(ours.split())
