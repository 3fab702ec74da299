"""The subcommands of `loopmem`: for each, its arguments (add_...) and the function that runs it.

Imports stand inside the functions, so that each command loads only what it needs (`loopmem slurm`: cluster/command.py).
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from loopmem_pretrain.arguments import AddCommand, with_config
from loopmem_pretrain.errors import EXIT_DONE, ConfigError
from loopmem_pretrain.progress import stage_bars
from loopmem_pretrain.words import counted


def add_fetch_corpus(command: AddCommand) -> None:
    fetch = command("fetch-corpus", fetch_corpus, "Download the demo's English and mathematics corpus.")
    fetch.add_argument("out_dir", metavar="OUT", help="folder for the .jsonl files")


def fetch_corpus(options: Any) -> int:
    from loopmem_pretrain.data.demo_corpus import fetch_demo_corpus

    with stage_bars("package") as progress:
        paths = fetch_demo_corpus(options.out_dir, progress=progress)
    for path in paths:
        print(path)
    return EXIT_DONE


def add_train_tokenizer(command: AddCommand) -> None:
    parser = command("train-tokenizer", train_tokenizer, "Train the sentencepiece tokenizer of a recipe.")
    with_config(parser, "num_processes=8")


def train_tokenizer(options: Any) -> int:
    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.prepare import PrepareConfig, prepare_problems

    config = load_config(PrepareConfig, options.config, options.overrides, prepare_problems)
    from loopmem_pretrain.data.tokenizer import load_tokenizer
    from loopmem_pretrain.data.train_tokenizer import train_tokenizer as train_tokenizer_of

    with stage_bars() as progress:
        file = train_tokenizer_of(config, progress)
    print(f"{file}: {load_tokenizer(file).vocab_size:,} tokens")
    return EXIT_DONE


def add_prepare_data(command: AddCommand) -> None:
    parser = command("prepare-data", prepare_data, "Turn text into token shards; the same command continues.")
    with_config(parser, "num_processes=8")


def prepare_data(options: Any) -> int:
    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.prepare import PrepareConfig, prepare_problems

    config = load_config(PrepareConfig, options.config, options.overrides, prepare_problems)
    from loopmem_pretrain.data.prepare import prepare, validation_warning

    with stage_bars() as progress:
        manifest = prepare(config, progress)
    for name, split in manifest.splits.items():
        print(f"{config.output_dir} {name}: {counted(split.documents, 'document')}, {counted(split.tokens, 'token')}")
    if warning := validation_warning(manifest, config.validation_fraction):
        print(f"loopmem: warning: {warning}", file=sys.stderr)
    return EXIT_DONE


def add_train(command: AddCommand) -> None:
    parser = with_config(command("train", train, "Pretrain a model; the same command resumes."))
    add = parser.add_argument
    add("--ranks", type=int, metavar="N", help="start N ranks on this machine (else: torchrun, or one)")
    help_ = "with --ranks: start again after a lost or hanging rank, at most K times without a new checkpoint between"
    add("--max-restarts", type=int, default=0, metavar="K", help=help_)
    add("--stop-at-step", type=int, metavar="STEP", help="end this start after STEP with a checkpoint")
    add("--trust", action="store_true", help="resume from a checkpoint that another run wrote")


def train(options: Any) -> int:
    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.run import RunConfig, check_topology, run_problems
    from loopmem_pretrain.data.dataset import check_datasets
    from loopmem_pretrain.training.launch import train_here, train_on_ranks
    from loopmem_pretrain.training.run_folder import refuse_other_configuration

    if options.stop_at_step is not None and options.stop_at_step < 1:
        raise ConfigError(f"--stop-at-step {options.stop_at_step} is not valid", "give a step of 1 or more")
    if options.max_restarts < 0:
        raise ConfigError(f"--max-restarts {options.max_restarts} is not valid", "give 0 or more")
    if options.max_restarts and options.ranks is None:
        raise ConfigError(
            "--max-restarts needs --ranks: a process cannot restart itself",
            "add --ranks N, or let torchrun (its own --max-restarts) or the scheduler restart",
        )
    if options.ranks is None:
        return train_here(options.config, options.overrides, options.stop_at_step, options.trust)
    if "RANK" in os.environ:
        raise ConfigError(
            f"--ranks {options.ranks} starts ranks, and RANK={os.environ['RANK']} says that this process is one itself",
            "leave out --ranks under a launcher (torchrun, deepspeed, SLURM), or unset RANK",
        )
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks} is not valid", "give 1 or more")
    # Complain at once and once, not on every rank.
    config = load_config(RunConfig, options.config, options.overrides, run_problems)
    check_topology(config, options.ranks)
    refuse_other_configuration(config, Path(config.run_dir))
    check_datasets(config)
    flags = ["--stop-at-step", str(options.stop_at_step)] if options.stop_at_step else []
    flags += ["--trust"] if options.trust else []
    arguments = ["--config", options.config, *flags, *options.overrides]
    return train_on_ranks(options.ranks, arguments, config, options.max_restarts)


def add_convert(command: AddCommand) -> None:
    help_ = "Write a run's model as a Hugging Face folder; with --from-hf, begin a run with the weights of one."
    add = command("convert", convert, help_).add_argument
    add("source", metavar="RUN", help="run folder (or one of its checkpoints); --from-hf: HF folder")
    add("target", metavar="OUT", help="folder to create; --from-hf: YAML file of the run to begin")
    add("overrides", nargs="*", default=[], metavar="key=value", help="--from-hf: overrides, as for train")
    help_ = (
        "the other way: weights of an exported folder, or of a dense Llama, Mistral or Qwen (2, 3) model, which loops\n"
        "and banks are added to, become step 0 of the run that the YAML file OUT describes (docs/retrofit.md)"
    )
    add("--from-hf", action="store_true", help=help_)
    add("--dtype", choices=("float32", "bfloat16"), help="of the written weights (default: float32)")
    help_ = "write a dense model without code of its own: N loops, where exact"
    add("--unrolled", type=int, metavar="N", help=help_)
    add("--overwrite", action="store_true", help="replace an earlier export in OUT")


def convert(options: Any) -> int:
    if options.from_hf:
        return import_from_hf(options)
    if options.overrides:
        raise ConfigError(f"{' '.join(options.overrides)}: overrides belong to --from-hf", "leave them out")
    from loopmem_pretrain.hf.convert import convert_run

    wanted = {"dtype": options.dtype or "float32", "overwrite": options.overwrite, "unrolled": options.unrolled}
    print(convert_run(options.source, options.target, **wanted))
    return EXIT_DONE


def import_from_hf(options: Any) -> int:
    if options.dtype or options.overwrite or options.unrolled is not None:
        raise ConfigError("--dtype, --overwrite and --unrolled are of an export, not of --from-hf", "leave them out")
    from loopmem_pretrain.hf.convert import import_from_hf

    print(import_from_hf(options.source, options.target, options.overrides))
    return EXIT_DONE


def add_generate(command: AddCommand) -> None:
    parser = command("generate", generate, "Write text with a run or an exported Hugging Face folder.")
    add = parser.add_argument
    add("model", metavar="RUN_OR_HF", help="run folder or exported folder")
    add("--prompt", required=True, help="text to continue")
    help_ = "(default: 100, or as many as the context has room for)"
    add("--max-new-tokens", type=int, metavar="N", help=help_)
    help_ = "0 takes the likeliest token each time (default: 0.8)"
    add("--temperature", type=float, default=0.8, metavar="T", help=help_)
    add("--top-k", type=int, default=50, metavar="K", help="draw from the K likeliest tokens (default: 50)")
    help_ = "of the drawing; the same seed gives the same text (default: 0)"
    add("--seed", type=int, default=0, metavar="S", help=help_)
    help_ = "apply every layer N times instead of max_loops; several numbers: one for each layer"
    add("--num-loops", type=int, nargs="+", metavar="N", help=help_)
    help_ = "let tokens leave a layer early, 0 < T <= 1; 1 runs all loops (default: as the model's config says)"
    add("--exit-threshold", type=float, metavar="T", help=help_)
    add_exit_rule_and_device(parser)
    add("--save", metavar="FILE", help="also write prompt and text to FILE")


def add_exit_rule_and_device(parser: argparse.ArgumentParser) -> None:
    help_ = "halting (default): once a share T of its mass is out; confidence: once a loop changes less than 1 - T"
    parser.add_argument("--exit-rule", choices=("halting", "confidence"), help=help_)
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (default: cpu)")


def generate(options: Any) -> int:
    from loopmem_pretrain.data.files import check_target, write_file
    from loopmem_pretrain.hf.load import device_of
    from loopmem_pretrain.inference.generate import check_request, generate_text
    from loopmem_pretrain.inference.opening import open_model

    rule = _exit_rule(options)
    check_request(options.prompt, options.max_new_tokens, options.temperature, options.top_k, options.seed)
    device = device_of(options.device)
    if options.save:
        check_target(options.save)
    pieces: list[str] = []

    def show(piece: str) -> None:
        print(piece if pieces else options.prompt + piece, end="", flush=True)
        pieces.append(piece)

    model, tokenizer, context = open_model(options.model)
    text = generate_text(
        model.to(device),
        tokenizer,
        options.prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        num_loops=options.num_loops[0] if options.num_loops and len(options.num_loops) == 1 else options.num_loops,
        exit_threshold=options.exit_threshold,
        exit_rule=rule,
        context_length=context,
        on_text=show,
    )
    print("" if pieces else options.prompt)
    if options.save:
        write_file(Path(options.save), (options.prompt + text + "\n").encode())
    return EXIT_DONE


def _exit_rule(options: Any) -> str:
    """The rule of `--exit-threshold`; without one it would change nothing."""
    if options.exit_rule and options.exit_threshold in (None, []):
        raise ConfigError("--exit-rule is about --exit-threshold", "add --exit-threshold, or leave it out")
    return options.exit_rule or "halting"


def add_eval(command: AddCommand) -> None:
    help_ = "A run or an exported folder on held-out text (perplexity) and task suites."
    parser = command("eval", evaluate, help_)
    add = parser.add_argument
    add("model", metavar="RUN_OR_HF", help="run folder, one of its checkpoints, or exported folder")
    held_out = parser.add_mutually_exclusive_group()
    help_ = "text to score, a domain a file: .txt (one document), .jsonl, .parquet"
    held_out.add_argument("--text", nargs="+", default=[], metavar="FILE", help=help_)
    add("--text-field", metavar="NAME", help="of their lines or rows that holds the text (default: text)")
    help_ = "prepared data, whose validation splits are scored (default: the run's own, without --tasks)"
    held_out.add_argument("--data", nargs="+", default=[], metavar="PREPARED", help=help_)
    help_ = "suites (commonsense, math) and single tasks, a comma between them"
    add("--tasks", metavar="NAMES", type=lambda names: names.split(","), default=[], help=help_)
    add("--data-dir", metavar="DIR", help="folder with their .jsonl files (default: the Hugging Face hub)")
    add("--limit", type=int, metavar="N", help="items a task, drawn with --seed (default: all)")
    add("--seed", type=int, metavar="S", help="of the drawing of --limit (default: 0)")
    help_ = "apply every layer N times instead of max_loops, for each N; `all`: 1 to twice max_loops, and memory closed"
    add("--num-loops", nargs="+", default=[], metavar="N", help=help_)
    help_ = "let tokens leave layers early, 0 < T <= 1, for each T (default: as config.json says, else all loops run)"
    add("--exit-threshold", nargs="+", type=float, default=[], metavar="T", help=help_)
    add_exit_rule_and_device(parser)
    help_ = "N of each domain: spread over a prepared split, the first of a file (default: all)"
    add("--max-documents", type=int, metavar="N", help=help_)
    add("--batch-size", type=int, default=8, metavar="B", help="windows in a forward pass (default: 8)")
    add("--out", metavar="FILE.json", help="also write every number, unrounded")
    help_ = "also put the tables into the model card of the exported folder, in place of earlier ones"
    add("--card", action="store_true", help=help_)


def evaluate(options: Any) -> int:
    import shlex

    from loopmem_pretrain.data.files import check_target
    from loopmem_pretrain.eval.evaluate import evaluate, write_evaluation
    from loopmem_pretrain.tools.evaluation import describe
    from loopmem_pretrain.tools.evaluation_card import check_card, write_card

    if options.out:
        check_target(options.out)
    if options.card:
        check_card(options.model)
    evaluation = evaluate(
        options.model,
        text=options.text,
        text_field=options.text_field,
        data=options.data,
        tasks=options.tasks,
        data_dir=options.data_dir,
        limit=options.limit,
        seed=options.seed,
        num_loops=options.num_loops,
        exit_threshold=options.exit_threshold,
        exit_rule=_exit_rule(options),
        max_documents=options.max_documents,
        batch_size=options.batch_size,
        device=options.device,
        command=shlex.join(["loopmem", *options.arguments]),
    )
    print(describe(evaluation))
    if options.out:
        write_evaluation(options.out, evaluation)
    if options.card:
        print(f"\nwritten to {write_card(options.model, evaluation)}")
    return EXIT_DONE


def add_checkpoint(command: AddCommand) -> None:
    help_ = "What is in a run's checkpoints, whether it is what was written; one rewritten for a start at other sizes."
    verbs = command("checkpoint", list_checkpoints, help_).add_subparsers(required=True, metavar="VERB")
    list_ = command("list", list_checkpoints, "A table of a run's checkpoints and why each is kept.", verbs)
    list_.add_argument("run_dir", metavar="RUN")
    list_.add_argument("--verify", action="store_true", help="also hash every file")
    show = command("show", show_checkpoint, "What one checkpoint holds: position, layout, data, files.", verbs)
    show.add_argument("path", metavar="CKPT_OR_RUN", help="checkpoint folder, or run folder: its newest")
    verify = command("verify", verify_checkpoints, "Hash every file; exit code 4 where one is damaged.", verbs)
    verify.add_argument("path", metavar="CKPT_OR_RUN", help="checkpoint folder, or run folder: all of its checkpoints")
    help_ = "Rewrite a checkpoint so that a start at any sizes reads it without merging it first."
    reshape_ = command("reshape", reshape, help_, verbs)
    reshape_.add_argument("path", metavar="RUN_OR_CKPT", help="run folder (its newest checkpoint) or one checkpoint")
    reshape_.add_argument("--out", metavar="RUN", help="write into this new run folder (default: replace in place)")


def list_checkpoints(options: Any) -> int:
    from loopmem_pretrain.tools import checkpoints

    print(checkpoints.list_checkpoints(options.run_dir, options.verify))
    return EXIT_DONE


def show_checkpoint(options: Any) -> int:
    from loopmem_pretrain.tools import checkpoints

    print(checkpoints.show_checkpoint(options.path))
    return EXIT_DONE


def verify_checkpoints(options: Any) -> int:
    from loopmem_pretrain.tools import checkpoints

    print(checkpoints.verify_checkpoints(options.path))
    return EXIT_DONE


def reshape(options: Any) -> int:
    from loopmem_pretrain.quiet import prepare_imports

    prepare_imports("cpu")
    from loopmem_pretrain.checkpoint.reshape import reshape

    print(f"{reshape(options.path, options.out)}: in merged form")
    return EXIT_DONE


def add_plot(command: AddCommand) -> None:
    parser = command("plot", plot, "Draw a run's figures as SVG and PNG.")
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("out_dir", metavar="OUT", nargs="?", help="default: RUN/figures")


def plot(options: Any) -> int:
    from loopmem_pretrain.tools.plot import save_plots

    for path in save_plots(options.run_dir, options.out_dir or Path(options.run_dir) / "figures"):
        print(path)
    return EXIT_DONE


def add_report(command: AddCommand) -> None:
    parser = command("report", report, "Write a run's report.html.")
    parser.add_argument("run_dir", metavar="RUN")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html")


def report(options: Any) -> int:
    from loopmem_pretrain.data.files import check_target
    from loopmem_pretrain.tools.report import write_report

    if options.out:
        check_target(options.out)
    print(write_report(options.run_dir, options.out or Path(options.run_dir) / "report.html"))
    return EXIT_DONE


def add_estimate(command: AddCommand) -> None:
    help_ = "Parameters, FLOPs, memory and traffic of a config, plans that fit, step times on a cluster; without torch."
    add = with_config(command("estimate", estimate, help_)).add_argument
    add("--ranks", type=int, metavar="N", help="GPUs of the run; also lists the plans that fit them")
    add("--gpu-memory", type=float, metavar="GB", help="of one GPU (default: the cluster's, or 80)")
    add("--cluster", metavar="FILE", help="simulate step times, such as configs/cluster/h100.yaml")


def estimate(options: Any) -> int:
    from loopmem_pretrain.config.cluster import ClusterConfig
    from loopmem_pretrain.config.load import load_config
    from loopmem_pretrain.config.run import RunConfig, run_problems
    from loopmem_pretrain.tools.estimate import describe

    config = load_config(RunConfig, options.config, options.overrides, run_problems)
    cluster = load_config(ClusterConfig, options.cluster) if options.cluster else None
    print(describe(config, options.ranks, options.gpu_memory, cluster))
    return EXIT_DONE


def add_demo(command: AddCommand) -> None:
    parser = command("demo", demo, "The whole job on real text, command by command (what `make demo` runs).")
    parser.add_argument("--run-dir", default="runs/demo", metavar="RUN", help="default: runs/demo")


def demo(options: Any) -> int:
    from loopmem_pretrain.tools.demo import run_demo

    return run_demo(options.run_dir)
