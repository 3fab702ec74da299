"""The backend of lm-evaluation-harness: what its arguments and a task's generation_kwargs mean, and what is refused."""

import json

import pytest
from lm_eval.api.instance import Instance

from loopmem_pretrain.data.tokenizer import load_tokenizer
from loopmem_pretrain.errors import ConfigError
from loopmem_pretrain.eval.harness import LoopMemHarness
from loopmem_pretrain.hf.export import huggingface_config, write_settings, write_tokenizer
from loopmem_pretrain.hf.weights import check_weights, write_weights
from tests.unit.hf.conftest import model_config, native_model

HARNESS = {"batch_size": 2, "max_batch_size": 4, "device": "cpu"}
"""What the harness hands in beside model_args."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sentences):
    folder, model = tmp_path_factory.mktemp("export"), native_model(model_config("full"))
    tokenizer = load_tokenizer(sentences / "tokenizer")
    write_tokenizer(folder, sentences / "tokenizer", ["the of and to"])
    weights = dict(model.named_parameters())
    write_weights(folder, weights, check_weights(model.config, weights), "float32", "1GB")
    write_settings(folder, huggingface_config(model.config, tokenizer, 64, "float32"), tokenizer.vocab_size)
    return folder


def opened(folder, **arguments):
    return LoopMemHarness.create_from_arg_obj({"pretrained": str(folder), **arguments}, HARNESS)


def refusal(call, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return f"{caught.value.problem}; {caught.value.fix}"


# ------------------------------------------------------------------------------------------------------- model_args


def test_arguments_as_the_harness_hands_them_in(folder):
    given = f"pretrained={folder},num_loops=2,gates_closed=True,exit_threshold=0.5,exit_rule=confidence"
    from_text = LoopMemHarness.create_from_arg_string(f"{given},trust_remote_code=True", HARNESS)
    assert from_text.setting == (2, True, 0.5, "confidence") and from_text.opened.batch_size == 2
    assert opened(folder).setting == (3, False, None, None)
    assert opened(folder, exit_threshold=1).setting.exit_rule == "halting"


@pytest.mark.parametrize("name", ["num_loop", "max_length", "dtype", "parallelize"])
def test_unknown_arguments(folder, name):
    """Measured without them, it would be another model's number."""
    said = refusal(opened, folder, **{name: 1})
    assert f"model_args: unknown {name}; valid: pretrained, num_loops, gates_closed, exit_threshold" in said


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"exit_rule": "confidence"}, "exit_rule is about exit_threshold"),
        ({"exit_rule": "nonsense"}, "exit_rule is about exit_threshold"),
        ({"exit_rule": "nonsense", "exit_threshold": 0.5}, "--exit-rule nonsense is not known"),
        ({"exit_threshold": "half"}, "exit_threshold 'half' is not valid"),
        ({"exit_threshold": 2}, "--exit-threshold 2.0 is not valid"),
        ({"num_loops": "all"}, "num_loops all: the harness measures one setting at a time"),
        ({"num_loops": 1.5}, "--num-loops 1.5 is not valid"),
        ({"gates_closed": "no"}, "gates_closed 'no' is not valid"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant(folder, arguments, problem):
    assert problem in refusal(opened, folder, **arguments)


def test_a_rule_beside_the_threshold_of_the_config(folder, tmp_path):
    """The config's own rule goes with the config's threshold; another one would be left out in silence."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**values, "exit_threshold": 0.5}))
    assert opened(tmp_path).setting == (3, False, 0.5, "halting")
    assert "exit_rule is about exit_threshold" in refusal(opened, tmp_path, exit_rule="confidence")


@pytest.mark.parametrize("size", ["auto", "auto:4", "2.5"])
def test_batch_sizes_that_are_searched_for(folder, size):
    said = refusal(LoopMemHarness, str(folder), batch_size=size)
    assert f"batch_size {size!r} is not valid; give a number" in said


# ------------------------------------------------------------------------------------------------ generation_kwargs


@pytest.fixture(scope="module")
def write(folder):
    """write(**generation_kwargs): what the model writes after a prompt."""
    model = opened(folder)

    def text(**wishes):
        (written,) = model.generate_until([Instance("generate_until", {}, ("the of and to", wishes), 0)])
        return written

    return text


def test_settings_that_mean_the_same(write):
    short, long = write(until=[], max_gen_toks=5), write(until=[], max_gen_toks=12)
    assert short and long.startswith(short) and len(long) > len(short)
    assert write(until=[], max_new_tokens=5) == write(until=[], max_tokens=5) == short
    assert write(until=[""], max_gen_toks=5) == write(max_gen_toks=5) == write(until=None, max_gen_toks=5) == short
    greedy = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "num_beams": 1, "repetition_penalty": 1.0}
    assert write(until=[], max_gen_toks=5, **greedy) == short
    assert write(until=long[3:5], max_gen_toks=12) == long.split(long[3:5])[0]


@pytest.mark.parametrize(
    ("wishes", "problem"),
    [
        ({"do_sample": True, "temperature": 0.7}, "the task asks for drawn tokens"),
        ({"temperature": 0.7}, "the task asks for drawn tokens"),
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, "the task asks for num_beams: 4, no_repeat_ngram_size: 3"),
        ({"repetition_penalty": 1.2}, "the task asks for repetition_penalty: 1.2"),
        ({"max_length": 20}, "the task asks for max_length: 20"),
        ({"max_gen_toks": 0}, "max_gen_toks 0 is not valid"),
        ({"max_new_tokens": 64}, "max_gen_toks 64 leaves no room for a prompt in the context of 64"),
    ],
    ids=str,
)
def test_another_text_than_greedy_decoding_writes(write, wishes, problem):
    assert problem in refusal(write, until=["\n"], **wishes)


def test_a_prompt_of_blanks_alone(folder):
    """The harness moves its blanks to the continuation, all of which is then scored: after the end of a document."""
    model = opened(folder)
    request = lambda *texts: [Instance("loglikelihood", {}, texts, 0)]  # noqa: E731
    blanks, nothing = (model.loglikelihood(request(*texts))[0][0] for texts in ((" ", " x"), ("", "  x")))
    assert blanks == pytest.approx(nothing)
