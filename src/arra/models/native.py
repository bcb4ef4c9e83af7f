"""Products, steps (native.cpp) and draws (native_draw.cpp) in C++, for bfloat16 on a CPU that
multiplies it (AVX-512 BF16).

The source is compiled when it is first needed, by the compiler that `torch.compile` needs too, and
kept in the user's cache. Where there is none, a warning says so, and oneDNN makes the products:
painting is then slower and rounds differently, and is the same otherwise.

Legend: N rows, D inputs, W = D / 2 words, E outputs, G groups of outputs.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arra.device import in_large_pages

SOURCES = tuple(Path(__file__).with_name(f"native{part}.cpp") for part in ("", "_draw"))
HEADER = Path(__file__).with_name("native_vectors.h")
INSTRUCTIONS = ("f", "bw", "vl", "bf16")
"""Parts of AVX-512; a processor that has the last has them all."""
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", *(f"-mavx512{part}" for part in INSTRUCTIONS))
GROUP = 32
"""Outputs that are packed together."""
WIDEST_HEAD = 128
"""Of attention in a step."""


# ---- structures of the sources -------------------------------------------------------------------


class Matrix(ctypes.Structure):
    _fields_ = (
        ("words", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        *((name, Matrix) for name in ("qkv", "out", "gate", "up", "down")),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("norm", c_void_p),
        ("turns", c_void_p),
        *((name, c_int64) for name in ("depth", "width", "heads", "key_heads", "head_width")),
        ("epsilon", c_double),
    )


class Pass(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("x", "columns", "hidden")),
        *((name, POINTER(c_void_p)) for name in ("keys", "values")),
        *((name, c_int64) for name in ("rows", "tokens", "capacity", "threads")),
    )


class Draw(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("logits", "given", "code_ids", "leader", "partner")),
        *((name, c_void_p) for name in ("active", "temperature", "forced", "uniform", "scale")),
        *((name, c_void_p) for name in ("step", "token", "drawn", "finite")),
        *((name, c_int64) for name in ("rows", "steps", "width", "first", "codes", "threads")),
    )


# ---- the library ---------------------------------------------------------------------------------


def serves(weight: Tensor) -> bool:
    """Whether products with this weight (E, D) are made here."""
    weight = weight.data  # of a parameter
    plain = type(weight) is Tensor and weight.device.type == "cpu" and weight.shape[1] % 2 == 0
    return plain and weight.dtype == torch.bfloat16 and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled source; None: not for this processor, or it cannot be compiled."""
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(
            f"painting in bfloat16 on this CPU could be two to three times as fast with a C++ "
            f"compiler that knows it (g++ 11 or newer; CXX names another): {said.strip()[:300]}",
            stacklevel=2,
        )
        return None
    loaded.product.argtypes = (POINTER(Matrix), c_void_p, c_void_p, c_int64, c_int64)
    loaded.step.argtypes = (POINTER(Model), POINTER(Pass))
    loaded.draw.argtypes = (POINTER(Draw),)
    loaded.product.restype = loaded.step.restype = loaded.draw.restype = None
    return loaded


def _compiled() -> Path:
    """The shared library, from the user's cache if this source was compiled before."""
    compiler = os.environ.get("CXX", "c++")
    texts = (path.read_text(encoding="utf-8") for path in (*SOURCES, HEADER))
    made_of = "\0".join((*texts, compiler, *FLAGS))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arra"
    library = root / f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:  # others may compile it now, too
            unlinked = [str(Path(folder, f"{source.stem}.o")) for source in SOURCES]
            linked = Path(folder, "native.so")
            # Linked without OpenMP: its calls then go to the threads that PyTorch has, which are
            # awake. A second pool of threads would fight with them for the cores.
            for command in (
                *(
                    (compiler, *FLAGS, "-c", str(source), "-o", made)
                    for source, made in zip(SOURCES, unlinked, strict=True)
                ),
                (compiler, "-shared", *unlinked, "-o", str(linked)),
            ):
                subprocess.run(command, check=True, capture_output=True, text=True)
            linked.replace(library)
    return library


# ---- a product -----------------------------------------------------------------------------------


def packed(layers: Sequence[nn.Linear]) -> "list[NativeLinear]":
    """The layers' products, whose weights follow each other in memory."""
    words = [-(-layer.out_features // GROUP) * GROUP * layer.in_features // 2 for layer in layers]
    memory = in_large_pages(max(sum(words), 1), torch.int32)[: sum(words)]
    parts = memory.split(words)
    return [NativeLinear(layer, part) for layer, part in zip(layers, parts, strict=True)]


class NativeLinear:
    """A linear layer's product with its weight in the order of native.cpp, as the weight is now.

    Args:
        words: where it is put, int32.
    """

    def __init__(self, layer: nn.Linear, words: Tensor) -> None:
        self.layer = layer
        weight_ED = layer.weight.detach()
        outputs, inputs = weight_ED.shape
        words_EW = weight_ED.contiguous().view(torch.int32)  # two inputs each
        grouped_GEW = F.pad(words_EW, (0, 0, 0, -outputs % GROUP)).unflatten(0, (-1, GROUP))
        self._words_GWE = words.view(-1, inputs // 2, GROUP).copy_(grouped_GEW.transpose(1, 2))
        self._bias_E = None if layer.bias is None else layer.bias.detach().contiguous()
        bias = None if self._bias_E is None else self._bias_E.data_ptr()
        self.matrix = Matrix(self._words_GWE.data_ptr(), bias, inputs, outputs)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's `forward`: (..., D) to (..., E)."""
        if torch.compiler.is_compiling():
            return F.linear(x, self.layer.weight, self.layer.bias)
        assert x.dtype == torch.bfloat16
        x = x.contiguous()
        made = x.new_empty(*x.shape[:-1], self.matrix.outputs)
        loaded, rows = library(), x.numel() // x.shape[-1]
        assert loaded is not None
        loaded.product(self.matrix, x.data_ptr(), made.data_ptr(), rows, torch.get_num_threads())
        return made
