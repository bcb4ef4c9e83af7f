"""Text towers in open_clip's own format, beside the vision towers of open_clip.py.

Two kinds (mlfoundations/open_clip 89fb801, model.py, `_build_text_tower`):

- a BERT with a projection (hf_model.py, class HFTextEncoder): BioMedCLIP's PubMedBERT. Its sizes
  are those of its weights; of its config only what the weights do not say is assumed, which is
  BERT's own: 64 values a head, GELU, an epsilon of 1e-12, padding id 0.
- open_clip's own (transformer.py, class TextTransformer): OpenAI's CLIP. It becomes transformers'.

Legend: N captions, T tokens, d hidden width, D width of the space shared with images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModelWithProjection

from arra.encoders.loading import from_tensors
from arra.encoders.open_clip import CONFIG, depth_of, in_transformers, weights_of
from arra.files import read_json
from arra.foreign import read_foreign

ReadText = Callable[[Any, Tensor, Tensor], Tensor]
"""(model, ids (N, T), mask (N, T)) -> embeddings (N, D) in the space shared with images."""

_LENGTH = 77
"""Tokens of a caption where the file does not say (class CLIPTextCfg)."""
_BERT_HEAD = 64
_POOLERS = ("cls_pooler", "cls_last_hidden_state_pooler", "mean_pooler")
_KNOWN_BERT = {
    *("hf_model_name", "hf_tokenizer_name", "hf_model_pretrained", "hf_proj_type"),
    *("hf_pooler_type", "context_length", "vocab_size", "width"),
}
_KNOWN_OWN = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_NAMES = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}


@dataclass(frozen=True)
class TextTower:
    """A text tower.

    Attributes:
        name: as errors call it.
        model: with every weight loaded.
        read: its embeddings.
        length: the most tokens of a caption.
        full: every caption is padded to `length`, as it was in training.
        cleaned: white space and HTML entities are cleaned first, as open_clip does.
        bert: its tokenizer must be BERT's.
    """

    name: str
    model: Any
    read: ReadText
    length: int
    full: bool = False
    cleaned: bool = False
    bert: bool = False


class ProjectedBert(nn.Module):
    """transformers' BERT, pooled and projected."""

    def __init__(self, trunk: BertModel, projection: nn.Module, pooler: str) -> None:
        super().__init__()
        self.trunk, self.projection, self.pooler = trunk, projection, pooler

    def forward(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """Embeddings (N, D)."""
        output = self.trunk(input_ids=ids_NT, attention_mask=mask_NT)
        hidden_NTd = output.last_hidden_state
        if self.pooler == "mean_pooler":
            shown_NT1 = mask_NT.unsqueeze(-1)
            pooled_Nd = (hidden_NTd * shown_NT1).sum(dim=1) / shown_NT1.sum(dim=1)
        else:
            pooled_Nd = hidden_NTd[:, 0] if output.pooler_output is None else output.pooler_output
        return self.projection(pooled_Nd)


def open_text_tower(folder: Path) -> TextTower:
    """The text tower of an open_clip folder, in float32.

    Raises:
        ValueError: no weights, weights that do not fit, or a tower of another kind.
    """
    model_cfg = read_json(folder / CONFIG).get("model_cfg") or {}
    text = model_cfg.get("text_cfg") or {}
    bert = bool(text.get("hf_model_name"))
    unknown = sorted(set(text) - (_KNOWN_BERT if bert else _KNOWN_OWN))
    if unknown:
        raise ValueError(
            f"encoder {folder}: {CONFIG} sets {', '.join(unknown)} for its text tower, which is "
            f"not supported"
        )
    tensors = {
        name.removeprefix("text."): tensor.float()
        for name, tensor in read_foreign(weights_of(folder)).tensors.items()
        if not name.startswith("visual.") and name not in ("logit_scale", "logit_bias")
    }
    return _open_bert(text, tensors, folder) if bert else _open_own(model_cfg, tensors, folder)


def _shape(tensors: dict[str, Tensor], name: str, folder: Path) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"encoder {folder} lacks text.{name}: it has no such text tower")
    return tuple(tensors[name].shape)


# ---- BERT ----------------------------------------------------------------------------------------


