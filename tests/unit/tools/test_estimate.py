"""`loopmem estimate`: what it prints, the plans it advises, what it refuses."""

import re
import shlex

import pytest

from loopmem_pretrain.cli import main
from loopmem_pretrain.config.cluster import ClusterConfig
from loopmem_pretrain.config.load import load_config
from loopmem_pretrain.config.run import RunConfig, run_problems
from loopmem_pretrain.tools.memory_plan import Layout, worst_stage
from loopmem_pretrain.tools.plans import USABLE, best_of_each_cut, plans
from loopmem_pretrain.tools.tables import human, human_bytes, human_seconds

RUN, CLUSTER = "configs/train/60m.yaml", "configs/cluster/h100.yaml"
H100 = load_config(ClusterConfig, CLUSTER)


def run(*overrides):
    return load_config(RunConfig, RUN, overrides, run_problems)


def printed(capsys, *arguments):
    assert main(["estimate", "--config", RUN, *arguments]) == 0
    return capsys.readouterr().out


def test_without_options(capsys):
    said = printed(capsys)
    assert "1 rank = TP 1 x PP 1 x DP 1: ZeRO 1, bf16, no recomputation, 8 micro-batches of 32 samples a step" in said
    assert re.search(r"fits: [\d.]+ GB of 72.0 GB, 90% of a GPU with 80.0 GB", said)
    assert "Plans for" not in said and "Simulated" not in said


def test_everything(capsys):
    sizes = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    said = printed(capsys, "--ranks", "8", "--cluster", CLUSTER, *sizes, "training.compile=none")
    assert "8 ranks = TP 2 x PP 2 x DP 2" in said
    assert "nothing here was measured" in said and re.search(r"^  16,384 +4,096 ", said, re.MULTILINE)
    assert "fastest first" in said
    assert max(len(line) for line in said.splitlines()) <= 130


def test_worst_stage_and_largest_item_come_first(capsys):
    said = printed(capsys, "parallel.pipeline_model_parallel_size=3", "training.micro_batch_size=4")
    assert re.search(r"stage \d \(worst\) +stage \d +stage \d$", said, re.MULTILINE)
    items = re.search(r"peak memory.*\n((?:    .*\n)+)", said)[1].splitlines()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    first = [re.search(r" ([\d.]+) (k?M?G?B)|-", line) for line in items]
    sizes = [float(found[1]) * scale[found[2]] if found and found[1] else 0.0 for found in first]
    assert sizes == sorted(sizes, reverse=True)


def test_too_large_is_said(capsys):
    assert "DOES NOT FIT" in printed(capsys, "--gpu-memory", "8")


@pytest.mark.parametrize(("share", "verdict"), [(0.89, "  fits: "), (0.91, "  DOES NOT FIT: ")])
def test_a_tenth_of_the_memory_is_left_to_others(capsys, share, verdict):
    needed = worst_stage(Layout.of(run(), 1))[1].total
    assert verdict in printed(capsys, "--gpu-memory", f"{needed / share / 1e9}")


@pytest.mark.parametrize("cluster", [None, H100], ids=["by parallelism", "by time"])
def test_plans_fit_and_their_overrides_make_them(cluster):
    config = run("training.compile=none")
    found = plans(config, 8, 16e9, cluster)
    assert found
    for plan in best_of_each_cut(found):
        words = shlex.split(" ".join(plan.overrides(config)))
        layout = Layout.of(run("training.compile=none", *words), 8)
        assert layout == plan.layout
        assert worst_stage(layout)[1].total == plan.bytes <= USABLE * 16e9
    if cluster:
        assert [plan.seconds for plan in found] == sorted(plan.seconds for plan in found)


def test_the_simplest_plan_that_fits():
    roomy = plans(run(), 8, 80e9)[0].layout.config
    assert (roomy.parallel.tensor_model_parallel_size, roomy.parallel.pipeline_model_parallel_size) == (1, 1)
    assert (roomy.parallel.zero_stage, roomy.training.activation_checkpointing) == (1, "none")
    assert roomy.training.compile == run().training.compile == "loop", "a plan leaves alone what it allows"
    tight = plans(run(), 8, 2e9)[0].layout.config
    assert tight.training.activation_checkpointing == "loop" or tight.training.micro_batch_size < 32


def test_a_layout_that_does_not_fit_the_ranks_is_said_before_the_plans_that_do(capsys):
    said = printed(capsys, "--ranks", "16", "--cluster", CLUSTER)
    assert re.search(r"^parameters +\d", said)
    assert "This configuration does not fit 16 ranks:\n  training.global_batch_size 256 is not a multiple of" in said
    assert "set training.micro_batch_size to 16, which keeps the batch, or set" in said
    assert "Plans for 16 GPUs of 80.0 GB" in said and "training.micro_batch_size=16" in said
    assert "DOES NOT FIT" not in said and "nothing here was measured" not in said
    said = printed(capsys, "--ranks", "6", "parallel.pipeline_model_parallel_size=4")
    assert "6 ranks are not a multiple of" in said and "Plans for 6 GPUs of 80.0 GB" in said


def test_nothing_fits(capsys):
    said = printed(capsys, "--ranks", "1", "--gpu-memory", "0.5")
    assert "No plan fits 1 GPU of 500 MB with training.global_batch_size 256" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks 0 is not valid"),
        (["--gpu-memory", "-1"], "--gpu-memory -1 is not valid"),
        (["--gpu-memory", "nan"], "--gpu-memory nan is not valid"),
        (["--gpu-memory", "inf"], "--gpu-memory inf is not valid"),
        (["parallel.pipeline_model_parallel_size=7"], "7 stages for 6 layers"),
        (["parallel.tensor_model_parallel_size=3", "training.compile=none"], "3 does not divide"),
        (["--cluster", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_bad_input(capsys, arguments, message):
    assert main(["estimate", "--config", RUN, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and "what to do:" in said


def test_units():
    assert [human_bytes(n) for n in (0, 999, 1000, 1234567, 99_960_000, 72e9)] == [
        "0 B", "999 B", "1.00 kB", "1.23 MB", "100 MB", "72.0 GB"
    ]  # fmt: skip
    assert (human(1.25e9), human(12)) == ("1.25 G", "12")
    assert [human_seconds(s) for s in (5e-6, 0.0123, 3.5, 600)] == ["5 us", "12.3 ms", "3.50 s", "10.0 min"]
