"""Loading: composition, overrides, every problem at once with its place, and what YAML means here."""

import copy
import os
import random
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopmem_pretrain.config.load import differences, dump_config, load_config
from loopmem_pretrain.config.prepare import PrepareConfig, prepare_problems
from loopmem_pretrain.config.run import RunConfig, run_problems
from loopmem_pretrain.errors import ConfigError
from tests.unit.config.conftest import GOOD

# ---------------------------------------------------------------------------------------------------- what is read


def test_good_configuration(files):
    config = files.load(GOOD)
    assert config.model.hidden_size == 32
    assert config.optimizer.lr == 1e-2
    assert config.data.datasets[0].path == "tokens"


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("3E-4", 3e-4), ("1e2", 100.0), (".5", 0.5), ("5.", 5.0), ("+1.5e+1", 15.0), ("1_000.5", 1000.5)],
)
def test_numbers_people_write(files, text, value):
    assert files.load(GOOD.replace("lr: 1e-2", f"lr: {text}")).optimizer.lr == value


def test_underscores_in_whole_numbers(files):
    assert files.load(GOOD.replace("seed", "seed"), "training.train_steps=38_620").training.train_steps == 38620


def test_off_is_a_word_not_false(files):
    assert files.load(GOOD + "logging:\n  wandb: off\n").logging.wandb == "off"
    assert files.load(GOOD, "logging.wandb=off").logging.wandb == "off"


def test_byte_order_mark_is_skipped(files):
    assert files.load("\ufeff" + GOOD).run_dir == "runs/test"


def test_base_is_relative_to_its_file_and_merges(files):
    (files.folder / "parts").mkdir()
    (files.folder / "parts" / "good.yaml").write_text(GOOD)
    config = files.load("base: parts/good.yaml\nmodel:\n  max_loops: 5\n")
    assert (config.model.max_loops, config.model.hidden_size) == (5, 32)


def test_later_bases_win_and_lists_are_replaced(files):
    (files.folder / "a.yaml").write_text(GOOD)
    (files.folder / "b.yaml").write_text("data:\n  datasets:\n    - path: other\n    - path: third\n")
    config = files.load("base: [a.yaml, b.yaml]")
    assert [dataset.path for dataset in config.data.datasets] == ["other", "third"]
    assert config.data.seq_length == 16


def test_two_bases_may_share_a_base(files):
    (files.folder / "good.yaml").write_text(GOOD)
    (files.folder / "a.yaml").write_text("base: good.yaml\n")
    (files.folder / "b.yaml").write_text("base: good.yaml\n")
    assert files.load("base: [a.yaml, b.yaml]").model.max_loops == 3


def test_override_of_a_list_item(files):
    assert files.load(GOOD, "data.datasets.0.path=elsewhere").data.datasets[0].path == "elsewhere"


def test_override_with_a_mapping_merges(files):
    config = files.load(GOOD, "model={max_loops: 5, local_slots: 4}")
    assert (config.model.max_loops, config.model.local_slots, config.model.hidden_size) == (5, 4, 32)


def test_override_below_an_empty_section(files):
    assert files.load(GOOD + "alarms:\n", "alarms.after_steps=7").alarms.after_steps == 7


def test_the_last_of_two_overrides_counts(files):
    assert files.load(GOOD, "training.seed=1", "training.seed=2").training.seed == 2


@pytest.mark.parametrize("text", ["a: b: c", "@home", "*star", "%x", "=5", "a,b"])
def test_override_that_is_no_yaml_is_text(files, text):
    assert files.load(GOOD, f"run_dir={text}").run_dir == text


@pytest.mark.parametrize("name", ["3e-4", "off", "0512", "1:30", "null", "123", "true", "2020-01-01", "a: b", "", "~"])
def test_dump_and_load_are_inverse(files, name):
    text = GOOD.replace("run_dir: runs/test", f"run_dir: {yaml.dump('x' + name).split(chr(10))[0]}")
    config = files.load(text)
    config = config.model_copy(update={"run_dir": name or "x"})
    loaded = config.model_copy(update={"run_dir": os.path.expanduser(config.run_dir)})  # `~` is no null, but home
    assert files.load(dump_config(config)) == loaded


