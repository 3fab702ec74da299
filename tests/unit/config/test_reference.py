"""docs/config.md is what the generator writes, and the generator leaves no field out."""

from pathlib import Path

import pytest

from loopmem_pretrain.config.base import Section
from loopmem_pretrain.config.cluster import ClusterConfig
from loopmem_pretrain.config.prepare import PrepareConfig
from loopmem_pretrain.config.reference import _section_in, reference
from loopmem_pretrain.config.run import RunConfig
from loopmem_pretrain.config.site import SiteConfig

SCHEMAS = (RunConfig, PrepareConfig, ClusterConfig, SiteConfig)
"""In the order of the document."""
DOCUMENT = Path(__file__).parents[3] / "docs" / "config.md"


def fields(section: type[Section], prefix: str = ""):
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = _section_in(field.annotation)
        if inner:
            item = "N." if "tuple" in str(field.annotation) else ""
            yield from fields(inner, f"{prefix}{name}.{item}")


def test_document_is_up_to_date():
    fix = "run: python -m loopmem_pretrain.config.reference > docs/config.md"
    assert DOCUMENT.read_text(encoding="utf-8") == reference(), fix


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_has_a_line_and_a_sentence(schema):
    lines = reference().split("\n## ")[1:][SCHEMAS.index(schema)].splitlines()
    for key, field in fields(schema):
        (line,) = [line for line in lines if line.startswith((f"| `{key}` |", f"| **`{key}`** |"))]
        assert len(line.split(" | ")) == 4, f"{key}: a | in its sentence breaks the table"
        assert field.description and field.description.endswith("."), f"{key} has no sentence"


def test_bounds_and_defaults_are_those_of_the_fields():
    text = reference()
    assert "| `optimizer.beta1` | number, >= 0, < 1 | `0.9` |" in text
    assert "| **`model.hidden_size`** | whole number, > 0 |  |" in text
    assert "| `logging.wandb` | `off`, `offline`, `online` | `off` |" in text
    assert "| `schedule.beta1_min` | number, >= 0, < 1 or `null` | `null` |" in text
    assert "| `training.deterministic` | `true` or `false` | `false` |" in text
