"""What ended a rank, as a named error: what torch, gloo and NCCL say that a user can do something about.

Imports torch late: the process that ends a rank which hangs records why, and is small.
"""

from loopmem_pretrain.errors import EnvironmentFault, HangDetected, LoopMemError, OutOfMemory

# In what gloo (its source path) and NCCL say of a rank that is gone; torch's store raises errors of its own kind.
_LOST = ("gloo/transport", "Gloo connectFullMesh", "NCCL communicator was aborted", "ncclRemoteError")
# What gloo says of a rank that is there but does not come to a collective.
_HANGING = ("Timed out waiting", "Application timeout")
SHOWN = 400
"""Characters of torch's own messages that are passed on: NCCL's reason stands in the second or third line."""
# What torch's allocator for the CPU says.
_FULL = "DefaultCPUAllocator: can't allocate memory"


def named(error: BaseException) -> LoopMemError | None:
    """The named error that `error` is or stands for; None for a bug."""
    if isinstance(error, LoopMemError):
        return error
    return lost_rank(error) or _failed_collective(error) or _out_of_memory(error)


def lost_rank(error: BaseException) -> LoopMemError | None:
    """The named error behind a collective that broke off because another rank is gone or hangs, else None."""
    if not isinstance(error, RuntimeError):
        return None
    import torch.distributed as dist

    said = str(error)
    if any(sign in said for sign in _HANGING):
        return HangDetected(
            "another rank did not come to a collective within parallel.collective_timeout_seconds",
            "see what that rank says or does (py-spy dump --pid PID); if it only was slow, raise "
            "parallel.collective_timeout_seconds; the same command resumes from the last checkpoint",
        )
    of_the_store = isinstance(error, dist.DistError) and not isinstance(error, dist.DistBackendError)
    if of_the_store or any(sign in said for sign in _LOST):
        return EnvironmentFault(
            f"lost contact with another rank in the middle of a collective ({_beginning(said)})",
            "see that rank's own message; then start the same command to resume from the last checkpoint",
        )
    return None


def _failed_collective(error: BaseException) -> EnvironmentFault | None:
    """What NCCL says of itself: two ranks on one GPU, no network interface of that name, a driver that does not fit."""
    import torch.distributed as dist

    if not isinstance(error, dist.DistBackendError):
        return None
    rank = f"rank {dist.get_rank()}" if dist.is_initialized() else "this rank"
    return EnvironmentFault(
        f"a collective failed on {rank}: {_beginning(str(error))}",
        "NCCL_DEBUG=WARN makes NCCL say more; see to the GPUs, their driver and NCCL_SOCKET_IFNAME, then start the "
        "same command to resume from the last checkpoint",
    )


def _beginning(said: str) -> str:
    """The first lines of a message, as one."""
    words = " ".join(said.split())
    return words if len(words) <= SHOWN else f"{words[:SHOWN]} ..."


def _out_of_memory(error: BaseException) -> OutOfMemory | None:
    if not isinstance(error, RuntimeError):
        return None
    import torch
    import torch.distributed as dist

    if not isinstance(error, torch.OutOfMemoryError) and _FULL not in str(error):
        return None
    rank = f"rank {dist.get_rank()}" if dist.is_initialized() else "this process"
    return OutOfMemory(
        f"{rank} is out of memory: {str(error).strip().splitlines()[0]}",
        "lower training.micro_batch_size, set training.activation_checkpointing=loop, or cut the model over more ranks "
        "(`loopmem estimate` counts what each takes); the same command then resumes from the last checkpoint",
    )
