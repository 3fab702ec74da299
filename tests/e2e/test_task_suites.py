"""Task suites on a trained run: `loopmem eval --tasks`, the harness's own evaluator, and the hook inside training."""

import json

import pytest

from loopmem_pretrain.cli import main
from loopmem_pretrain.hf.card import EVALUATION_BEGINS, EVALUATION_ENDS
from tests.distributed import run_ranks
from tests.e2e.test_training import ON_RANK, config_for, lines, run
from tests.tasks import LOCAL, write_tasks

CONTEXT = 96
TASKS = ["arc_easy", "arc_challenge", "winogrande", "lambada", "minerva_math_algebra"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def config(folder, sentences, data, **sections):
    training = {"train_steps": 4, **sections.pop("training", {})}
    evaluation = {"tasks": TASKS, "data_dir": str(data), "interval_steps": 2, "limit": 3}
    return config_for(
        folder, sentences, data={"seq_length": CONTEXT}, training=training, evaluation=evaluation, **sections
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sentences, data):
    """A run folder of 4 steps on 2 ranks, ZeRO 1, evaluated at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("suites") / "run"
    assert run(config(folder, sentences, data), ranks=2) == ("done", None)
    return folder


@pytest.fixture(scope="module")
def exported(trained):
    from loopmem_pretrain.hf.convert import convert_run

    convert_run(trained, trained.parent / "hf")
    return trained.parent / "hf"


@pytest.fixture
def evaluate(tmp_path, data):
    """evaluate(model, *arguments): the JSON that `loopmem eval --tasks` writes."""

    def run(model, *arguments, tasks=TASKS):
        given = ["--tasks", ",".join(tasks), "--data-dir", str(data), "--out", str(tmp_path / "out.json")]
        assert main(["eval", str(model), *given, *map(str, arguments)]) == 0
        return json.loads((tmp_path / "out.json").read_text())

    return run


def numbers(evaluation):
    """{task: its metrics under the first setting}."""
    return {
        task["task"]: {key: value for key, value in task["scores"][0].items() if key.startswith(("acc", "bits"))}
        for task in evaluation["tasks"]
    }


def test_run_and_export_score_the_same(trained, exported, evaluate, capsys):
    of_run, of_export = evaluate(trained), evaluate(exported)
    assert numbers(of_run).keys() == set(TASKS)
    for name, metrics in numbers(of_run).items():
        assert metrics == pytest.approx(numbers(of_export)[name], rel=1e-5)
    math = of_run["tasks"][-1]
    assert (math["suite"], math["items"], math["of"], math["shortened"]) == ("math", 2, 2, 2)
    assert math["prompt_sha256"] == of_export["tasks"][-1]["prompt_sha256"]
    assert [(suite["suite"], suite["tasks"]) for suite in of_run["suites"]] == [
        ("commonsense", TASKS[:-1]),
        ("math", TASKS[-1:]),
    ]
    assert (of_run["domains"], of_run["limit"], of_run["seed"], of_run["model"]["step"]) == ([], None, 0, 4)
    printed = capsys.readouterr().out
    assert "WARNING: prompts that did not fit into 96 tokens" in printed and "minerva_math_algebra: 2 of 2" in printed
    assert of_run["lm_eval"] and math["version"] == 1.0
    assert evaluate(trained) == {**of_run, "command": of_run["command"]}, "the same command gives the same numbers"


def test_the_harness_gives_the_same_numbers(trained, exported, evaluate, data, monkeypatch, tmp_path):
    """Its evaluator, over our backend (the run) and over its own `hf` model with the export's code."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import loopmem_pretrain.eval.harness  # noqa: F401 - registers the backend
    from loopmem_pretrain.eval.suites import TASKS as FILES

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    names = [name for name in TASKS if "math" not in name]  # `hf` takes no continuation longer than the context
    manager = TaskManager(include_path=str(FILES), include_defaults=False, metadata={"data_dir": str(data)})
    tokens_of_export = {"pretrained": str(exported), "trust_remote_code": True, "dtype": "float32"}
    ways = [
        ("loopmem", {"pretrained": str(trained)}),
        ("loopmem", {"pretrained": str(exported), "num_loops": 3}),
        ("hf", tokens_of_export),
    ]
    ours = numbers(evaluate(trained, tasks=names))
    for model, arguments in ways:
        result = lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=names, task_manager=manager, batch_size=2, device="cpu"
        )
        for name in names:
            theirs = {key.removesuffix(",none"): value for key, value in result["results"][name].items()}
            for metric, value in ours[name].items():
                if metric.endswith("_standard_error"):
                    metric = metric.replace("_standard_error", "_stderr")
                assert theirs[metric] == pytest.approx(value, rel=1e-4), (model, name, metric)


