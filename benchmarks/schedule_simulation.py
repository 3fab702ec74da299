"""DeepSpeed's pipeline schedule, replayed without a model: when each stage computes, and when it waits.

The instructions are those of DeepSpeed's own TrainSchedule. A forward pass of a stage takes a third of its cost, a
backward pass two thirds. Passing a tensor on takes no time, but both sides must have come to it, as with gloo and
NCCL: neither side goes on before. Everything else (gradient reduction, optimizer) is left out.
"""

from collections.abc import Sequence
from typing import Any

from deepspeed.runtime.pipe import schedule

# Instruction -> (this stage sends, what is passed, the other stage's offset)
TRANSFERS = {
    schedule.SendActivation: (True, "activation", 1),
    schedule.RecvActivation: (False, "activation", -1),
    schedule.SendGrad: (True, "gradient", -1),
    schedule.RecvGrad: (False, "gradient", 1),
}
SHARES = {schedule.ForwardPass: 1 / 3, schedule.BackwardPass: 2 / 3}


def simulated_time(costs: Sequence[float], micro_batches: int) -> float:
    """Time from the first forward to the last backward pass, in the unit of `costs`: one micro-batch on each stage.

    Raises:
        AssertionError: every stage waits for another one.
    """
    programs = [_program(stage, len(costs), micro_batches) for stage in range(len(costs))]
    clocks, done = [0.0] * len(costs), [0] * len(costs)
    while any(position < len(program) for position, program in zip(done, programs, strict=True)):
        moved = False
        for stage, program in enumerate(programs):
            while done[stage] < len(program):
                kind = program[done[stage]]
                if kind in SHARES:
                    clocks[stage] += SHARES[kind] * costs[stage]
                elif not _met(stage, kind, programs, done):
                    break
                else:
                    other = stage + TRANSFERS[kind][2]
                    clocks[stage] = clocks[other] = max(clocks[stage], clocks[other])
                    done[other] += 1
                done[stage] += 1
                moved = True
        assert moved, f"{len(costs)} stages, {micro_batches} micro-batches: all wait, at {done}"
    return max(clocks)


def simulated_bubble(costs: Sequence[float], micro_batches: int) -> float:
    """Mean over the stages of the share of that time in which a stage computes nothing."""
    return 1 - micro_batches * sum(costs) / (len(costs) * simulated_time(costs, micro_batches))


def _program(stage: int, stages: int, micro_batches: int) -> list[Any]:
    steps = schedule.TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage).steps()
    return [type(command) for step in steps for command in step if type(command) in TRANSFERS.keys() | SHARES.keys()]


def _met(stage: int, kind: Any, programs: list[list[Any]], done: list[int]) -> bool:
    """Whether the other side of a transfer has come to it."""
    sends, what, offset = TRANSFERS[kind]
    other = stage + offset
    return done[other] < len(programs[other]) and TRANSFERS.get(programs[other][done[other]]) == (
        not sends,
        what,
        -offset,
    )
