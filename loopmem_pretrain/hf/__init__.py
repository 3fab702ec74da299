"""Hugging Face classes, export, import; importing any of it lets transformers load model type `loopmem` (auto.py)."""

from loopmem_pretrain.hf import auto as auto