@pytest.mark.slow
def test_rolling_and_generation_are_those_of_hf(exported, monkeypatch, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from loopmem_pretrain.eval.harness import LoopMemHarness

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ours = LoopMemHarness(str(exported))
    theirs = HFLM(str(exported), trust_remote_code=True, dtype="float32", device="cpu", batch_size=1)
    texts = [" ".join(["the of and to"] * count) for count in (1, 60)]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), rel=1e-4)
    wishes = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = [Instance("generate_until", {}, (text, wishes), 0) for text in texts]
    written = ours.generate_until(prompts)
    assert written == theirs.generate_until(prompts) and all(written)
    assert ours.shortened == 1
    for other in (
        {"until": [], "max_new_tokens": 5},
        {"until": ["\n\n"], "max_tokens": 6, "do_sample": False, "temperature": 0.7},
        {"until": "\n\n", "max_gen_toks": 4, "num_beams": 1},
    ):
        prompt = [Instance("generate_until", {}, (texts[0], other), 0)]
        assert ours.generate_until(prompt) == theirs.generate_until(prompt) != written[:1]
    stopped = [Instance("generate_until", {}, (texts[0], {**wishes, "until": [written[0][2:4]]}), 0)]
    assert ours.generate_until(stopped) == [written[0].split(written[0][2:4])[0]]


def test_loops_and_memory_in_one_table(exported, evaluate, capsys):
    result = evaluate(exported, "--num-loops", "all", "--limit", 2, "--seed", 3, tasks=["commonsense", "math"])
    for task in result["tasks"]:
        assert [(row["num_loops"], row["extrapolation"], row["gates_closed"]) for row in task["scores"]] == [
            *((n, n > 3, False) for n in range(1, 7)),
            (3, False, True),
        ]
        assert task["items"] <= 2
    commonsense, math = result["suites"]
    assert len(commonsense["tasks"]) == 8 and len(math["tasks"]) == 7
    assert len({row["bits_per_byte"] for row in math["scores"]}) == 7, "every setting is another model"
    printed = capsys.readouterr().out
    table = printed.split("think harder (loops) or know more (memory)?")[1].splitlines()
    for heading in ("8 commonsense accuracy", "6 commonsense bits/byte", "7 math bits/byte"):
        assert heading in table[1]
    assert [line.split("  ")[1] for line in table[2:9]] == [
        *"123",
        *(f"{n} (extrapolation)" for n in (4, 5, 6)),
        "3 (memory gates closed)",
    ]
    assert "not the full sets: --limit 2, drawn with seed 3" in printed


