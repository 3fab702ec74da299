"""The base class of every configuration section."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, strict, no unknown keys, no infinities; every field carries a sentence of description."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
