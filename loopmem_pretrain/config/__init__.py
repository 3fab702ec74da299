"""Typed, frozen configuration: one file per owner, every problem reported at once, nothing heavy imported."""
