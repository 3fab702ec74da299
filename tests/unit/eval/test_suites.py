"""Task suites with a scorer made by hand: prompts, metrics, means, and what is refused."""

import hashlib
import json
import math
import sys

import pytest

from loopmem_pretrain.errors import ConfigError, DataError, EnvironmentFault
from loopmem_pretrain.eval.scoring import WindowScore, continuation_windows
from loopmem_pretrain.eval.suites import Mean, mean, mean_of_means, measured, open_tasks, score_task
from tests.tasks import LOCAL, write_tasks

CONTEXT = 4096


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def spelled(score, context=CONTEXT):
    """A model that reads bytes; `score` gives the nats of a window's bytes and whether they are greedy."""
    from loopmem_pretrain.eval.harness import WindowLM

    def scores(windows):
        return [
            WindowScore(*score(bytes(window.ids[: -window.scored]), bytes(window.ids[-window.scored :])))
            for window in windows
        ]

    return WindowLM(scores, lambda text: list(text.encode()), 0, context)


def test_a_configuration_knows_the_tasks_by_their_files():
    """config/run.py refuses other names without the harness."""
    from lm_eval.tasks import TaskManager

    from loopmem_pretrain.config.run import TASK_FILES

    known = TaskManager(include_path=str(TASK_FILES), include_defaults=False).all_tasks
    assert sorted(known) == sorted(path.stem for path in TASK_FILES.glob("[!_]*.yaml"))


def test_prompts(data):
    tasks = {task.name: task for task in open_tasks(["commonsense", "math"], data)}
    assert len(tasks) == 8 + 7
    first = {name: [request.args for request in task.requests[0]] for name, task in tasks.items()}
    ice = "Question: What is ice?\nAnswer:"
    assert first["arc_easy"] == [(ice, " frozen water"), (ice, " a stone"), (ice, " hot air")]
    dark = "Question: Why is it dark?\nAnswer:"
    assert first["arc_challenge"] == [
        (dark, " the sun is down"),
        (dark, " it is late"),
        ("Answer:", " the sun is down"),
        ("Answer:", " it is late"),
    ]
    assert first["hellaswag"][0] == ("Baking: She warms the oven. She", " puts in the bread.")
    assert first["piqa"][1] == ("Goal: open a jar\nAnswer:", " paint the lid")
    assert first["social_iqa"][0] == ("Question: Ann fell. How is Ann?\nAnswer:", " hurt")
    assert first["winogrande"] == [(text, " was a pot.") for text in LOCAL["winogrande.jsonl"][0]["context_options"]]
    assert first["lambada"] == [("He saw the dog, and then he fed the", " dog")]
    rain = "TITLE: On Rain\nABSTRACT: We look at rain.\n\nQ: Is it wet?\n\nA:"
    assert first["qasper_yes_no"] == [(rain, " no"), (rain, " yes")]
    ((prompt, solution),) = first["minerva_math_algebra"]
    assert solution == " It is $\\boxed{0}$."
    assert prompt.endswith("I hope it is correct.\n\nProblem:\nWhat is $0+0$?\n\nSolution:")
    assert prompt.count("Problem:\n") == 5 and prompt.count("Solution: ") == 4
    assert (
        len(
            {
                item[0].args[0].rpartition("Problem:")[0]
                for name in tasks
                for item in tasks[name].requests
                if "math" in name
            }
        )
        == 1
    )


def test_the_prompts_have_a_hash(data):
    (task,) = open_tasks(["lambada"], data)
    texts = [[f"{row['context']}", f" {row['continuation']}"] for row in LOCAL["lambada_openai.jsonl"]]
    assert task.prompt_sha256 == hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def test_rank_choice_by_hand(data):
    """Nats by choice: `frozen water` is not the likeliest, but the likeliest a character."""
    nats = {b" frozen water": 6.0, b" a stone": 5.0, b" hot air": 9.0, b" grass": 1.0, b" sand": 2.0}
    (task,) = open_tasks(["arc_easy"], data)
    scores = score_task(task, spelled(lambda prompt, text: (nats.get(text, 3.0), False)))
    assert scores.metrics["acc"].value == pytest.approx(1 / 3)  # the third item is a tie, which the first choice wins
    assert scores.metrics["acc_norm"].value == pytest.approx(2 / 3)
    bits = [6 / math.log(2) / 13, 1 / math.log(2) / 6, 3 / math.log(2) / 7]
    assert scores.metrics["bits_per_byte"] == pytest.approx(mean(bits))
    assert scores.shortened == 0


