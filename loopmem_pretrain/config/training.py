"""Batch sizes, precision, optimizer, schedules, validation, checkpoints, logs and alarms of a run."""

from typing import Literal

from pydantic import Field

from loopmem_pretrain.config.base import FilePath, Section


class TrainingConfig(Section):
    """The steps of a run and how one is computed."""

    train_steps: int = Field(gt=0)
    """Optimizer steps of the whole run, over all restarts."""
    global_batch_size: int = Field(gt=0)
    """Samples in a step, over all ranks; the number of gradient accumulation steps follows from it."""
    micro_batch_size: int = Field(gt=0)
    """Samples one rank puts through the model at a time."""
    seed: int = Field(default=42, ge=0)
    """Seed of the initial weights and of the order of samples."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of activations and working weights; master weights, sums of gradients and halting are float32 in both,
    except that ZeRO 2 and 3 reduce the gradients of a micro-batch over ranks in bf16."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes the GPU where there is one, and refuses to start if CUDA_VISIBLE_DEVICES or SLURM names one that is
    not there; `cuda` refuses to start without a GPU."""
    deterministic: bool = False
    """Ask torch for deterministic kernels only: two runs give identical losses, but run somewhat slower."""
    activation_checkpointing: Literal["none", "loop"] = "none"
    """`loop` keeps only the input of each loop and recomputes the rest in the backward pass."""
    compile: Literal["none", "loop"] = "none"
    """`loop` compiles the body of one loop, and the cross-entropy, with torch.compile."""
    ponder_schedule: Literal["constant", "linear", "cyclic"] = "constant"
    """Weight at step t: w; w * t/train_steps; or w * cos(2 pi t / ponder_period), times 0.6 where negative."""
    ponder_period: int = Field(default=10, gt=1)
    """Steps of one cycle of the cyclic ponder schedule (paper: 10)."""


class OptimizerConfig(Section):
    """AdamW with parameter groups by role."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment (the schedule may cycle it)."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of the groups that are decayed."""
    weight_decay_rule: Literal["standard", "paper"] = "standard"
    """`standard`: matrices and routers (no norms, other biases, step scales); `paper`: all but the embedding."""
    decay_memory_banks: bool = False
    """Under `standard`, whether the banks' keys and values are decayed."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""


class ScheduleConfig(Section):
    """Learning rate (and beta1) over steps."""

    type: Literal["cosine", "wsd", "one_cycle"] = "cosine"
    """`cosine`: linear warm-up, cosine to min_lr; `wsd`: warm-up, stable, linear decay; `one_cycle`: cosine up from
    min_lr and back (the paper's)."""
    warmup_steps: int = Field(ge=0)
    """Steps until the peak."""
    min_lr: float = Field(ge=0)
    """Learning rate at the end (and, for one_cycle, at the start)."""
    decay_steps: int = Field(default=0, ge=0)
    """wsd only: steps of the final linear decay."""
    beta1_min: float | None = Field(default=None, ge=0, lt=1)
    """one_cycle only: cycle beta1 from optimizer.beta1 down to this and back (the paper's fork: .95 to .85)."""


class ValidationConfig(Section):
    """When and on how much held-out text the loss is measured."""

    interval_steps: int = Field(default=250, gt=0)
    """Steps between validations; the last step validates too."""
    num_samples: int = Field(default=256, gt=0)
    """Samples a validation reads, always the same ones; rounded up to whole batches over all ranks."""


class EvaluationConfig(Section):
    """Task suites that are scored while training (docs/evaluation.md); off where no tasks are named."""

    tasks: tuple[str, ...] = ()
    """Suites (commonsense, math) and single tasks, as in `loopmem eval --tasks`."""
    data_dir: FilePath | None = None
    """Folder with their .jsonl files; unset reads them from the Hugging Face hub at every start, on every rank: with
    many ranks give a folder."""
    interval_steps: int = Field(default=1000, gt=0)
    """Steps between evaluations; the last step evaluates too."""
    limit: int = Field(default=64, gt=0)
    """Items scored per task, always the same ones: this bounds the cost of an evaluation."""
    seed: int = Field(default=0, ge=0)
    """Seed for drawing these items."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    interval_steps: int = Field(default=500, gt=0)
    """Steps between checkpoints; the last step and a clean stop save too."""
    asynchronous: bool = True
    """Copy the state to host memory and write it while training goes on; the last save of a start is waited for."""
    keep_last: int = Field(default=3, gt=0)
    """Newest whole checkpoints to keep; older ones are removed after a newer one is whole."""
    keep_every_steps: int = Field(default=0, ge=0)
    """Also keep, permanently, checkpoints whose step is a multiple of this; 0 keeps none for this reason."""
    keep_best: int = Field(default=0, ge=0)
    """Also keep this many checkpoints with the lowest validation loss; among equals, the newer."""


class FaultConfig(Section):
    """What a run survives, and when it stops by itself."""

    max_skipped_steps: int = Field(default=10, gt=0)
    """The run gives up after this many steps in a row whose loss or gradients are not finite; they are not applied."""
    spike_action: Literal["off", "warn", "rewind"] = "warn"
    """On a loss spike: nothing; a warning; or back to the last checkpoint before it, leaving out the data since."""
    spike_score: float = Field(default=8.0, gt=0)
    """A step is high when its loss is this many robust standard deviations (1.4826 MAD) above the window's median;
    MAD is the median absolute deviation."""
    spike_window_steps: int = Field(default=128, ge=16)
    """A loss is compared with those of this many steps before it, high ones left out; at least half are needed."""
    spike_patience_steps: int = Field(default=5, gt=0)
    """High steps in a row that make a spike; single ones are bad samples and pass."""
    max_rewinds: int = Field(default=3, ge=0)
    """Rewinds to one checkpoint, or to older ones, before the run gives up."""
    time_limit_seconds: int | None = Field(default=None, gt=0)
    """A start stops cleanly, checkpoint included, before its processes have run this long; unset runs on."""
    hang_timeout_seconds: int = Field(default=900, gt=0)
    """Without a finished micro-batch for this long, a step or validation counts as hung: stacks of all threads are
    written and the ranks end."""
    slow_phase_timeout_seconds: int = Field(default=7200, gt=0)
    """The same limit for starting, resuming, saving, and the first step and validation, which may compile."""


class LoggingConfig(Section):
    """What is written while training; metrics.jsonl is always written."""

    interval_steps: int = Field(default=10, gt=0)
    """Steps between lines of metrics.jsonl; the device is read only then."""
    tensorboard: bool = False
    """Also write TensorBoard events under the run folder."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Also log to Weights & Biases; the run id survives restarts."""
    wandb_project: str = "loopmem"
    """Weights & Biases project."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak dense TFLOP/s of one device for MFU; unset takes the GPU's data sheet or, on CPU, a measured matmul."""


class AlarmConfig(Section):
    """What is watched at every log interval, and only warned about."""

    after_steps: int = Field(default=1000, ge=0)
    """Halting and gate alarms are silent before this step."""
    min_expected_loops: float = Field(default=1.02, ge=1)
    """Warn when a layer's expected loops stay below this: halting is stuck at one loop."""
    min_gate: float = Field(default=0.01, ge=0, le=1)
    """Warn when a layer's mean gate stays below this: the memory never opens."""
