"""Backbones: what a model offers the objective and the painter, one file per family."""

from arra.models.base import Backbone
from arra.models.loading import load_model

__all__ = ["Backbone", "load_model"]