def test_home_is_written_as_in_a_shell(files, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = files.load(GOOD, "run_dir=~/runs/a", "data.datasets.0.path=~/tokens")
    assert (config.run_dir, config.data.datasets[0].path) == ("/home/me/runs/a", "/home/me/tokens")


def test_differences_of_the_data(files):
    old, more = files.load(GOOD), "data.datasets=[{path: tokens, weight: 2.0}, {path: third}]"
    assert differences(old, files.load(GOOD, "data.datasets.0.path=other")) == ["data.datasets.0.path: tokens -> other"]
    assert differences(old, files.load(GOOD, more)) == [
        "data.datasets.number: 1 -> 2",
        "data.datasets.0.weight: 1.0 -> 2.0",
    ]


def test_differences_name_the_leaves(files):
    old, new = files.load(GOOD), files.load(GOOD, "model.max_loops=5", "run_dir=elsewhere")
    assert differences(old, new) == ["run_dir: runs/test -> elsewhere", "model.max_loops: 3 -> 5"]


# ------------------------------------------------------------------------------------------------------ bad values


def test_unknown_key_suggests_the_near_one(bad):
    assert bad("seq_length", "seq_lenght: 5\n  seq_length") == (
        "run.yaml:14:3: data.seq_lenght: unknown key; did you mean seq_length?"
    )


def test_unknown_key_suggests_the_section_it_belongs_to(bad):
    said = bad("train_steps: 20", "train_steps: 20\n  rope_theta: 1e4")
    assert said == "run.yaml:17:3: training.rope_theta: unknown key; did you mean model.rope_theta?"


def test_unknown_key_lists_what_is_valid(bad):
    said = bad("seq_length", "zzz: 5\n  seq_length")
    assert said.endswith("data.zzz: unknown key; valid keys: datasets, seq_length, num_workers")


def test_valid_keys_are_listed_once(files):
    said = files.problems(GOOD.replace("seq_length", "zzz: 5\n  yyy: 5\n  seq_length", 1)).splitlines()
    assert said[1].endswith("data.zzz: unknown key; valid keys: datasets, seq_length, num_workers")
    assert said[2].endswith("data.yyy: unknown key; valid keys as above")


def test_rules_are_checked_beside_fields_that_are_wrong(files):
    text = GOOD.replace("hidden_size: 32", "hidden_size: 31\n  zzz: 1").replace("seq_length: 16", "seq_length: -16")
    assert text.count("seq_length: -16") == 1
    said = files.problems(text)
    assert "model.zzz: unknown key" in said and "seq_length: must be greater" in said
    assert "model.num_attention_heads: 4 does not divide hidden_size 31" in said


def test_rules_do_not_judge_the_default_of_what_could_not_be_read(files):
    said = files.problems(GOOD, "model.ponder_weigth=0.1", "model.ponder_weight=0", "training.ponder_schedule=linear")
    assert said.startswith("1 problem") and "did you mean ponder_weight?" in said


def test_missing_key_points_at_its_section(bad):
    assert bad("  hidden_size: 32\n", "") == "run.yaml:2:1: model.hidden_size: required, but not set anywhere"


def test_missing_section_points_at_the_file(bad):
    assert bad("optimizer:\n  lr: 1e-2\n", "") == "run.yaml:1:1: optimizer: required, but not set anywhere"


def test_missing_key_of_a_replaced_list_points_at_the_new_one(files):
    (files.folder / "good.yaml").write_text(GOOD)
    said = files.problems("base: good.yaml\ndata:\n  datasets:\n    - weight: 2.0\n")
    assert "run.yaml:4:7: data.datasets.0.path: required" in said


def test_a_problem_in_a_base_points_at_the_base(files):
    (files.folder / "good.yaml").write_text(GOOD.replace("max_loops: 3", "max_loops: -3"))
    said = files.problems("base: good.yaml\nmodel:\n  local_slots: 4\n")
    assert "good.yaml:9:3: model.max_loops: must be greater than or equal to 0 (got -3)" in said


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("'32'", "must be a whole number (got '32'); remove the quotes"),
        ("32.0", "must be a whole number (got 32.0); write 32"),
        ("true", "must be a whole number (got true)"),
        ("-32", "must be greater than 0 (got -32)"),
        ("0", "must be greater than 0 (got 0)"),
        ("", "has no value; give one or remove the line (must be a whole number)"),
        ("[1]", "must be a whole number (got a list)"),
        ("{a: 1}", "must be a whole number (got a mapping)"),
        ("0512", "must be a whole number (got '0512'); write 512"),
        ("1:30", "must be a whole number (got '1:30')"),
        ("2020-13-45", "must be a whole number (got '2020-13-45')"),
        ("!!int word", "'word' cannot be read as a whole number"),
        ("!!python/object:os.system x", "the YAML tag !!python/object:os.system is not read; write a plain value"),
        ("!!binary aGk=", "the YAML tag !!binary is not read; write a plain value"),
        ("!!set {a}", "the YAML tag !!set is not read; write a plain value"),
        ("9" * 30, "a number of more than 18 digits does not fit into 64 bits"),
    ],
)
def test_bad_whole_number(bad, value, message):
    said = bad("hidden_size: 32", f"hidden_size: {value}")
    assert re.fullmatch(rf"run\.yaml:4:\d+: model\.hidden_size: {re.escape(message)}", said), said


