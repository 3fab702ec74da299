"""Samples, their blend and their order: exact, stateless, and quarrelsome about folders that do not fit."""

import doctest
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopmem_pretrain.config.data import DataConfig, DatasetConfig, data_problems
from loopmem_pretrain.data.dataset import (
    BlendedDataset,
    PackedDataset,
    ValidationDataset,
    description_differences,
    open_training,
    open_validation,
    split_warning,
)
from loopmem_pretrain.data.indexed import TokenStream
from loopmem_pretrain.data.order import CYCLE, ORDER, BlendCycle, permuted
from loopmem_pretrain.errors import DataError

WriteFolder = Callable[..., Path]
T = 4
PERMUTED_10 = [1, 3, 8, 0, 6, 5, 2, 4, 9, 7, 5, 2, 8, 3, 0, 9, 6, 4, 7, 1]
PERMUTED_BIG = [260432, 436960, 49881]
ORDER_OF_TWO = [(0, 1), (1, 5), (0, 3), (0, 8), (1, 3), (0, 0), (0, 6), (1, 6), (0, 5), (0, 2), (1, 1), (0, 4)]


def _shards(tokens: int, first: int = 0) -> list[list[list[int]]]:
    """Ids first, first + 1, ...: one shard with one document, one with two."""
    ids = [first + i for i in range(tokens)]
    third = tokens // 3
    return [[ids[:third]], [ids[third : 2 * third], ids[2 * third :]]]


def _config(*folders: Path, weights: tuple[float, ...] = (), seq_length: int = T) -> DataConfig:
    entries = zip(folders, weights or [1.0] * len(folders), strict=True)
    return DataConfig(
        datasets=tuple(DatasetConfig(path=str(folder), weight=weight) for folder, weight in entries),
        seq_length=seq_length,
    )


@pytest.fixture
def two(write_folder: WriteFolder) -> tuple[Path, Path]:
    """41 tokens, 10 samples; 29 tokens, 7 samples."""
    return (
        write_folder("a", train=_shards(41), validation=_shards(21)),
        write_folder("b", train=_shards(29, 500), validation=_shards(13, 500)),
    )


def test_samples_share_one_token_with_their_neighbour(two: tuple[Path, Path]) -> None:
    packed = PackedDataset(TokenStream(two[0], "train"), T)
    assert len(packed) == 10
    for i in range(10):
        np.testing.assert_array_equal(packed[i], np.arange(i * T, i * T + T + 1))


