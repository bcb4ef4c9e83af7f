"""ARRA: train autoregressive models to paint, with global alignment (arXiv 2503.07334)."""

__version__ = "0.1.0"