def _open_bert(text: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> TextTower:
    # What the file leaves out is open_clip's default (class CLIPTextCfg). null is BERT's own way,
    # the last hidden state of [CLS]: open_clip builds the pooling layer for cls_pooler alone.
    pooler = text.get("hf_pooler_type", "mean_pooler") or "cls_last_hidden_state_pooler"
    if pooler not in _POOLERS:
        raise ValueError(
            f"encoder {folder}: hf_pooler_type {pooler!r} is not supported; there is "
            f"{', '.join(_POOLERS)}"
        )
    prefix, proj = "transformer.", "proj."
    trunk = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    trunk.pop("embeddings.position_ids", None)  # a buffer that older checkpoints hold
    head = {k.removeprefix(proj): v for k, v in tensors.items() if k.startswith(proj)}
    vocabulary, width = _shape(trunk, "embeddings.word_embeddings.weight", folder)
    positions, _ = _shape(trunk, "embeddings.position_embeddings.weight", folder)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth_of(trunk, "layer"),
        num_attention_heads=width // _BERT_HEAD,
        intermediate_size=_shape(trunk, "encoder.layer.0.intermediate.dense.weight", folder)[0],
        max_position_embeddings=positions,
        type_vocab_size=_shape(trunk, "embeddings.token_type_embeddings.weight", folder)[0],
    )
    pooling = {"add_pooling_layer": pooler == "cls_pooler"}
    model = from_tensors(BertModel, config, trunk, folder, pooling)
    length = min(int(text.get("context_length", _LENGTH)), positions)
    whole = ProjectedBert(model, _projection(text.get("hf_proj_type", "mlp"), head, folder), pooler)
    return TextTower(
        "open_clip BERT",
        whole,
        lambda bert, ids_NT, mask_NT: bert(ids_NT, mask_NT),
        length,
        cleaned=True,
        bert=True,
    )


def _projection(kind: str | None, head: dict[str, Tensor], folder: Path) -> nn.Module:
    """none, one linear layer, or two with a GELU between them; none has a bias."""
    names = {None: [], "linear": ["weight"], "mlp": ["0.weight", "2.weight"]}
    if kind not in names or sorted(head) != names[kind]:
        raise ValueError(
            f"encoder {folder}: hf_proj_type {kind!r} with the tensors "
            f"{', '.join(f'text.proj.{name}' for name in sorted(head)) or 'none'} is not "
            f"supported: 'linear' and 'mlp' are"
        )
    layers: list[nn.Module] = []
    for name in names[kind]:
        out, into = head[name].shape
        linear = nn.Linear(into, out, bias=False)
        linear.load_state_dict({"weight": head[name]})
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1])


# ---- open_clip's own -----------------------------------------------------------------------------


def _open_own(model_cfg: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> TextTower:
    text = model_cfg.get("text_cfg") or {}
    causal_mask = "attn_mask"  # a buffer
    found, strange = in_transformers(
        {key: tensor for key, tensor in tensors.items() if key != causal_mask},
        _NAMES,
        "text_model.encoder.layers",
        ("text_projection", "text_projection"),
    )
    if strange:
        raise ValueError(
            f"encoder {folder}: its text tower has {len(strange)} tensors that CLIP's has not, "
            f"{strange[0]} among them: it is of a kind that is not supported"
        )
    vocabulary, width = _shape(tensors, "token_embedding.weight", folder)
    length = _shape(tensors, "positional_embedding", folder)[0]
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth_of(tensors, "resblocks"),
        num_attention_heads=int(text.get("heads", 8)),
        intermediate_size=_shape(tensors, "transformer.resblocks.0.mlp.c_fc.weight", folder)[0],
        max_position_embeddings=length,
        projection_dim=_shape(tensors, "text_projection", folder)[1],
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        layer_norm_eps=1e-5,
        eos_token_id=2,  # what makes transformers take the highest id's position, as open_clip does
    )
    model = from_tensors(CLIPTextModelWithProjection, config, found, folder, {})
    return TextTower("open_clip CLIP", model, read_clip_text, length, cleaned=True)


def read_clip_text(model: Any, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The projected end token of transformers' CLIP."""
    return model(input_ids=ids_NT, attention_mask=mask_NT).text_embeds