@pytest.mark.parametrize(("tokens", "samples"), [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_number_of_samples(write_folder: WriteFolder, tokens: int, samples: int) -> None:
    assert len(PackedDataset(TokenStream(write_folder("x", train=_shards(tokens)), "train"), T)) == samples


def test_too_few_tokens_for_one_sample(write_folder: WriteFolder) -> None:
    stream = TokenStream(write_folder("x", train=_shards(4)), "train")
    with pytest.raises(DataError, match=r"train split has 4 tokens, one sample needs data.seq_length \+ 1 = 5"):
        PackedDataset(stream, T)


@pytest.mark.parametrize("sample", [-1, 10])
def test_no_such_sample(two: tuple[Path, Path], sample: int) -> None:
    with pytest.raises(IndexError, match="of 10"):
        PackedDataset(TokenStream(two[0], "train"), T)[sample]


# ---- order -----------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 600), seed=st.integers(0, 2**63), dataset=st.integers(0, 9), epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(size: int, seed: int, dataset: int, epoch: int) -> None:
    seen = [permuted(epoch * size + i, size, seed, dataset) for i in range(size)]
    assert sorted(seen) == list(range(size))


@given(size=st.integers(1, 10**12), draw=st.integers(0, 10**15))
def test_large_data_sets_stay_inside(size: int, draw: int) -> None:
    assert 0 <= permuted(draw, size, 42, 0) < size


def test_the_order_is_this_one_for_ever() -> None:
    """Changing these numbers changes the data order of every run: change ORDER with them."""
    assert [permuted(i, 10, 42, 0) for i in range(20)] == PERMUTED_10
    assert [permuted(i, 1_000_003, 7, 1) for i in (0, 1, 1_000_003)] == PERMUTED_BIG
    # A square, where rounding the root up or down makes other rows and columns.
    assert [permuted(i, 16, 42, 0) for i in range(16)] == [4, 14, 15, 0, 8, 13, 7, 9, 1, 5, 2, 11, 10, 3, 12, 6]


@pytest.mark.parametrize("size", [1000, 40_009])
def test_the_order_looks_random(size: int) -> None:
    """Every statistic within 5 standard deviations of a random permutation's."""
    order = np.array([permuted(i, size, 3, 0) for i in range(size)])
    following = np.array([permuted(size + i, size, 3, 0) for i in range(size)])
    sigma = size**-0.5
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 * sigma
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 * sigma
    assert abs(np.corrcoef(order, following)[0, 1]) < 5 * sigma
    assert (order == np.arange(size)).sum() <= 10  # Poisson(1)
    assert (np.diff(order) == 1).sum() <= 10  # Poisson(1)
    jumps = len(np.unique(np.diff(order) % size)) / size
    assert jumps == pytest.approx(1 - np.exp(-1), abs=5 * sigma)
    tenths = np.histogram2d(order, np.arange(size), bins=10)[0]
    chi_square = ((tenths - size / 100) ** 2 / (size / 100)).sum()
    assert abs(chi_square - 81) < 5 * (2 * 81) ** 0.5


def test_tiny_data_sets_get_every_order() -> None:
    orders = Counter(tuple(permuted(i, 3, seed, 0) for i in range(3)) for seed in range(600))
    assert len(orders) == 6
    assert min(orders.values()) > 50


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_a_blend_keeps_its_shares_in_every_prefix(weights: list[float]) -> None:
    if min(weights) / sum(weights) < 2 / CYCLE:
        return
    cycle = BlendCycle(weights)
    assert sum(cycle.counts) == CYCLE
    exact = np.array(weights) / sum(weights)
    assert np.abs(np.array(cycle.counts) / CYCLE - exact).max() <= 1 / CYCLE
    for samples in (1, 2, 7, 100, 12_345, CYCLE - 1, CYCLE, 3 * CYCLE + 17):
        share = np.array(cycle.counts) / CYCLE
        bound = 1 + len(weights) / 2 * share  # 1/2 of each data set's own, and its part of the others' 1/2
        assert (np.abs(cycle.drawn(samples) - samples * share) <= bound).all()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 5 * CYCLE))
def test_draws_count_up_and_are_found_again(weights: list[int], index: int) -> None:
    cycle = BlendCycle(weights)
    dataset, draw = cycle.locate(index)
    assert draw == cycle.drawn(index)[dataset]
    assert cycle.samples_before(dataset, draw) == index


def test_equal_weights_alternate() -> None:
    cycle = BlendCycle([1, 1, 1])
    assert [cycle.locate(i)[0] for i in range(9)] == [0, 1, 2] * 3


# ---- blend -----------------------------------------------------------------------------------------------------