def test_a_character_counts_once_whatever_its_bytes():
    """-2.25 and -2 nats a character, -1.125 and -2 a byte; bits a byte are of the bytes, the space's included."""
    from loopmem_pretrain.eval.task_metrics import choice_scores

    scores = choice_scores({"choices": ["\u00e9\u00e8", "abc"], "gold": 1}, [(-4.5, False), (-6.0, False)])
    assert (scores["acc"], scores["acc_norm"]) == (0.0, 1.0)
    scores = choice_scores({"choices": ["\u00e9\u00e8", "abc"], "gold": 0}, [(-4.5, False), (-6.0, False)])
    assert scores["bits_per_byte"] == pytest.approx(4.5 / math.log(2) / 5)


def test_mutual_information_by_hand(data):
    """The question raises `the sun is down` by 1 nat and `snow` by none, the others by less than that or equally."""

    def score(prompt, text):
        given = {b" the sun is down": 4.0, b" it is late": 3.0, b" snow": 2.0, b" a road": 1.0, b" a wall": 8.0}[text]
        alone = {b" the sun is down": 5.0, b" it is late": 3.0, b" snow": 2.0, b" a road": 2.0, b" a wall": 8.0}[text]
        return (alone if prompt == b"Answer:" else given, False)

    (task,) = open_tasks(["arc_challenge"], data)
    metrics = score_task(task, spelled(score)).metrics
    assert (metrics["acc"].value, metrics["acc_pmi"].value) == (0.0, 0.5)


def test_continuations_by_hand(data):
    lambada, winogrande = open_tasks(["lambada", "winogrande"], data)
    model = spelled(lambda prompt, text: (2.0 if b"tea" in prompt[-4:] else 1.0, text == b" dog"))
    assert score_task(lambada, model).metrics["acc"] == pytest.approx((0.5, 0.5))
    metrics = score_task(winogrande, model).metrics
    assert metrics["acc"].value == 0.5  # the first by `tea`, the second a tie
    assert metrics["bits_per_byte"].value == pytest.approx((1 / 11 + 1 / 12) / math.log(2) / 2)


def test_suites_are_means_of_their_tasks(data):
    tasks = open_tasks(["arc_easy", "lambada", "minerva_math_algebra", "winogrande"], data)
    scores = [score_task(task, spelled(lambda prompt, text: (float(len(text)), True))) for task in tasks]
    suites = measured(tasks, scores)
    bit = 1 / math.log(2)
    assert suites["math"] == {"bits_per_byte": pytest.approx((bit, 0.0))}
    assert suites["commonsense"]["bits_per_byte"] == pytest.approx((bit, 0.0))  # arc_easy and winogrande: not lambada
    hits = [scores[0].metrics["acc_norm"], scores[1].metrics["acc"], scores[3].metrics["acc"]]
    assert suites["commonsense"]["accuracy"] == mean_of_means(hits)


def test_means():
    assert mean([1.0, 2.0, 4.0, 9.0]) == pytest.approx((4.0, math.sqrt((9 + 4 + 0 + 25) / 3 / 4)))
    assert mean([3.0]) == Mean(3.0, None)
    assert mean_of_means([Mean(1.0, 0.3), Mean(2.0, 0.4)]) == pytest.approx((1.5, 0.25))
    assert mean_of_means([Mean(1.0, 0.3), Mean(2.0, None)]) == Mean(1.5, None)


