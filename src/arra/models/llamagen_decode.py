"""LlamaGen's decode step on a CPU, in one call of C++ or in as few of PyTorch's as there can be.

With two rows a step is done in 8 ms of oneDNN's products; in the layers as they are written for
training (llamagen_layers.py) PyTorch's calls and copies take as long again. What they compute is
meant here too: tests compare them.

Legend: R rows, T tokens, N = R x T (rows of zeros up to `LEAST_ROWS`), C columns, D model width,
H heads, J heads of keys, w a head's width, P = w / 2 pairs, A = R x J.
"""

from collections.abc import Mapping
from ctypes import c_void_p
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arra.models.decoding import Packed, PackedLinear, at_least
from arra.models.llamagen_layers import Block
from arra.models.llamagen_model import LlamaGenForImageGeneration, rotations
from arra.models.native import WIDEST_HEAD, Layer, Model, NativeLinear, Pass, library
from arra.models.quantized import SmallLinear
from arra.models.row_cache import RowCache


class NativeStep:
    """Goes on with all rows of a cache, in C++ and bfloat16.

    Args:
        packed: by layer; all linear layers of the blocks are there.
    """

    def __init__(
        self, model: LlamaGenForImageGeneration, packed: Mapping[nn.Module, NativeLinear]
    ) -> None:
        self.model, self.packed = model, packed
        config, blocks = model.config, [_block(each) for each in model.layers]
        cos_CP, sin_CP = (table[0, 0] for table in _turns(model))
        self._turns_CP2 = torch.stack([cos_CP, sin_CP], dim=-1)
        layers = [
            Layer(
                block.attention_norm.weight.data_ptr(),
                block.ffn_norm.weight.data_ptr(),
                *(packed[linear].matrix for linear in _linears(block)),
            )
            for block in blocks
        ]
        self._model = Model(
            (Layer * len(layers))(*layers),
            model.norm.weight.data_ptr(),
            self._turns_CP2.data_ptr(),
            len(layers),
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads or config.num_attention_heads,
            config.hidden_size // config.num_attention_heads,
            config.rms_norm_eps,
        )

    def __call__(self, ids_RT: Tensor, positions_RT: Tensor, cache: RowCache) -> Tensor:
        """Final hidden states (R, T, D) of codes at these positions."""
        x_RTD = self.model.tok_embeddings(ids_RT)  # replaced by what is made of it
        positions_RT, hidden_RC = positions_RT.contiguous(), cache.hidden_RC
        layers: list[Any] = cache.layers
        tables = c_void_p * len(layers)
        loaded = library()
        assert loaded is not None
        loaded.step(
            self._model,
            Pass(
                x_RTD.data_ptr(),
                positions_RT.data_ptr(),
                None if hidden_RC is None else hidden_RC.data_ptr(),
                tables(*(kept.keys.data_ptr() for kept in layers)),
                tables(*(kept.values.data_ptr() for kept in layers)),
                *positions_RT.shape,
                cache.columns,
                torch.get_num_threads(),
            ),
        )
        return x_RTD


