"""Tiny CLIPs with weights by formula or at random, as folders: transformers' and open_clip's."""

import json
import re
from pathlib import Path

import torch
from formula import fill
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

WORDS = (
    *("a", "of", "the", "red", "blue", "green", "circle", "square", "left", "right", "chest"),
    *("x", "-", "ray", "view", "effusion", "and", "no"),
)
CAPTIONS = [
    "a red circle left of a blue square",
    "AP view chest x-ray,  no effusion &amp; no square",
    "the green green square and the circle right of the red circle and a blue square",
    "a view",
]
WIDTH, TEXT, PATCH, SIZE, EMBED, LENGTH = 128, 64, 8, 32, 12, 10
VOCABULARY = 48
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
BERT_CFG = {
    "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
    "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
    "hf_proj_type": "mlp",
    "hf_pooler_type": "cls_last_hidden_state_pooler",
    "context_length": LENGTH,
}
OWN_CFG = {
    "context_length": LENGTH,
    "vocab_size": VOCABULARY,
    "width": TEXT,
    "heads": 2,
    "layers": 2,
}
TIMM_CFG = {
    "timm_model_name": "vit_base_patch16_224",
    "timm_model_pretrained": False,
    "timm_pool": "",
    "timm_proj": "linear",
    "image_size": SIZE,
}


def bert_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, ",", "&", "ap"]
    return _tokenizer(words, "[CLS]", "[SEP]", "[PAD]", "[UNK]", "cls_token", "sep_token")


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """The end token has the highest id, as CLIP's has."""
    words = [*WORDS, ",", "&", "ap", "<unk>", "<s>", "</s>"]
    return _tokenizer(words, "<s>", "</s>", "</s>", "<unk>", "bos_token", "eos_token")


def _tokenizer(words, begin, end, pad, unknown, begin_name, end_name):
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, ids[begin]), (end, ids[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        model_max_length=LENGTH,
        **{begin_name: begin, end_name: end},
    )


def bert_shapes() -> dict[str, tuple[int, ...]]:
    at = "text.transformer.embeddings."
    shapes = {
        f"{at}word_embeddings.weight": (VOCABULARY, WIDTH),
        f"{at}position_embeddings.weight": (16, WIDTH),
        f"{at}token_type_embeddings.weight": (2, WIDTH),
        f"{at}LayerNorm.weight": (WIDTH,),
        f"{at}LayerNorm.bias": (WIDTH,),
        "text.proj.0.weight": ((WIDTH + EMBED) // 2, WIDTH),
        "text.proj.2.weight": (EMBED, (WIDTH + EMBED) // 2),
    }
    linears = {f"attention.self.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value")}
    linears |= {"attention.output.dense": (WIDTH, WIDTH), "intermediate.dense": (256, WIDTH)}
    linears |= {"output.dense": (WIDTH, 256)}
    for block in ("text.transformer.encoder.layer.0.", "text.transformer.encoder.layer.1."):
        for name, shape in linears.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{block}{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    return shapes


POOLING_LAYER = {
    "text.transformer.pooler.dense.weight": (WIDTH, WIDTH),
    "text.transformer.pooler.dense.bias": (WIDTH,),
}


def own_shapes() -> dict[str, tuple[int, ...]]:
    """Of open_clip's own text tower, at the top level as its class CLIP has them."""
    shapes = {
        "token_embedding.weight": (VOCABULARY, TEXT),
        "positional_embedding": (LENGTH, TEXT),
        "ln_final.weight": (TEXT,),
        "ln_final.bias": (TEXT,),
        "text_projection": (TEXT, EMBED),
    }
    for block in ("transformer.resblocks.0.", "transformer.resblocks.1."):
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * TEXT, TEXT),
            f"{block}attn.in_proj_bias": (3 * TEXT,),
            f"{block}attn.out_proj.weight": (TEXT, TEXT),
            f"{block}attn.out_proj.bias": (TEXT,),
            f"{block}mlp.c_fc.weight": (4 * TEXT, TEXT),
            f"{block}mlp.c_fc.bias": (4 * TEXT,),
            f"{block}mlp.c_proj.weight": (TEXT, 4 * TEXT),
            f"{block}mlp.c_proj.bias": (TEXT,),
        }
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.{leaf}": (TEXT,) for leaf in ("weight", "bias")}
    return shapes


def timm_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {
        "trunk.cls_token": (1, 1, WIDTH),
        "trunk.pos_embed": (1, 17, WIDTH),
        "trunk.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "trunk.patch_embed.proj.bias": (WIDTH,),
        "trunk.norm.weight": (WIDTH,),
        "trunk.norm.bias": (WIDTH,),
        "head.proj.weight": (EMBED, WIDTH),
    }
    outs = {"attn.qkv": 3 * WIDTH, "attn.proj": WIDTH, "mlp.fc1": 4 * WIDTH, "mlp.fc2": WIDTH}
    for norm in ("norm1", "norm2"):
        for leaf in ("weight", "bias"):
            shapes[f"trunk.blocks.0.{norm}.{leaf}"] = (WIDTH,)
    for name, out in outs.items():
        into = 4 * WIDTH if name == "mlp.fc2" else WIDTH
        shapes |= {f"trunk.blocks.0.{name}.weight": (out, into)}
        shapes |= {f"trunk.blocks.0.{name}.bias": (out,)}
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Large enough that captions differ well; gains of layer norms are around 1."""
    gain = re.compile(r"(ln_\w+|LayerNorm)\.weight$")
    return {
        name: fill(name, shape, 0.3) + (1.0 if gain.search(name) else 0.0)
        for name, shape in shapes.items()
    }


def open_clip_folder(folder: Path, shapes: dict[str, tuple[int, ...]], text_cfg: dict) -> Path:
    """As on the hub: a config, a pickle of named tensors, tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights(timm_shapes() | shapes) | {"logit_scale": torch.tensor(4.6)}
    torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    config = {
        "model_cfg": {"embed_dim": EMBED, "vision_cfg": TIMM_CFG, "text_cfg": text_cfg},
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    bert = "hf_model_name" in text_cfg
    (bert_tokenizer() if bert else clip_tokenizer()).save_pretrained(folder)
    return folder


def clip_folder(folder: Path, seed: int = 0) -> CLIPModel:
    """A tiny CLIP of transformers, at random; returns it."""
    tokenizer = clip_tokenizer()
    text = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "vocab_size": VOCABULARY},
        **{"max_position_embeddings": LENGTH, "bos_token_id": tokenizer.bos_token_id},
        **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    }
    vision = {
        **{"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "image_size": SIZE, "patch_size": PATCH},
    }
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED))
    return _saved(model.eval(), folder, "CLIPImageProcessor", {"shortest_edge": SIZE})


def siglip_folder(folder: Path, seed: int = 0) -> SiglipModel:
    """A tiny SigLIP of transformers, at random; returns it."""
    common = {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        "num_attention_heads": 2,
    }
    text = {**common, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    vision = {**common, "image_size": SIZE, "patch_size": PATCH}
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    size = {"height": SIZE, "width": SIZE}
    return _saved(model.eval(), folder, "SiglipImageProcessor", size)


def _saved(model, folder, processor, size):
    with torch.no_grad():  # initial weights are so small that all embeddings look alike
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                tensor.copy_(fill(name, tuple(tensor.shape), 0.2))
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    config = {
        **{"image_processor_type": processor, "do_resize": True, "size": size, "resample": 3},
        **{"do_center_crop": processor.startswith("CLIP"), "do_normalize": True},
        **{"crop_size": {"height": SIZE, "width": SIZE}, "do_rescale": True},
        **{"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return model
