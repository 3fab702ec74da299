"""Named errors for everything a user can cause or must react to, and the exit codes they become.

An error says what is wrong (file, key, value) and what to do about it. `cli.main` prints it without a traceback
and exits with its code; anything else that escapes is a bug and keeps its traceback (exit code 1).

    0 done, or stopped cleanly on request     5 conversion mismatch
    1 a bug in this package                   6 environment: device, lost rank, disk, permissions
    2 config, usage, too little memory        7 training gave up: non-finite loss, spikes, drifting replicas
    3 data                                    8 hang
    4 checkpoint                              130 interrupted from the keyboard, 143 by SIGTERM
    Training that is under way ends cleanly on both instead: 0.
"""

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class LoopMemError(Exception):
    """Base of all named errors.

    Args:
        problem: what is wrong, with the file, key and value it is about.
        fix: what the user can do now; one sentence, printed on its own line.
    """

    exit_code = EXIT_BUG

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix
        self.is_told = False
        """Whether another rank says the same."""

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.problem, self.fix)  # crosses process pools with its fix

    def __str__(self) -> str:
        return f"{self.problem}\n  what to do: {self.fix}" if self.fix else self.problem


class ConfigError(LoopMemError):
    """A config file, an override or a command line that cannot be meant; a run folder on it that is not there."""

    exit_code = 2


class OutOfMemory(LoopMemError):
    """A run that does not fit into the memory of a device: the same command would end in the same way."""

    exit_code = 2


class DataError(LoopMemError):
    """Raw text, tokenizer, shards or their manifest are missing, damaged or do not fit each other."""

    exit_code = 3


class CheckpointError(LoopMemError):
    """A checkpoint is missing, incomplete, damaged or belongs to another run."""

    exit_code = 4


class ConversionError(LoopMemError):
    """A converted model does not compute what the checkpoint computes."""

    exit_code = 5


class EnvironmentFault(LoopMemError):
    """The machine does not offer what was asked: device, disk space, permission, a rank that is gone."""

    exit_code = 6


class TrainingGaveUp(LoopMemError):
    """Training stopped itself: the loss is not finite or keeps spiking, or replicas have drifted apart."""

    exit_code = 7


class HangDetected(LoopMemError):
    """No progress within the allowed time."""

    exit_code = 8