def test_number_of_thousands_of_digits(bad):
    said = bad("hidden_size: 32", "hidden_size: " + "9" * 5000)
    assert said.endswith("(5002 characters) cannot be read as a whole number") and len(said) < 200


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_number_that_is_not_finite(bad, value):
    assert "optimizer.lr: must be a finite number (got " in bad("lr: 1e-2", f"lr: {value}")


def test_bad_choice_lists_the_choices(bad):
    said = bad("precision: fp32", "precision: fp16")
    assert said == "run.yaml:19:3: training.precision: must be bf16 or fp32 (got 'fp16')"


def test_misspelt_choice_suggests_the_near_one(bad):
    assert bad("warmup_steps: 2", "warmup_steps: 2\n  type: cosinus").endswith("(got 'cosinus'); did you mean cosine?")


def test_number_choice_in_quotes(bad):
    said = bad("lr: 1e-2", "lr: 1e-2\nparallel:\n  zero_stage: '1'")
    assert said.endswith("parallel.zero_stage: must be 1, 2 or 3 (got '1'); remove the quotes")


def test_number_where_text_belongs(bad):
    assert bad("run_dir: runs/test", "run_dir: 123") == (
        "run.yaml:1:1: run_dir: must be text (got 123); put it in quotes"
    )


def test_number_where_text_belongs_on_the_command_line(bad, files):
    said = bad("seq_length: 16", "seq_length: 16", "run_dir=123")
    assert said == "command line: run_dir: must be text (got 123); put it in quotes: run_dir='\"123\"'"
    assert files.load(GOOD, 'run_dir="123"').run_dir == "123"


def test_word_where_a_boolean_belongs(bad):
    said = bad("lr: 1e-2", "lr: 1e-2\n  decay_memory_banks: yes")
    assert said.endswith("must be true or false (got 'yes')")


def test_empty_text(bad):
    assert bad("run_dir: runs/test", "run_dir: ''") == "run.yaml:1:1: run_dir: must not be empty"


def test_half_of_a_surrogate_pair(bad):
    assert "run_dir: '\\ud800' cannot be read as text" in bad("run_dir: runs/test", 'run_dir: "\\ud800"')


def test_section_without_keys(bad):
    said = bad("lr: 1e-2", "lr: 1e-2\nalarms:")
    assert "alarms: has no value; write keys below it or remove the line" in said


def test_mapping_where_a_list_belongs(bad):
    said = bad("    - path: tokens", "    path: tokens")
    assert said == "run.yaml:12:3: data.datasets: must be a list (got a mapping)"


def test_empty_list(bad):
    assert bad("datasets:\n    - path: tokens", "datasets: []").endswith("data.datasets: must not be an empty list")


def test_bad_list_item_is_named_once(bad):
    assert bad("- path: tokens", "- tokens") == (
        "run.yaml:13:7: data.datasets.0: must be a mapping of keys to values (got 'tokens')"
    )


def test_all_problems_at_once(files):
    text = GOOD.replace("hidden_size: 32", "hidden_size: x").replace("seq_length", "seq_lenght")
    said = files.problems(text, "optimizer.lr=-1", "nonsense")
    assert said.startswith("5 problems in the configuration")
    for part in ("model.hidden_size", "data.seq_lenght", "data.seq_length", "optimizer.lr", "'nonsense'"):
        assert part in said


# ----------------------------------------------------------------------------------------------------- bad writing


def test_key_written_twice_is_the_only_complaint(bad):
    assert bad("max_loops: 3", "max_loops: 3\n  max_loops: 4") == (
        "run.yaml:10:3: model.max_loops: written twice (first at {}/run.yaml:9:3); keep one".replace("{}/", "")
    )


def test_section_written_twice(bad):
    said = bad("lr: 1e-2", "lr: 1e-2\nmodel:\n  max_loops: 4")
    assert said == "run.yaml:22:1: model: written twice (first at run.yaml:2:1); keep one"


def test_list_as_a_key(bad):
    assert bad("lr: 1e-2", "lr: 1e-2\n? [a, b]\n: 4") == "run.yaml:22:3: a key must be a plain word"