def test_every_sample_once_an_epoch(two: tuple[Path, Path]) -> None:
    blend = open_training(_config(*two, weights=(3, 1)), seed=1, model_vocab_size=1000)
    drawn: list[list[int]] = [[], []]
    for i in range(4000):
        dataset, sample = blend.locate(i)
        drawn[dataset].append(sample)
    assert [len(d) for d in drawn] == [3000, 1000]
    for samples, size in zip(drawn, (10, 7), strict=True):
        for epoch in range(len(samples) // size):
            assert sorted(samples[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert blend.epochs(4000) == [300, 1000 / 7]


@pytest.mark.parametrize(("fractions", "warns"), [((0.05, 0.05), False), ((0.05, 0.2), True)])
def test_folders_split_at_different_fractions_are_warned_of(two: tuple[Path, Path], fractions, warns) -> None:
    for folder, fraction in zip(two, fractions, strict=True):
        values = json.loads((folder / "manifest.json").read_text())
        values["recipe"]["validation_fraction"] = fraction
        (folder / "manifest.json").write_text(json.dumps(values))
    said = split_warning(open_training(_config(*two), seed=1, model_vocab_size=1000))
    assert (f"({two[0]} 0.05, {two[1]} 0.2)" in said) is warns and bool(said) is warns


def test_weights_whose_sum_is_no_float() -> None:
    cycle = BlendCycle([1e308, 1e308])
    assert [sum(cycle.locate(draw)[0] == dataset for draw in range(1000)) for dataset in (0, 1)] == [500, 500]


def test_items_are_the_located_samples(two: tuple[Path, Path]) -> None:
    blend = open_training(_config(*two), seed=1, model_vocab_size=1000)
    for i in (0, 1, 17, 10**9):
        dataset, sample = blend.locate(i)
        first = (0, 500)[dataset] + sample * T
        np.testing.assert_array_equal(blend[i], np.arange(first, first + T + 1))


def test_seeds_give_different_orders_and_one_seed_the_same(two: tuple[Path, Path]) -> None:
    def order(seed: int) -> list[tuple[int, int]]:
        blend = open_training(_config(*two), seed=seed, model_vocab_size=1000)
        return [blend.locate(i) for i in range(50)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_order_of_a_run_is_this_one_for_ever(two: tuple[Path, Path]) -> None:
    """Blend, seed, number of the data set and draw: also where `permuted` itself is as it was."""
    blend = open_training(_config(*two, weights=(2, 1)), seed=42, model_vocab_size=1000)
    assert [blend.locate(i) for i in range(12)] == ORDER_OF_TWO


def test_data_sets_of_one_size_have_orders_of_their_own(write_folder: WriteFolder) -> None:
    """Translations of each other, or the parts of one corpus, would be read in step."""
    folders = [write_folder(name, train=_shards(41)) for name in "ab"]
    blend = open_training(_config(*folders), seed=1, model_vocab_size=1000)
    drawn = [blend.locate(i) for i in range(20)]
    assert [s for d, s in drawn if d == 0] != [s for d, s in drawn if d == 1]


def test_a_negative_index_is_refused(two: tuple[Path, Path]) -> None:
    with pytest.raises(IndexError, match="negative"):
        open_training(_config(*two), seed=1, model_vocab_size=1000)[-1]


def test_description_is_json_with_the_numbers(two: tuple[Path, Path]) -> None:
    described = open_training(_config(*two, weights=(3, 1)), seed=5, model_vocab_size=1000).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["seed"] == 5
    assert described["seq_length"] == T
    first, second = described["datasets"]
    assert (first["tokens"], first["samples"], first["weight"]) == (41, 10, 0.75)
    assert (second["tokens"], second["samples"], second["weight"]) == (29, 7, 0.25)
    assert len(first["manifest_sha256"]) == 64


def test_a_moved_folder_is_the_same_data(two: tuple[Path, Path]) -> None:
    before = open_training(_config(*two), seed=5, model_vocab_size=1000).describe()
    moved = two[0].rename(two[0].with_name("moved"))
    after = open_training(_config(moved, two[1]), seed=5, model_vocab_size=1000).describe()
    assert description_differences(before, after) == []


def test_another_weight_seed_or_folder_is_a_difference(two: tuple[Path, Path]) -> None:
    base = open_training(_config(*two), seed=5, model_vocab_size=1000).describe()

    def changed(config: DataConfig, seed: int = 5) -> list[str]:
        return description_differences(base, open_training(config, seed=seed, model_vocab_size=1000).describe())

    assert changed(_config(*two), seed=6) == ["data seed: 5 -> 6"]
    assert any("weight: 0.5 -> 0.75" in line for line in changed(_config(*two, weights=(3, 1))))
    assert any("manifest_sha256" in line for line in changed(_config(two[1], two[0])))
    assert changed(_config(two[0])) == ["number of data sets: 2 -> 1"]
    assert "data seq_length: 4 -> 2" in changed(_config(*two, seq_length=2))
    # Of another version of the package, which drew other samples from the same data and seed.
    assert description_differences(base | {"order": "older"}, base) == [f"data order: older -> {ORDER}"]


def test_weights_by_tokens(write_folder: WriteFolder) -> None:
    """Parts of one corpus are read as often as each other, however large they are."""
    folders = [write_folder(name, train=_shards(T * samples + 1)) for name, samples in (("a", 300), ("b", 10))]
    data = DataConfig(datasets=tuple(DatasetConfig(path=str(f), weight="tokens") for f in folders), seq_length=T)
    blend = open_training(data, seed=5, model_vocab_size=1000)
    assert blend.epochs(3100) == pytest.approx([10, 10], rel=0.02)
    assert data_problems(data) == []
    mixed = (data.datasets[0], DatasetConfig(path="b"))
    ((key, message),) = data_problems(data.model_copy(update={"datasets": mixed}))
    assert key == ("data", "datasets", "1", "weight") and "`tokens` for all" in message


def test_documents_that_end_differently(write_folder: WriteFolder) -> None:
    a, b = (write_folder(name, train=_shards(20), eos_id=eos) for name, eos in (("a", 2), ("b", 3)))
    with pytest.raises(DataError, match=r"documents end with id 2 in .* and with id 3"):
        open_training(_config(a, b), seed=5, model_vocab_size=1000)


def test_different_tokenizers(write_folder: WriteFolder) -> None:
    a = write_folder("a", train=_shards(20))
    b = write_folder("b", train=_shards(20), tokenizer="other pieces")
    with pytest.raises(DataError, match="different tokenizers") as caught:
        open_training(_config(a, b), seed=0, model_vocab_size=1000)
    assert str(a) in caught.value.problem
    assert str(b) in caught.value.problem


def test_vocabulary_smaller_than_a_token_id(two: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=r"vocabulary smaller than a token id: model.vocab_size is 999") as caught:
        open_training(_config(*two), seed=0, model_vocab_size=999)
    assert "ids up to 999" in caught.value.problem
    assert "model.vocab_size to 1000" in caught.value.fix


def test_a_weight_too_small_to_be_drawn(two: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=r"weight 1e-06 is a share of 1.0e-06, too small"):
        open_training(_config(*two, weights=(1.0, 1e-6)), seed=0, model_vocab_size=1000)


def test_lengths_must_agree(two: tuple[Path, Path]) -> None:
    streams = [TokenStream(folder, "train") for folder in two]
    with pytest.raises(ValueError, match="one seq_length"):
        BlendedDataset([PackedDataset(streams[0], 4), PackedDataset(streams[1], 5)], [1, 1], 0)


# ---- validation ------------------------------------------------------------------------------------------------


def test_validation_blends_the_splits(two: tuple[Path, Path]) -> None:
    validation = open_validation(_config(*two), num_samples=6)
    assert validation.available == 7  # 5 and 3 samples, alternating: the eighth would be a fourth of b
    starts = [int(validation[i][0]) for i in range(7)]
    assert len(set(starts)) == 7
    assert sorted(starts[1::2]) == [500, 504, 508]
    assert set(starts[::2]) < {0, 4, 8, 12, 16}


def test_validation_of_one_folder_is_the_whole_split(two: tuple[Path, Path]) -> None:
    validation = open_validation(_config(two[0]), num_samples=5)
    assert sorted(int(validation[i][0]) for i in range(5)) == [0, 4, 8, 12, 16]
    with pytest.raises(IndexError, match="validation sample 5 of 5"):
        validation[5]


def test_few_validation_samples_are_from_all_over_the_split(write_folder: WriteFolder) -> None:
    """In the order of the files they would all be of the first source, whatever the others are."""
    folder = write_folder("a", train=_shards(41), validation=_shards(T * 1000 + 1))
    few, more = (open_validation(_config(folder), num_samples=samples) for samples in (100, 200))
    starts = [int(few[i][0]) // T for i in range(100)]
    assert len(set(starts)) == 100
    assert 350 < sum(starts) / 100 < 650
    assert all(any(tenth <= start < tenth + 100 for start in starts) for tenth in range(0, 1000, 100))
    assert [int(more[i][0]) // T for i in range(100)] == starts


def test_too_few_validation_samples(two: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="validation reads 9 samples of 4 tokens") as caught:
        open_validation(_config(*two), num_samples=9)
    assert "validation.num_samples to at most" in caught.value.fix


def test_no_validation_split(write_folder: WriteFolder) -> None:
    with pytest.raises(DataError, match="the validation split is empty"):
        open_validation(_config(write_folder("a", train=_shards(20))), num_samples=1)


def test_validation_split_shorter_than_a_sample(write_folder: WriteFolder) -> None:
    folder = write_folder("a", train=_shards(20), validation=_shards(4))
    with pytest.raises(DataError, match="the validation split has 4 tokens"):
        open_validation(_config(folder), num_samples=1)


def test_validation_lengths_must_agree(two: tuple[Path, Path]) -> None:
    packed = [PackedDataset(TokenStream(folder, "validation"), T + i) for i, folder in enumerate(two)]
    with pytest.raises(ValueError, match="one seq_length"):
        ValidationDataset(packed, [1, 1], 2)


# ---- documentation ---------------------------------------------------------------------------------------------


def test_the_documented_numbers_are_true() -> None:
    page = Path(__file__).parents[3] / "docs" / "data_format.md"
    assert doctest.testfile(str(page), module_relative=False) == (0, 9)