def test_items_are_drawn_by_seed(tmp_path):
    rows = [{"context": f"the number {n} is", "continuation": str(n)} for n in range(50)]
    data = write_tasks(tmp_path, lambada_openai=rows)

    def drawn(**options):
        (task,) = open_tasks(["lambada"], data, **options)
        return task.of, [int(item["continuation"]) for item in task.items]

    assert drawn() == (50, list(range(50))) == drawn(limit=50) == drawn(limit=99)
    of, some = drawn(limit=8, seed=1)
    assert of == 50 and some == sorted(set(some)) and len(some) == 8
    assert (of, some) == drawn(limit=8, seed=1) != drawn(limit=8, seed=2)


@pytest.mark.parametrize("scored", [1, 5, 8, 9, 20, 33])
@pytest.mark.parametrize("prompt", [1, 3, 8, 40])
def test_every_token_of_a_continuation_is_predicted_once(prompt, scored):
    context, ids = 8, list(range(prompt + scored))
    windows = list(continuation_windows(0, ids, scored, context))
    predicted = [token for window in windows for token in window.ids[-window.scored :]]
    assert predicted == ids[prompt:]
    assert all(len(window.ids) <= context + 1 and window.scored < len(window.ids) for window in windows)
    if scored <= context:  # as the harness does it
        assert [window.ids for window in windows] == [ids[-(context + 1) :]]
    elif prompt >= 4:
        assert len(windows[0].ids) - windows[0].scored == 4  # half a context of the prompt


def test_prompts_that_lose_their_beginning_are_counted(data):
    (task,) = open_tasks(["lambada"], data)
    seen = []
    model = spelled(lambda prompt, text: (seen.append(prompt) or 1.0, True), context=30)
    assert score_task(task, model).shortened == 1
    assert seen == [b"He saw the dog, and then he fed the"[-27:], b"It was the end of the"]
    assert score_task(task, model).shortened == 1


def test_unknown_names_are_answered_with_the_valid_ones(data):
    with pytest.raises(ConfigError) as error:
        open_tasks(["arc_easy", "hella", "mmlu"], data)
    assert "unknown tasks: hella, mmlu" in error.value.problem
    assert "the suites commonsense, math, and the tasks arc_challenge, arc_easy," in error.value.fix
    with pytest.raises(ConfigError, match="no task is named"):
        open_tasks([], data)


def test_tasks_without_data_are_all_named(data, tmp_path):
    write_tasks(tmp_path, piqa=[{"goal": "x"}])
    (tmp_path / "hellaswag.jsonl").unlink()
    with pytest.raises(DataError) as error:
        open_tasks(["commonsense"], tmp_path)
    assert "2 of 8 tasks have no usable data" in error.value.problem
    for said in ("hellaswag.jsonl: no such file", "piqa.jsonl:1: has the keys goal"):
        assert said in error.value.problem
    assert "what is there: arc_challenge,arc_easy,lambada,qasper_yes_no,social_iqa,winogrande" in error.value.fix
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_tasks(["piqa"], tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="--limit 0 is not valid"):
        open_tasks(["piqa"], tmp_path, limit=0)


def test_without_the_harness(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # what the import then meets is a package that is not there
    with pytest.raises(EnvironmentFault, match="task suites need lm-evaluation-harness") as error:
        open_tasks(["piqa"], data)
    assert "loopmem_pretrain[eval]" in error.value.fix


def test_no_hub(data):
    """Tests run offline: the hub cannot be reached, and that is said by the set's name."""
    with pytest.raises(DataError, match="allenai/ai2_arc/ARC-Easy/test cannot be opened") as error:
        open_tasks(["arc_easy"], None)
    assert "--data-dir" in error.value.fix


def test_a_continuation_without_tokens_of_its_own(data):
    from loopmem_pretrain.eval.harness import WindowLM

    (task,) = open_tasks(["lambada"], data)
    with pytest.raises(DataError, match="the continuation has no token of its own"):
        score_task(task, WindowLM(lambda windows: [], lambda text: [1, 2], 0, 8))
