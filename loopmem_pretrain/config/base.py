"""The base class of every configuration section."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

FilePath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A file or folder; `~` at its beginning is the home folder, as in a shell."""

Key = tuple[str, ...]
"""Path of a key: ("data", "datasets", "0", "path")."""
Problem = tuple[Key, str]
"""Of a rule between fields: path of the key to change, what is wrong and what is valid."""


class Section(BaseModel):
    """Frozen, strict, no unknown keys, no infinities; every field carries a sentence of description."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