class DecodeStep:
    """Goes on with all rows of a cache, by PyTorch.

    Args:
        packed: by layer; all linear layers of the blocks are there.
    """

    def __init__(
        self,
        model: LlamaGenForImageGeneration,
        packed: Mapping[nn.Module, PackedLinear | SmallLinear],
    ) -> None:
        self.model, self.packed = model, packed
        config = model.config
        self.heads = config.num_attention_heads
        self.key_heads = config.num_key_value_heads or self.heads
        self.width = config.hidden_size // self.heads
        self._turns_CP = torch.complex(*_turns(model))[0, 0]

    def __call__(self, ids_RT: Tensor, positions_RT: Tensor, cache: RowCache) -> Tensor:
        """Final hidden states (R, T, D) of codes at these positions."""
        embedded_RTD = self.model.tok_embeddings(ids_RT)
        place = _Place(self, positions_RT, cache, embedded_RTD.dtype)
        x_ND = at_least(embedded_RTD.flatten(0, 1))
        for block, kept in zip(self.model.layers, cache.layers, strict=True):
            x_ND = self._block(block, x_ND, place, kept)
        x_ND = _norm(self.model.norm, x_ND)
        return x_ND[: ids_RT.numel()].view(embedded_RTD.shape)

    def _block(self, block: Any, x_ND: Tensor, place: "_Place", kept: Any) -> Tensor:
        attention, mlp, packed = block.attention, block.feed_forward, self.packed
        heads_ND = packed[attention.wqkv].of_rows(_norm(block.attention_norm, x_ND))
        mixed_ND = at_least(self._mixed(heads_ND[: place.tokens], place, kept))
        x_ND = packed[attention.wo].joined(mixed_ND, x_ND, "add")
        unit_ND = _norm(block.ffn_norm, x_ND)
        gate_NF = packed[mlp.w1].of_rows(unit_ND, then="swish")
        inside_NF = packed[mlp.w3].joined(unit_ND, gate_NF, "mul")
        return packed[mlp.w2].joined(inside_NF, x_ND, "add")

    def _mixed(self, heads_ND: Tensor, place: "_Place", kept: Any) -> Tensor:
        """Turns queries and keys, keeps keys and values, attends: (N, D)."""
        rows, tokens = place.shape
        heads, key_heads, width = self.heads, self.key_heads, self.width
        heads_NHw = heads_ND.view(len(heads_ND), -1, width)
        turned, value_NJw = heads_NHw.split([heads + key_heads, key_heads], dim=1)
        pairs = turned.to(place.turns_N1P.real.dtype, copy=True).unflatten(-1, (-1, 2))
        pairs = torch.view_as_complex(pairs.contiguous()).mul_(place.turns_N1P)
        turned = torch.view_as_real(pairs).flatten(-2).to(value_NJw.dtype)
        query_NHw, key_NJw = turned.split([heads, key_heads], dim=1)
        for table, fresh in ((kept.keys, key_NJw), (kept.values, value_NJw)):
            table.view(-1, width).index_copy_(0, place.entries, fresh.reshape(-1, width))
        key_ACw, value_ACw = (table[:rows].flatten(0, 1) for table in (kept.keys, kept.values))
        # The queries that share a key's head stand in one product: (A, H / J x T, w).
        query = query_NHw.view(rows, tokens, key_heads, -1, width).permute(0, 2, 3, 1, 4)
        scores = torch.bmm(query.reshape(len(key_ACw), -1, width), key_ACw.transpose(1, 2))
        weights = torch.add(place.mask, scores, alpha=width**-0.5).softmax(-1)
        mixed = torch.bmm(weights, value_ACw).view(rows, key_heads, -1, tokens, width)
        return mixed.permute(0, 3, 1, 2, 4).reshape(rows * tokens, -1)


class _Place:
    """Where the tokens of one step stand; the same for all layers."""

    def __init__(
        self, step: DecodeStep, positions_RT: Tensor, cache: RowCache, dtype: torch.dtype
    ) -> None:
        rows, tokens = self.shape = positions_RT.shape
        self.tokens = rows * tokens
        self.turns_N1P = step._turns_CP[positions_RT.flatten()][:, None]
        group, columns = step.heads // step.key_heads, cache.columns
        hidden_RTC = ~cache.seen(positions_RT)
        mask_RTC = torch.zeros(hidden_RTC.shape, dtype=dtype).masked_fill_(hidden_RTC, -torch.inf)
        several = mask_RTC[:, None, None].expand(-1, step.key_heads, group, -1, -1)
        self.mask = several.reshape(rows * step.key_heads, group * tokens, columns)
        # Of the cache as a list of heads' keys: (R, J, C, w), flat but for the last.
        head_RJ = torch.arange(rows * step.key_heads).view(rows, -1)
        self.entries = (head_RJ[:, None] * columns + positions_RT[..., None]).flatten()


def _norm(norm: Any, x_ND: Tensor) -> Tensor:
    return F.rms_norm(x_ND, norm.weight.shape, norm.weight, norm.eps)


def decode_step(
    model: LlamaGenForImageGeneration, packed: Mapping[nn.Module, Packed | SmallLinear]
) -> NativeStep | DecodeStep | None:
    """None where a layer is not packed: the model's own `forward` then takes the step."""
    linears = [linear for block in model.layers for linear in _linears(_block(block))]
    native = {m: each for m in linears if isinstance(each := packed.get(m), NativeLinear)}
    width = model.config.hidden_size // model.config.num_attention_heads
    if len(native) == len(linears) and width <= WIDEST_HEAD:
        return NativeStep(model, native)
    others = {m: each for m, each in packed.items() if not isinstance(each, NativeLinear)}
    return DecodeStep(model, others) if all(m in others for m in linears) else None


def _block(module: nn.Module) -> Block:
    assert isinstance(module, Block)
    return module


def _linears(block: Block) -> list[nn.Module]:
    """In the order of native.py's `Layer`."""
    attention, mlp = block.attention, block.feed_forward
    return [attention.wqkv, attention.wo, mlp.w1, mlp.w3, mlp.w2]


def _turns(model: LlamaGenForImageGeneration) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, 1, C, P) of all positions that a picture takes."""
    config = model.config
    places_1C = torch.arange(config.prefix() + config.grid_height * config.grid_width)[None]
    return rotations(config, places_1C, model.dtype)
