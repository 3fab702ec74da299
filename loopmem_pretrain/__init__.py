"""Distributed pretraining of language models whose layers loop adaptively and read gated memory banks."""

__version__ = "0.1.0"
