"""Scenes: 64x64 pictures of coloured shapes, drawn by code and readable back from their pixels."""