def test_tab_indentation(files):
    said = files.problems("model:\n\thidden_size: 3\n")
    assert said.startswith("run.yaml:2:1: not valid YAML: ") and "'\\t'" in said


def test_unclosed_bracket(files):
    assert re.match(r"run\.yaml:\d+:\d+: not valid YAML: ", files.problems("model: [1, 2\n"))


def test_two_documents(files):
    assert "run.yaml:25:1: not valid YAML" in files.problems(GOOD + "---\na: 1\n")


def test_null_character(files):
    assert files.problems("a: 1\nb: \x00\n") == "run.yaml:2: not valid YAML: the character #x0000 is not allowed"


def test_not_utf8(files):
    files.path.write_bytes(b"run_dir: x\nmodel: \xff\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2: not UTF-8 text"):
        load_config(RunConfig, files.path)


@pytest.mark.parametrize("text", ["just words", "- a\n- b\n", "42"])
def test_file_that_is_no_mapping(files, text):
    assert files.problems(text) == "run.yaml:1:1: the file is not a mapping of keys"


def test_empty_file_misses_every_required_section(files):
    said = files.problems("# nothing\n")
    assert said.startswith("6 problems") and "run.yaml:1:1: run_dir: required" in said


@pytest.mark.parametrize("text", ["a: &x [*x]\n", "a: &x {b: *x}\n"])
def test_alias_that_contains_itself(files, text):
    assert files.problems(text) == "run.yaml:1:4: nested more than 20 levels deep"


def test_deep_nesting(files):
    assert "nested too deeply" in files.problems("a: " + "[" * 3000 + "]" * 3000)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.yaml cannot be read: No such file or directory"):
        load_config(RunConfig, tmp_path / "nope.yaml")


def test_folder_instead_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(RunConfig, tmp_path)


def test_missing_base_names_the_line(files):
    assert files.problems(GOOD + "base: nope.yaml\n") == (
        "run.yaml:25:1: base: nope.yaml cannot be read: No such file or directory"
    )


def test_base_that_leads_back(files):
    (files.folder / "other.yaml").write_text("base: run.yaml\n")
    assert files.problems("base: other.yaml\n") == "other.yaml:1:1: base: run.yaml leads back to itself"


@pytest.mark.parametrize("value", ["3", "", "{a: 1}", "[{a: 1}]", "[3]", "''"])
def test_base_that_is_no_path(files, value):
    assert files.problems(f"{GOOD}base: {value}\n") == (
        "run.yaml:25:1: base: must be the path of a file, or a list of paths"
    )


# --------------------------------------------------------------------------------------------------- bad overrides


@pytest.mark.parametrize("override", ["training.train_steps", "=3", ".a=3", "a.=3", "a..b=3", ""])
def test_override_of_no_key(bad, override):
    said = bad("seq_length: 16", "seq_length: 16", override)
    assert said == f"command line: {override!r} is not of the form key=value, such as training.train_steps=100"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_siz=3", "model.hidden_siz: unknown key; did you mean hidden_size?"),
        ("optimiser.lr=3", "optimiser: unknown key; did you mean optimizer?"),
        ("lr=3", "lr: unknown key; did you mean optimizer.lr?"),
        ("training.train_steps.x=3", "training.train_steps.x: training.train_steps is 20, it has no keys of its own"),
        (
            "data.datasets.5.path=x",
            "data.datasets.5.path: data.datasets is a list with items 0 to 0, there is no 5; "
            "to add one, give the whole list",
        ),
        (
            "data.datasets.-1=x",
            "data.datasets.-1: data.datasets is a list with items 0 to 0, there is no -1; "
            "to add one, give the whole list",
        ),
        (
            "data.datasets.path=x",
            "data.datasets.path: data.datasets is a list with items 0 to 0, there is no path; "
            "write data.datasets.0.path",
        ),
        (
            "training.train_steps=",
            "training.train_steps: has no value; give one or leave it out (must be a whole number)",
        ),
        ("training=3", "training: must be a mapping of keys to values (got 3)"),
        ("model={max_loops: 1, max_loops: 2}", "model.max_loops: written twice (first at command line); keep one"),
        ("base=x", "base: belongs into a file"),
    ],
)
def test_bad_override(bad, override, message):
    said = bad("seq_length: 16", "seq_length: 16", override)
    assert said.startswith(f"command line: {message}"), said


def test_override_with_an_unquoted_pattern(bad):
    said = bad("seq_length: 16", "seq_length: 16", "data.datasets=[*.bin]")
    assert said.startswith("command line: data.datasets: '[*.bin]' is not valid YAML: ") and "quote the items" in said


