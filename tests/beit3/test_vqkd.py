"""VQ-KD: the codebook's moving averages, start and revival; the straight-through gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from beit3.optimisation import parameter_groups
from beit3.vqkd import (
    PRESETS,
    VQKD,
    Codebook,
    VQKDConfig,
    codebook_health,
    kmeans,
    load,
    save,
    usage_health,
)

TINY = VQKDConfig(
    image_size=16,
    patch_size=8,
    hidden=16,
    mlp=24,
    heads=2,
    encoder_layers=1,
    decoder_layers=1,
    codebook_size=8,
    code_dim=4,
    teacher_dim=6,
    decay=0.9,
)


def units(count: int, dim: int = 4, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dim, generator=random), dim=-1)


def started(vectors: Tensor, **changes: Any) -> Codebook:
    """A codebook with these vectors, past its k-means start."""
    config = replace(TINY, codebook_size=len(vectors), code_dim=vectors.shape[1], **changes)
    codebook = Codebook(config)
    codebook.vectors.copy_(vectors)
    codebook.ready.fill_(True)
    return codebook


def batch(images: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (images, 3, 16, 16), generator=random, dtype=torch.uint8)
    return pictures, torch.randn(images, 4, 6, generator=random)


def build(**changes: Any) -> VQKD:
    torch.manual_seed(0)
    return VQKD(replace(TINY, **changes))


# -- the codebook --------------------------------------------------------------------------------


def test_start_finds_the_clusters_of_the_features() -> None:
    centres = torch.eye(4)
    random = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(40, 4, generator=random)
    features = F.normalize(centres.repeat_interleave(10, 0) + noise, dim=-1)
    codebook = Codebook(replace(TINY, codebook_size=4))
    codebook.start(features)
    assert bool(codebook.ready)
    means = F.normalize(features.view(4, 10, 4).mean(1), dim=-1)
    assert sorted((codebook.vectors @ means.T).argmax(-1).tolist()) == [0, 1, 2, 3]
    ordered = codebook.vectors[codebook.nearest(means)]
    torch.testing.assert_close(ordered, means)


def test_start_happens_once() -> None:
    codebook = Codebook(TINY)
    codebook.start(units(50, seed=1))
    before = codebook.vectors.clone()
    codebook.start(units(50, seed=2))
    assert torch.equal(codebook.vectors, before)


def test_start_copes_with_fewer_distinct_features_than_codes() -> None:
    codebook = Codebook(TINY)
    codebook.start(units(3))
    torch.testing.assert_close(codebook.vectors.norm(dim=-1), torch.ones(8))
    assert len(codebook.vectors.unique(dim=0)) == 8


def test_nearest_is_the_largest_cosine() -> None:
    codebook = started(units(8))
    features = units(20, seed=1)
    distances = (features[:, None] - codebook.vectors[None]).square().sum(-1)
    assert torch.equal(codebook.nearest(features), distances.argmin(-1))


def test_update_is_the_moving_average_computed_by_hand() -> None:
    vectors, features = units(3), units(5, seed=1)
    codebook = started(vectors)
    codebook.update(features, torch.tensor([0, 2, 0, 0, 2]))
    for code, members in ((0, [0, 2, 3]), (2, [1, 4])):
        mean = sum(features[m] for m in members) / len(members)
        mean = mean / mean.norm()  # type: ignore[union-attr]
        moved = 0.9 * vectors[code] + 0.1 * mean
        torch.testing.assert_close(codebook.vectors[code], moved / moved.norm())
    assert torch.equal(codebook.vectors[1], vectors[1])  # unused, no revival: as it was
    torch.testing.assert_close(codebook.usage, torch.tensor([0.9 + 0.3, 0.9, 0.9 + 0.2]))


def test_codes_stay_unit_vectors_and_unused_ones_stay_put() -> None:
    codebook = started(units(8))
    unused = codebook.vectors[5:].clone()
    for step in range(30):
        features = units(16, seed=step + 1)
        codebook.update(features, torch.arange(16) % 5)
    torch.testing.assert_close(codebook.vectors.norm(dim=-1), torch.ones(8))
    assert torch.equal(codebook.vectors[5:], unused)


def test_revival_replaces_dead_codes_by_the_worst_served_features() -> None:
    codebook = started(torch.eye(4), revive_below=0.5)
    far = F.normalize(torch.tensor([[-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, 1.0]]), dim=-1)
    features = torch.cat([torch.eye(4)[:2].repeat(4, 1), far[:1]])
    codebook.usage.copy_(torch.tensor([1.0, 1.0, 1.0, 0.01]))
    codebook.update(features, torch.tensor([0, 1] * 4 + [0]))
    torch.testing.assert_close(codebook.vectors[3], far[0])  # was dead
    torch.testing.assert_close(codebook.vectors[2], torch.eye(4)[2])  # unused, but not dead yet
    assert float(codebook.usage[3]) == 1.0
    assert int(codebook.nearest(far[:1])) == 3


def test_codes_die_of_disuse_and_are_revived() -> None:
    codebook = started(torch.eye(4), revive_below=0.5)
    features = units(12, seed=3).abs() * torch.tensor([1.0, 1.0, 0.1, 0.1])
    features = F.normalize(features, dim=-1)
    for _ in range(6):  # 0.9^6 = 0.53: not dead
        codebook.update(features, torch.arange(12) % 2)
    assert torch.equal(codebook.vectors[2:], torch.eye(4)[2:])
    codebook.update(features, torch.arange(12) % 2)  # 0.9^7 = 0.48
    assert (codebook.vectors[2:, None] == features).all(-1).any(-1).all()
    assert not torch.equal(codebook.vectors[2], codebook.vectors[3])


def test_without_revival_dead_codes_stay() -> None:
    codebook = started(torch.eye(4))
    codebook.usage.fill_(0.0)
    codebook.update(units(4, seed=1), torch.zeros(4, dtype=torch.long))
    assert torch.equal(codebook.vectors[1:], torch.eye(4)[1:])


# -- the tokenizer -------------------------------------------------------------------------------


def test_a_training_step_starts_the_codebook_from_its_features() -> None:
    model = build().train()
    images, target = batch(images=8)
    features = model.features(images).detach()
    expected = Codebook(TINY)
    expected.start(features)
    expected.update(features, expected.nearest(features.flatten(0, 1)))
    model(images, target)
    torch.testing.assert_close(model.codebook.vectors, expected.vectors)


def test_loss_is_cosine_distance_plus_commitment() -> None:
    model = build().eval()
    images, target = batch()
    with torch.no_grad():
        results = model(images, target)
        features = model.features(images)
        codes = model.codebook.nearest(features.flatten(0, 1)).view(3, 4)
        reconstruction = model.decode(codes)
    cosine = (reconstruction * target).sum(-1) / reconstruction.norm(dim=-1) / target.norm(dim=-1)
    commitment = (features - model.codebook.vectors[codes]).square().mean()
    assert torch.equal(results["codes"], codes)
    torch.testing.assert_close(results["cosine"], cosine.mean())
    torch.testing.assert_close(results["commitment"], commitment)
    torch.testing.assert_close(results["loss"], 1 - cosine.mean() + commitment)


def test_gradients_pass_the_quantiser_straight_through() -> None:
    model = build().eval()
    images, target = batch()
    arrived: list[Tensor] = []
    hook = model.from_code.register_full_backward_hook(
        lambda _, given, __: arrived.append(given[0])
    )
    (1 - model(images, target)["cosine"]).backward()
    hook.remove()
    encoder = [*model.embedding.named_parameters(), *model.encoder.named_parameters()]
    encoder += list(model.to_code.named_parameters())
    through = {n: p.grad.clone() for n, p in encoder if p.grad is not None}
    assert float(arrived[0].abs().sum()) > 0

    model.zero_grad()
    model.features(images).backward(arrived[0])  # what an identity in the quantiser's place gives
    for name, parameter in encoder:
        if parameter.grad is not None:
            torch.testing.assert_close(through[name], parameter.grad)
    assert float(through["0.weight"].abs().sum()) > 0


def test_commitment_pulls_the_encoder_not_the_codebook() -> None:
    model = build().eval()
    images, target = batch()
    model(images, target)["commitment"].backward()
    weight = model.to_code[0].weight
    assert isinstance(weight, Tensor)
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0
    assert model.from_code.weight.grad is None or not model.from_code.weight.grad.any()
    assert not model.codebook.vectors.requires_grad
    assert not any(name.startswith("codebook") for name, _ in model.named_parameters())
    assert "codebook.vectors" in model.state_dict()


def test_encode_is_deterministic_and_leaves_the_codebook_alone() -> None:
    model = build().eval()
    images, target = batch()
    before = {k: v.clone() for k, v in model.codebook.state_dict().items()}
    words = model.encode(images)
    assert words.shape == (3, 4)
    assert words.dtype == torch.long
    assert torch.equal(model.encode(images), words)
    assert torch.equal(torch.cat([model.encode(image[None]) for image in images]), words)
    model(images, target)  # nor does evaluation
    for name, value in model.codebook.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("shape", [(3, 9, 6), (3, 4, 7), (2, 4, 6)])
def test_a_teacher_of_another_shape_is_refused(shape: tuple[int, int, int]) -> None:
    model = build()
    with pytest.raises(ValueError, match=r"expected \[3, 4, 6\].*need one patch grid") as error:
        model(batch()[0], torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
    assert not bool(model.codebook.ready)


def test_visual_words_must_fit_16_bits() -> None:
    VQKDConfig(codebook_size=65536)
    with pytest.raises(ValueError, match="codebook_size 65537 is over 65536"):
        VQKDConfig(codebook_size=65537)


def test_codebook_health() -> None:
    health = codebook_health(torch.tensor([[0, 0], [3, 3]]), 8)
    assert health == {"used": 0.25, "dead": 6.0, "perplexity": pytest.approx(2.0)}


def test_usage_health_counts_what_is_above_the_least() -> None:
    health = usage_health(torch.tensor([4.0, 4.0, 0.001, 0.0]), least=0.01)
    assert (health["used"], health["dead"]) == (0.5, 2.0)
    assert health["perplexity"] == pytest.approx(2.0, abs=0.01)


# -- the facts of BEiT v2 --------------------------------------------------------------------------


def test_the_presets_are_beit_v2_s() -> None:
    base = PRESETS["base"]
    assert (base.codebook_size, base.code_dim, base.decay) == (8192, 32, 0.99)
    assert (base.encoder_layers, base.decoder_layers, base.teacher_dim) == (12, 3, 512)
    assert base.image_size // base.patch_size == 14
    assert base.revive_below == 0 < PRESETS["tiny"].revive_below
    assert PRESETS["base14"] == replace(base, patch_size=14)
    with torch.device("meta"):
        model = VQKD(base)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 12 + 1 + 2 * 3 + 1 and {m.eps for m in norms} == {1e-6}
    assert model.decoder_positions.shape == (1 + 14 * 14, 768)
    assert model.decoder_cls_token.shape == (768,)


@pytest.mark.parametrize("depth", [1, 3])
def test_the_decoder_reads_codes_its_cls_and_its_positions(depth: int) -> None:
    model = build(decoder_layers=depth).eval()
    codes = torch.tensor([[0, 1, 2, 3], [3, 3, 3, 3]])
    plain = model.decode(codes)
    assert plain.shape == (2, 4, 6) and len(model.decoder.blocks) == depth
    assert len(plain[1].unique(dim=0)) == 4  # one code, but at four positions
    with torch.no_grad():
        model.decoder_cls_token.add_(torch.randn(16))
    assert not torch.allclose(model.decode(codes), plain)


def test_positions_and_cls_tokens_do_not_decay() -> None:
    model = torch.nn.ModuleDict({"tokenizer": build()})
    names = {id(p): name for name, p in model.named_parameters()}
    exempt = {
        names[id(p)]
        for group in parameter_groups(model, weight_decay=0.1)
        if not group["weight_decay"]
        for p in group["params"]
    }
    assert {f"tokenizer.{n}" for n in ("embedding.positions", "decoder_positions")} <= exempt
    assert {f"tokenizer.{n}" for n in ("embedding.cls_token", "decoder_cls_token")} <= exempt
    assert "tokenizer.from_code.weight" not in exempt


@pytest.mark.parametrize("wrong", ["floats", "size", "channels"])
def test_pictures_are_bytes_of_the_tokenizers_size(wrong: str) -> None:
    """Of floats nobody can tell whether they are in [0, 1], [-1, 1] or [0, 255]."""
    images = batch()[0]
    given = {
        "floats": images.float() / 255,
        "size": images[:, :, :8],
        "channels": images[:, :1],
    }[wrong]
    with pytest.raises(ValueError, match=r"expected uint8 \[n, 3, 16, 16\], got (float32|uint8)"):
        build().encode(given)


def test_codes_are_found_in_full_precision_under_autocast() -> None:
    vectors = F.normalize(torch.ones(64, 16) + 2e-3 * torch.randn(64, 16), dim=-1)
    codebook = started(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codebook.nearest(vectors), torch.arange(64))
        other = Codebook(replace(TINY, codebook_size=4, code_dim=16))
        other.start(vectors)
    assert torch.equal(other.vectors, kmeans(vectors, 4))


def test_scores_are_the_cosines_of_words_with_their_features() -> None:
    model = build().eval()
    images, _ = batch()
    codes, scores = model.encode_scored(images)
    assert torch.equal(codes, model.encode(images))
    cosines = model.features(images) @ model.codebook.vectors.T
    torch.testing.assert_close(scores, cosines.amax(-1))


def test_a_tokenizer_passes_through_a_folder(tmp_path: Path) -> None:
    model = build().train()
    model(*batch())
    save(tmp_path, model)
    again = load(tmp_path)
    assert again.config == model.config and not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# -- several workers -----------------------------------------------------------------------------


def _run_codebook(features: list[Tensor]) -> dict[str, Tensor]:
    """K-means start, then an update with revival per further batch."""
    codebook = Codebook(replace(TINY, revive_below=0.6, decay=0.8))
    codebook.start(features[0])
    for part in features[1:]:
        codebook.update(part, codebook.nearest(part))
    return codebook.state_dict()


def _batches() -> list[Tensor]:
    # Only few directions, so that some codes fall out of use and are revived.
    return [units(24), *(units(24, seed=s).abs() for s in range(1, 6))]


def _train(rank: int, world: int) -> dict[str, Tensor]:
    """Six optimizer steps on a global batch of 8 pictures, of which a worker has its share."""
    model = build(revive_below=0.9, decay=0.8).train()
    # The keys' bias has no gradient but rounding; a large eps keeps Adam from magnifying that.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1)
    for step in range(6):
        images, target = (part[rank::world].contiguous() for part in batch(images=8, seed=step))
        results = model(images, target)
        optimizer.zero_grad()
        results["loss"].backward()
        for parameter in model.parameters():
            if world > 1 and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
        optimizer.step()
    return model.state_dict()


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    codebook = _run_codebook([part[rank::2].contiguous() for part in _batches()])
    torch.save({"codebook": codebook, "model": _train(rank, 2)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_train_as_one_does(tmp_path: Path) -> None:
    """The codebook alone, with revival; and whole steps of the tokenizer."""
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    single = {"codebook": _run_codebook(_batches()), "model": _train(0, 1)}
    assert bool((single["codebook"]["usage"] != 1).any())
    moved = single["model"]["codebook.usage"]
    assert bool((moved > 1).any()) and bool((moved == 1).any())  # used, and just revived
    for part, states in single.items():
        for name, value in states.items():
            assert torch.equal(first[part][name], second[part][name]), name
            torch.testing.assert_close(first[part][name], value, rtol=2e-4, atol=2e-5)
