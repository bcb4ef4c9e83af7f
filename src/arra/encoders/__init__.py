"""Frozen vision encoders: what an aligned model is pulled towards, and what distances compare."""

from arra.encoders.encoder import POOLINGS, Encoder, load_encoder, split_spec

__all__ = ["POOLINGS", "Encoder", "load_encoder", "split_spec"]
