"""What is said of a tokenizer: of good, collapsed and useless ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.tokenizer_health import Baseline, Health, judge, measure
from beit3.vqkd import VQKD, VQKDConfig, kmeans

SHAPE = VQKDConfig(
    image_size=16, patch_size=8, hidden=16, mlp=24, heads=2, encoder_layers=1, decoder_layers=1,
    codebook_size=8, code_dim=4, teacher_dim=6,
)  # fmt: skip
GOOD = Health(
    pictures=100, words=4000, codes=64, used=0.9, dead=6, perplexity=30.0, expected=64.0,
    held_out=True, cosine=0.8, kmeans=0.9, floor=0.4, centres=64, baseline_features=2560,
)  # fmt: skip


def features(pictures: int, seed: int = 0) -> Tensor:
    """Of five kinds of patches, with a little noise: `[pictures, 4, 6]`."""
    random = torch.Generator().manual_seed(seed)
    kinds = torch.eye(6)[:5]
    picked = kinds[torch.randint(5, (pictures, 4), generator=random)]
    return 3 * picked + 0.1 * torch.randn(pictures, 4, 6, generator=random)


def images(count: int) -> Tensor:
    random = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=random, dtype=torch.uint8)


def test_kmeans_and_the_floor_by_hand() -> None:
    learned, target = features(40), features(10, seed=1)
    baseline = Baseline.of(learned.split(16), 8)
    rows = F.normalize(learned, dim=-1).flatten(0, 1)
    torch.testing.assert_close(baseline.centres, kmeans(rows, 8, 5))
    torch.testing.assert_close(baseline.mean, F.normalize(rows.mean(0), dim=-1))
    found, floor = baseline.cosines(target)
    held = F.normalize(target, dim=-1).flatten(0, 1)
    assert found == pytest.approx(float((held @ baseline.centres.T).amax(-1).sum()), rel=1e-5)
    assert floor == pytest.approx(float((held @ baseline.mean).sum()), rel=1e-5)
    assert found / 40 > 0.98 > 0.6 > floor / 40


def test_kmeans_has_fewer_centres_where_there_are_fewer_features() -> None:
    assert Baseline.of([features(1)], 8).centres.shape == (4, 6)
    many = Baseline.of([features(400)], 8)
    assert many.features == 40 * 8 and many.centres.shape == (8, 6)


def test_measuring_agrees_with_the_tokenizer() -> None:
    torch.manual_seed(0)
    model = VQKD(SHAPE).train()
    pictures, target = images(6), features(6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    baseline = Baseline.of([features(40)], 8)
    batches = list(zip(pictures.split(4), target.split(4), strict=True))
    health = measure(model, batches, baseline)
    assert model.training  # as it was, and nothing was learned
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        results = model(pictures, target)
    assert (health.pictures, health.words, health.codes) == (6, 24, 8)
    assert health.used * 8 == len(results["codes"].unique()) == 8 - health.dead
    assert health.cosine == pytest.approx(float(results["cosine"]), abs=1e-5)
    assert health.expected == pytest.approx(8 * (1 - (7 / 8) ** 24))
    assert health.kmeans is not None and health.kmeans > 0.9
    alone = measure(model, [(pictures, None)])
    assert (alone.used, alone.cosine, alone.gain) == (health.used, None, None)
    assert set(alone.metrics) == {"used", "dead", "perplexity"}
    with pytest.raises(ValueError, match="no pictures"):
        measure(model, [])


def test_a_good_tokenizer_is_usable() -> None:
    judged = judge(GOOD)
    assert judged.verdict == "usable" and not judged.advice
    assert judged.text.startswith("The tokenizer is usable.\n- Usage: 58 of 64 codes")
    assert "cosine 0.800" in judged.text and "k-means with 64 centres 0.900 (80%" in judged.text
    assert "pixels only" in judged.text  # what is compared is not the same


@pytest.mark.parametrize(
    ("changes", "verdict", "advice"),
    [
        ({"used": 1 / 64, "dead": 63, "perplexity": 1.0}, "unusable", "codebook-size 8"),
        ({"used": 0.3, "dead": 45}, "doubtful", "revive dead codes"),
        ({"perplexity": 2.0}, "doubtful", "codebook-size 8"),
        ({"cosine": 0.42}, "unusable", "train longer"),
        ({"cosine": 0.3}, "unusable", "train longer"),
        ({"cosine": 0.55}, "doubtful", "decoder-layers 3"),
        ({"cosine": 0.95}, "usable", ""),  # above k-means: its decoder reads the other codes
    ],
)
def test_what_is_wrong_is_said_with_what_to_try(changes: dict, verdict: str, advice: str) -> None:
    judged = judge(replace(GOOD, **changes), trained_on=50)
    assert judged.verdict == verdict
    assert advice in " ".join(judged.advice)
    assert bool(judged.advice) == (verdict != "usable")
    if judged.advice:
        assert "(there were 50)" in judged.text


def test_the_verdict_knows_what_it_does_not_know() -> None:
    assert "of others this says nothing" in judge(replace(GOOD, held_out=False)).text
    assert "measure on more pictures" in judge(replace(GOOD, words=100)).text
    blind = judge(replace(GOOD, cosine=None, kmeans=None, floor=None))
    assert blind.verdict == "usable" and "not measured, since there is no teacher" in blind.text
    revived = judge(replace(GOOD, used=0.2), revived=True)
    assert "revive" not in " ".join(revived.advice)
    # 24 words can't use 64 codes: that is not the tokenizer's fault.
    few = replace(GOOD, words=24, pictures=1, used=18 / 64, expected=20.1, perplexity=15.0)
    assert judge(few).verdict == "usable"
