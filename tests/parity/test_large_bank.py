"""A global bank of a million slots: created, trained and saved on two ranks, in half the memory of one."""

from pathlib import Path

import pytest
import torch

from loopmem_pretrain.checkpoint.snapshot import compact
from tests.configs import tiny_run
from tests.distributed import run_ranks

SLOTS = 2**20


def peak_of_a_step(rank, world_size, config, folder):
    """Bytes that making the engine, two steps and saving add to what the process had, at their worst moment."""
    from tests.parity.test_engines import batches, make_engine

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    engine = make_engine(config)
    losses = [float(engine.train_batch(iter(batches(config, step)), step)) for step in range(2)]
    for name, state in engine.collect_states(Path(folder), "tag").items():
        torch.save(compact(state), Path(folder, name))
    shapes = [list(p.shape) for p in engine.engine.module.parameters() if p.numel() >= 2**20]
    return losses, resident("VmHWM:") - before, shapes


@pytest.mark.slow
@pytest.mark.parametrize("retrieval", ["topk", "product_keys"])
def test_a_million_slots(tmp_path, retrieval):
    model = {"num_hidden_layers": 1, "global_slots": SLOTS, "retrieval": retrieval, "retrieval_topk": 8}
    model |= {"local_slots": 0, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "max_loops": 2}
    training = {"global_batch_size": 2, "micro_batch_size": 2}
    results = {}
    for ranks, parallel in ((1, {}), (2, {"tensor_model_parallel_size": 2, "memory_placement": "sharded"})):
        # With eps 1e-8 Adam would turn rounding noise, the gradients of slots that hardly any token reads, into steps
        # of the learning rate's size: on some processors the second loss then differs by 3e-5.
        optimizer = {"lr": 1e-2, "eps": 1e-5}
        config = tiny_run(model=model, training=training, parallel=parallel, optimizer=optimizer)
        folder = tmp_path / str(ranks)
        folder.mkdir()
        results[ranks] = run_ranks(
            "tests.parity.test_large_bank:peak_of_a_step", ranks, config, str(folder), timeout=300
        )
    (alone,), both = results[1], results[2]
    banks = 2 if retrieval == "topk" else 1
    for losses, peak, shapes in both:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone[0]), rtol=1e-5, atol=0)
        assert shapes == [[SLOTS // 2, 32]] * banks
        assert peak < 0.6 * alone[1], f"{peak / 1e6:.0f} MB on each of two ranks, {alone[1] / 1e6:.0f} MB on one"