def test_place_of_a_value_that_was_overridden(bad):
    said = bad("seq_length: 16", "seq_length: 16", "schedule.warmup_steps=20")
    assert said.startswith("command line: schedule.warmup_steps: 20 leaves no step after it")


# ------------------------------------------------------------------------------------------------ anything at all

PLACED = re.compile(r"^(command line|[^\n]*\.yaml:\d+(:\d+)?): ")
TREE = yaml.safe_load(GOOD.replace("1e-2", "0.01").replace("1e-5", "0.00001"))
VALUES = st.one_of(
    st.none(),
    st.text(max_size=8).filter(lambda text: not text.strip().isdigit()),
    st.sampled_from(
        ["1e-2", "off", "0x10", "\ud800", "\x00", "&a [*a]", "!!int x", "99" * 3000, "'", "[", "{a: ", "- "]
    ),
    st.integers(max_value=-1),
    st.floats(max_value=-0.001),
    st.dictionaries(st.text(min_size=1, max_size=3), st.integers(), min_size=1, max_size=2),
    st.lists(st.integers(), max_size=2),
)


def leaves(tree, path=()):
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in [(*path, key), *leaves(value, (*path, key))]]
    if isinstance(tree, list):
        return [leaf for index, value in enumerate(tree) for leaf in leaves(value, (*path, index))]
    return []


def damage(kind, place, name, value, rng):
    """(text, overrides) of GOOD with one thing wrong, of the given kind."""
    tree = copy.deepcopy(TREE)
    around = tree
    for part in place[:-1]:
        around = around[part]
    if kind == "unknown key":
        around[f"{name}_"] = value
    elif kind == "missing key":
        del around[place[-1]]
    elif kind == "bad value":
        around[place[-1]] = value if isinstance(value, dict | None) else [value]
    elif kind == "duplicate key":
        lines = GOOD.splitlines()
        line = rng.choice([number for number, text in enumerate(lines) if "- " not in text])
        return "\n".join([*lines[: line + 1], lines[line], *lines[line + 1 :]]) + "\n", []
    elif kind == "override":
        return GOOD, [f"{'.'.join(map(str, place))}={value}"]
    elif kind == "unknown override":
        return GOOD, [f"{'.'.join(map(str, place[:-1]))}.{name}_={value}"]
    elif kind == "broken text":
        cut = rng.randrange(len(GOOD))
        return GOOD[:cut] + rng.choice(
            ["\t: [", "}", "'", '"\\', "\n- x\n", "&a *a", "!!python/name:os ", "\x01"]
        ) + GOOD[cut:], []
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=False), []


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(
        ["unknown key", "missing key", "bad value", "duplicate key", "override", "unknown override", "broken text"]
    ),
    place=st.sampled_from(leaves(TREE)),
    name=st.text(st.characters(codec="utf-8", exclude_characters=".="), min_size=1, max_size=6),
    value=VALUES,
    rng=st.randoms(use_true_random=False),
)
def test_any_damage_is_a_placed_config_error(tmp_path, kind, place, name, value, rng: random.Random):
    text, overrides = damage(kind, place, name, value, rng)
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    try:
        load_config(RunConfig, path, overrides, run_problems)
    except ConfigError as error:
        lines = error.problem.splitlines()
        for line in lines[1:] if lines[0].endswith("in the configuration") else lines[:1]:
            assert PLACED.match(line.strip()), line
        assert error.fix
    else:  # damage that happens to be valid: other text, or a whole value where one is allowed
        assert kind in ("broken text", "override", "bad value", "missing key"), (kind, text, overrides)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")))
)
def test_any_bytes_at_all_are_a_placed_config_error(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(PrepareConfig, path, (), prepare_problems)
    assert ".yaml:" in caught.value.problem


@pytest.mark.parametrize("key", ["sources.0.data_files", "sources.0.origin", "tokenizer.path"])
def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path, key):
    path, url = tmp_path / "recipe.yaml", "https://user:password@host/file.jsonl"
    path.write_text(
        "output_dir: out\nsources: [{kind: hub, name: json, origin: here, license: MIT}]\ntokenizer: {path: t}\n"
    )
    override = f"{key}=[{url!r}]" if key.endswith("files") else f"{key}={url}"
    with pytest.raises(ConfigError, match="is a URL with credentials") as caught:
        load_config(PrepareConfig, path, [override], prepare_problems)
    assert key in caught.value.problem and "password" not in caught.value.problem