def test_accuracy_and_perplexity_against_the_threshold_in_the_card(exported, evaluate, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the of and to")
    card = exported / "README.md"
    before = card.read_text().split(EVALUATION_BEGINS)
    settings = ["--num-loops", "all", "--exit-threshold", 0.4, 1, "--card"]
    result = evaluate(exported, "--text", tmp_path / "text.txt", *settings, "--limit", 2, tasks=["piqa"])
    *_, early, whole = result["tasks"][0]["scores"]
    all_loops = result["tasks"][0]["scores"][2]
    assert 1 <= early["mean_loops"] < 3 and early["flops_per_token"] < all_loops["flops_per_token"]
    assert {**whole, "exit_threshold": None, "exit_rule": None} == all_loops
    text = card.read_text()
    assert text.split(EVALUATION_BEGINS)[0] == before[0] and text.endswith(before[1].split(EVALUATION_ENDS)[1])
    assert f"```\n{result['command']}\n```" in text
    for setting in ("1", "3 (memory gates closed)", "3, halting 0.4", "3, halting 1"):
        assert f"| {tmp_path / 'text.txt'} | {setting} |" in text and f"| piqa | {setting} |" in text
    assert f"loops run  MFLOPs/token\n  1 {' ' * 20}" in capsys.readouterr().out


def test_a_run_has_no_card(trained, data, capsys):
    assert main(["eval", str(trained), "--tasks", "piqa", "--data-dir", str(data), "--card"]) == 2
    assert "is no exported folder, so it has no model card" in capsys.readouterr().err


def test_early_exit_in_the_harness(exported):
    import torch
    from lm_eval.api.instance import Instance

    from loopmem_pretrain.eval.harness import LoopMemHarness
    from loopmem_pretrain.hf.load import load_hf

    asked = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    prompt = [Instance("generate_until", {}, ("the of and to", asked), 0)]
    opened = {"batch_size": 2, "exit_threshold": 0.4, "exit_rule": "confidence", "num_loops": 2}
    ours = LoopMemHarness(str(exported), **opened)
    assert ours.setting == (2, False, 0.4, "confidence")
    model, _ = load_hf(exported)
    ids = torch.tensor([ours.encode("the of and to")])
    told = {"num_loops": 2, "exit_threshold": 0.4, "exit_rule": "confidence"}
    written = model.generate(ids, max_new_tokens=6, do_sample=False, **told)[0, ids.shape[1] :].tolist()
    assert ours.generate_until(prompt) == [ours.opened.codec.decode(written)]


def test_text_and_tasks_together(exported, evaluate, tmp_path):
    (tmp_path / "text.txt").write_text("the of and to")
    result = evaluate(exported, "--text", tmp_path / "text.txt", tasks=["piqa"])
    assert len(result["domains"]) == len(result["tasks"]) == 1


@pytest.mark.parametrize(
    ("code", "arguments", "problem"),
    [
        (2, ["--tasks", "hellaswack"], "unknown tasks: hellaswack"),
        (2, ["--limit", "3"], "--limit: only tasks ask for that"),
        (2, ["--tasks", "piqa", "--max-documents", "3"], "--max-documents: tasks have no documents"),
        (2, ["--text", "{tmp}/a.txt", "--device", "tpu9"], "device 'tpu9' is not known"),
        (6, ["--text", "{tmp}/a.txt", "--device", "cuda:99"], "device 'cuda:99' is not there"),
        (3, ["--tasks", "piqa", "--data-dir", "{tmp}"], "piqa.jsonl: no such file"),
        (3, ["--tasks", "math", "--data-dir", "{tmp}/x"], "x: no such folder"),
    ],
)
def test_what_is_refused(exported, tmp_path, capsys, code, arguments, problem):
    (tmp_path / "a.txt").write_text("the of")
    out = ["--out", str(tmp_path / "out.json")]
    assert main(["eval", str(exported), *(each.format(tmp=tmp_path) for each in arguments), *out]) == code
    said = capsys.readouterr().err
    assert problem in said and "Traceback" not in said and not (tmp_path / "out.json").exists()


def test_a_folder_that_is_not_ours(tmp_path, data, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["eval", str(tmp_path), "--tasks", "piqa", "--data-dir", str(data)]) == 2
    assert "model_type is 'llama', not 'loopmem'" in capsys.readouterr().err


def scores_of(folder):
    return {line["step"]: line["task_scores"] for line in lines(folder) if "task_scores" in line}


def check_hook(folder, evaluate):
    """What training logged at its end is what `loopmem eval` says of its last checkpoint."""
    logged = scores_of(folder)
    assert list(logged) == [2, 4] and logged[2] != logged[4]
    result = evaluate(folder, "--limit", 3)
    expected = {
        f"{task['task']}/{measure}": task["scores"][0][metric]
        for task in result["tasks"]
        for measure, metric in task["measures"].items()
    } | {
        f"{suite['suite']}/{name}": suite["scores"][0][name]
        for suite in result["suites"]
        for name in ("accuracy", "bits_per_byte")
        if name in suite["scores"][0]
    }
    assert logged[4] == pytest.approx(expected, rel=1e-4)


def test_training_logs_the_same(trained, evaluate):
    check_hook(trained, evaluate)


@pytest.mark.parametrize(("zero_stage", "ranks"), [(3, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_training_logs_the_same_however_it_is_spread(tmp_path, sentences, data, evaluate, zero_stage, ranks):
    """3 ranks: batches that do not come out even; under ZeRO 3 every forward pass is a collective."""
    folder, training = tmp_path / "run", {"global_batch_size": 12, "micro_batch_size": 2}
    spread = config(folder, sentences, data, training=training, parallel={"zero_stage": zero_stage})
    assert run(spread, ranks=ranks) == ("done", None)
    check_hook(folder, evaluate)


@pytest.mark.slow
def test_training_logs_the_same_with_compiled_loops(tmp_path, sentences, data, evaluate):
    """Every batch has the one shape that compiled loops take."""
    compiled = config(tmp_path / "run", sentences, data, training={"compile": "loop"})
    assert run_ranks(ON_RANK, 1, compiled, timeout=500) == [("done", None)]
    check_hook(tmp_path / "run", evaluate)


@pytest.mark.slow
def test_evaluation_changes_nothing_in_training(tmp_path, sentences, trained):
    without = config_for(tmp_path / "run", sentences, data={"seq_length": CONTEXT}, training={"train_steps": 4})
    assert run(without, ranks=2) == ("done", None)
    with_, alone = lines(trained)[-1], lines(tmp_path / "run")[-1]
    assert with_["validation_loss"] == alone["validation_loss"] and with_["step_scales"] == alone["step_scales"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"query": "x"}, "arc_easy.jsonl:2: has the keys query"),
        ({"query": "x", "choices": ["a", "b\ud800"], "gold": 0}, "arc_easy.jsonl:2: choices is no Unicode text"),
    ],
)
def test_training_does_not_begin_without_data(tmp_path, sentences, row, problem):
    broken = write_tasks(tmp_path / "tasks", arc_easy=[LOCAL["piqa.jsonl"][0], row])
    status, error = run(config(tmp_path / "run", sentences, broken), ranks=2)
    assert status is None and problem in error.problem
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
