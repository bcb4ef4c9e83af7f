"""Experiments as pairs of arms: the same data, order and first weights, with and without ARRA."""
