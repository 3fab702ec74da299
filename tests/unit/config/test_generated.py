"""Whatever stands in a config file, it is a configuration or a ConfigError: never another exception, never a hang."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loopmem_pretrain.config.load import dump_config, load_config
from loopmem_pretrain.config.prepare import PrepareConfig, prepare_problems
from loopmem_pretrain.config.run import RunConfig, run_problems
from loopmem_pretrain.errors import ConfigError
from tests.mutations import damaged_bytes, damaged_json, examples
from tests.unit.config.conftest import GOOD

VALUES = yaml.safe_load(GOOD.replace("1e-2", "0.01").replace("1e-5", "0.00001"))
RECIPE = {
    "output_dir": "out",
    "sources": [{"paths": ["text.jsonl"], "origin": "generated", "license": "none"}],
    "tokenizer": {"path": "tokenizer", "train": {"vocab_size": 320}},
    "validation_fraction": 0.1,
}
SCALARS = ["1e400", ".nan", "-.inf", "!!int word", "!!binary x", "!!python/object:os.system x", "*a", "&a [*a]", "0x10"]
SCALARS += [
    "2001-01-01",
    "1_000",
    "'\\ud800'",
    '"\\ud800"',
    "-1",
    "0",
    "9" * 400,
    "1:30",
    "{[",
    "? a",
    "<<: {}",
    "[" * 500,
]
FIELDS = [(section, field) for section, fields in VALUES.items() if isinstance(fields, dict) for field in fields]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("configs") / "run.yaml"


def loads_or_complains(file, schema, rules, overrides=()):
    try:
        config = load_config(schema, file, overrides, rules)
    except ConfigError as error:
        assert error.problem and error.fix
        error.problem.encode()  # can be printed
        return None
    return config


@examples(100)
@given(data=st.data())
def test_values_that_are_not_meant(file, data):
    """Wrong types, unknown keys, values out of range, at any depth, as YAML or as JSON, which is YAML."""
    schema, rules, values = data.draw(
        st.sampled_from([(RunConfig, run_problems, VALUES), (PrepareConfig, prepare_problems, RECIPE)])
    )
    mutated = data.draw(damaged_json(values))
    text = data.draw(st.sampled_from([json.dumps(mutated), yaml.safe_dump(mutated, allow_unicode=True)]))
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    config = loads_or_complains(file, schema, rules)
    if config is not None:
        file.write_text(dump_config(config), encoding="utf-8")
        assert load_config(schema, file, (), rules) == config


@examples(50)
@given(data=st.data())
def test_files_that_are_damaged(file, data):
    file.write_bytes(data.draw(damaged_bytes(GOOD.encode())))
    loads_or_complains(file, RunConfig, run_problems)


@examples(50)
@given(field=st.sampled_from(FIELDS), value=st.sampled_from(SCALARS) | st.text(max_size=12), inside=st.booleans())
def test_scalars_of_yaml(file, field, value, inside):
    """In the file and on the command line."""
    section, name = field
    text = GOOD if not inside else GOOD + f"{section}x:\n  {name}: {value}\n"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    loads_or_complains(file, RunConfig, run_problems, [] if inside else [f"{section}.{name}={value}"])


def test_aliases_of_aliases(file):
    """Nine levels of nine: small as a file, a billion items as a value."""
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="more than 100,000 keys and items"):
        load_config(RunConfig, file)
