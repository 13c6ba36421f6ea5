"""Corruption: how many patches and tokens are hidden, where, and of which side of a pair."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from beit3.masking import Masking, block_mask, token_mask


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("grid", [1, 2, 3, 6, 14, 16])
def test_block_mask_hides_exactly_the_count(grid: int) -> None:
    cells = grid * grid
    for count in {0, 1, 2, cells // 4, round(0.4 * cells), cells - 1, cells}:
        if not 0 <= count <= cells:
            continue
        for seed in range(10):
            mask = block_mask(grid, count, rng(seed))
            assert mask.shape == (grid, grid)
            assert mask.dtype == bool
            assert mask.sum() == count


@pytest.mark.parametrize("min_block", [1, 4, 16, 400])
def test_block_mask_hides_exactly_the_count_whatever_the_block(min_block: int) -> None:
    for seed in range(20):
        assert block_mask(14, 75, rng(seed), min_block=min_block).sum() == 75


@pytest.mark.parametrize("count", [-1, 17])
def test_block_mask_refuses_an_impossible_count(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count {count} is not within 0\.\.16"):
        block_mask(4, count, rng(0))


def hidden_neighbours(mask: np.ndarray) -> int:
    """Pairs of cells side by side that are both hidden."""
    return int((mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum())


@pytest.mark.parametrize(("grid", "count"), [(14, 75), (16, 102), (14, 30)])
def test_block_mask_is_blocky(grid: int, count: int) -> None:
    blocks = scattered = 0
    for seed in range(30):
        blocks += hidden_neighbours(block_mask(grid, count, rng(seed)))
        alone = np.zeros(grid * grid, bool)
        alone[rng(seed).choice(grid * grid, count, replace=False)] = True
        scattered += hidden_neighbours(alone.reshape(grid, grid))
    assert blocks > 1.3 * scattered


def test_block_mask_reaches_every_cell() -> None:
    hidden = sum(block_mask(14, 75, rng(seed)).astype(int) for seed in range(200))
    assert np.min(hidden) > 0


def test_block_mask_is_a_function_of_the_seed() -> None:
    first, again, other = (block_mask(14, 75, rng(seed)) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_block_masks_of_a_seed_stay_what_they_are() -> None:
    """A run that is resumed with a later version hides what it would have hidden; where it doesn't,
    `pipelines.samples.SEEDING` is raised."""
    seen = hashlib.sha256()
    for grid, count in ((14, 78), (16, 102), (6, 14)):
        for seed in range(50):
            seen.update(np.packbits(block_mask(grid, count, rng(seed))).tobytes())
    assert seen.hexdigest()[:16] == "d4a1d777993cccf0"


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("length", [3, 4, 12, 64])
def test_token_mask_spares_the_ends_and_hides_at_least_one(length: int, ratio: float) -> None:
    for seed in range(50):
        mask = token_mask(length, ratio, rng(seed))
        assert mask.shape == (length,)
        assert not mask[0]
        assert not mask[-1]
        assert mask.sum() >= 1
        if ratio == 1.0:
            assert mask.sum() == length - 2


@pytest.mark.parametrize(("length", "ratio"), [(0, 0.5), (1, 0.5), (2, 0.5), (2, 1.0), (9, 0.0)])
def test_token_mask_of_nothing_to_hide_is_empty(length: int, ratio: float) -> None:
    assert token_mask(length, ratio, rng(0)).sum() == 0


def test_token_mask_hides_the_ratio_on_average() -> None:
    draws = np.stack([token_mask(12, 0.15, rng(seed)) for seed in range(4000)])
    counts = draws.sum(1)
    assert set(counts) == {1, 2}  # 10 tokens x 0.15
    assert abs(counts.mean() - 1.5) < 0.03
    places = draws.mean(0)[1:-1]
    assert (abs(places - 0.15) < 0.03).all()  # no place is favoured


def test_masking_hides_the_same_number_of_patches_of_every_image() -> None:
    masking = Masking(image=0.4)
    for seed in range(20):
        mask = masking.of_image(14, rng(seed))
        assert mask.shape == (196,)
        assert mask.sum() == 78


def test_separate_masking_corrupts_one_side_of_a_pair() -> None:
    masking = Masking(pair_text_share=0.25)
    captions = 0
    for seed in range(400):
        patches, tokens = masking.of_pair(6, 12, rng(seed))
        assert patches.sum() in (0, round(0.4 * 36))
        assert tokens.sum() in (0, 5)  # half of ten
        assert (patches.sum() > 0) != (tokens.sum() > 0)
        captions += int(tokens.any())
    assert 70 <= captions <= 130  # a quarter of 400


@pytest.mark.parametrize(("share", "side"), [(0.0, 0), (1.0, 1)])
def test_separate_masking_can_stay_on_one_side(share: float, side: int) -> None:
    masking = Masking(pair_text_share=share)
    for seed in range(50):
        masks = masking.of_pair(6, 12, rng(seed))
        assert masks[side].any()
        assert not masks[1 - side].any()


def test_joint_masking_corrupts_both_sides() -> None:
    masking = Masking(pairs="joint")
    for seed in range(50):
        patches, tokens = masking.of_pair(6, 12, rng(seed))
        assert patches.sum() == round(0.4 * 36)
        assert tokens.sum() == 5


def test_of_pair_is_a_function_of_the_seed() -> None:
    for masking in (Masking(), Masking(pairs="joint")):
        first, again = (masking.of_pair(6, 12, rng(9)) for _ in range(2))
        assert (first[0] == again[0]).all()
        assert (first[1] == again[1]).all()


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["image", "text", "pair_text", "pair_text_share"])
def test_masking_refuses_what_is_no_share(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"masking\.{name}: "):
        Masking(**{name: value})  # type: ignore[arg-type]


def test_masking_refuses_an_empty_block() -> None:
    with pytest.raises(ValueError, match=r"masking\.min_block: .*got 0"):
        Masking(min_block=0)
