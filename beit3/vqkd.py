"""VQ-KD, the image tokenizer: pictures to visual words, distilled from a teacher's features.

Encoder -> l2-normalised code of low dimension -> nearest of the codebook -> decoder -> the
teacher's patch features. The codebook is updated by moving averages, never by gradients.

Source: "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers"
(arXiv 2208.06366) and microsoft/unilm `beit2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import ModelConfig
from beit3.device import to_device
from beit3.model import PatchEmbedding
from beit3.multiway import Encoder, Layout, Streams
from beit3.objectives import normalise


@dataclass(frozen=True)
class VQKDConfig:
    """Shape of the tokenizer; the defaults are BEiT v2's base."""

    image_size: int = 224
    patch_size: int = 16
    hidden: int = 768
    mlp: int = 3072
    heads: int = 12
    encoder_layers: int = 12
    decoder_layers: int = 3
    codebook_size: int = 8192
    code_dim: int = 32
    teacher_dim: int = 512
    """Width of the teacher's patch features."""
    decay: float = 0.99
    """Decay of the codebook's moving average."""
    revive_below: float = 0.0
    """Replace codes whose average use per step falls below this by features of the batch."""

    def __post_init__(self) -> None:
        if self.codebook_size > 65536:
            raise ValueError(
                f"codebook_size {self.codebook_size} is over 65536: visual words are uint16"
            )

    def transformer(self, layers: int) -> ModelConfig:
        return ModelConfig(
            layers=layers,
            hidden=self.hidden,
            mlp=self.mlp,
            heads=self.heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            attention="shared",
            multiway=False,
            sub_ln=False,
        )


PRESETS: dict[str, VQKDConfig] = {
    "tiny": VQKDConfig(
        image_size=48,
        patch_size=8,
        hidden=64,
        mlp=256,
        heads=4,
        encoder_layers=2,
        decoder_layers=1,
        codebook_size=256,
        code_dim=16,
        teacher_dim=64,
        decay=0.95,
        revive_below=0.02,
    ),
    "base": VQKDConfig(),
}


class Teacher(Protocol):
    """Gives the features that the tokenizer learns to reconstruct."""

    dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, height, width] -> [n, patches, dim]`, without gradients."""
        ...


class Codebook(nn.Module):
    """Unit vectors `[codes, dim]`, kept as moving averages of the features they stand for."""

    vectors: Tensor
    usage: Tensor
    ready: Tensor

    def __init__(self, config: VQKDConfig) -> None:
        super().__init__()
        self.decay, self.revive_below = config.decay, config.revive_below
        start = F.normalize(torch.randn(config.codebook_size, config.code_dim), dim=-1)
        self.register_buffer("vectors", start)
        self.register_buffer("usage", torch.ones(config.codebook_size))
        self.register_buffer("ready", torch.tensor(False))

    def nearest(self, features: Tensor) -> Tensor:
        """Unit features `[n, dim]` to codes `[n]`: largest cosine."""
        return (features @ self.vectors.T).argmax(-1)

    @torch.no_grad()
    def start(self, features: Tensor, iterations: int = 10) -> None:
        """K-means (cosine) over all workers' first features; every worker ends with the same."""
        if bool(self.ready):
            return
        features = _gather_rows(features)
        count = len(self.vectors)
        pick = torch.linspace(0, len(features) - 1, count, device=features.device).long()
        noise = torch.randn(count, features.shape[1], generator=torch.Generator().manual_seed(0))
        # A batch may hold fewer distinct features than codes: a little noise tells twins apart.
        vectors = F.normalize(features[pick] + 0.01 * noise.to(features), dim=-1)
        for _ in range(iterations):
            codes = (features @ vectors.T).argmax(-1)
            sums, counts = _sums(features, codes, count)
            used = counts > 0
            vectors[used] = F.normalize(sums[used] / counts[used, None], dim=-1)
        self.vectors.copy_(vectors)
        self.ready.fill_(True)

    @torch.no_grad()
    def update(self, features: Tensor, codes: Tensor) -> None:
        """Move used codes towards the mean of their features, over all workers."""
        sums, counts = _sums(features, codes, len(self.vectors))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        used = counts > 0
        means = F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
        moved = F.normalize(self.decay * self.vectors + (1 - self.decay) * means, dim=-1)
        self.vectors.copy_(torch.where(used[:, None], moved, self.vectors))
        self.usage.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        if self.revive_below > 0:
            self._revive(_gather_rows(features))

    def _revive(self, features: Tensor) -> None:
        dead = (self.usage < self.revive_below).nonzero().flatten()
        if not len(dead):
            return
        # The features that the codebook serves worst, spread evenly: the same on every worker.
        worst = (features @ self.vectors.T).amax(-1).argsort()[: 4 * len(dead)]
        step = max(1, len(worst) // len(dead))
        chosen = worst[::step][: len(dead)]
        self.vectors[dead[: len(chosen)]] = features[chosen]
        self.usage[dead[: len(chosen)]] = 1.0


class VQKD(nn.Module):
    """The tokenizer: `encode` is all that is needed once it is trained."""

    def __init__(self, config: VQKDConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.transformer(config.encoder_layers)
        self.grid = shape.grid
        self.embedding = PatchEmbedding(shape)
        self.encoder = Encoder(shape)
        self.to_code = nn.Sequential(
            nn.Linear(config.hidden, config.hidden),
            nn.Tanh(),
            nn.Linear(config.hidden, config.code_dim),
        )
        self.codebook = Codebook(config)
        self.from_code = nn.Linear(config.code_dim, config.hidden)
        self.decoder_positions = nn.Parameter(torch.empty(shape.patches, config.hidden))
        self.decoder = Encoder(config.transformer(config.decoder_layers))
        self.to_teacher = nn.Sequential(
            nn.Linear(config.hidden, config.hidden),
            nn.Tanh(),
            nn.Linear(config.hidden, config.teacher_dim),
        )
        nn.init.normal_(self.decoder_positions, std=0.02)

    def features(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, height, width]` to unit code features `[n, patches, code_dim]`, fp32."""
        tokens = self.embedding(normalise(images).to(self.embedding.positions.dtype))
        hidden = _encode_pictures(self.encoder, tokens)[:, 1:]
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(self.to_code(hidden.float()), dim=-1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, height, width]` to visual words `[n, patches]`."""
        features = self.features(images)
        return self.codebook.nearest(features.flatten(0, 1)).view(features.shape[:2])

    def decode(self, codes: Tensor) -> Tensor:
        """Visual words `[n, patches]` to the teacher's feature space `[n, patches, dim]`."""
        return self._decode(self.codebook.vectors[codes])

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Reconstruct the teacher's `target` `[n, patches, dim]`; in training, move the codebook.

        Returns the scalars `loss`, `cosine` (of the reconstruction), `commitment`, and
        `codes` `[n, patches]`.

        Raises:
            ValueError: the teacher's patch grid or width is not the tokenizer's.
        """
        expected = [len(images), self.grid**2, self.config.teacher_dim]
        if list(target.shape) != expected:
            raise ValueError(
                f"teacher features: expected {expected} [images, patches, dim], got "
                f"{list(target.shape)}: teacher and tokenizer need one patch grid"
            )
        features = self.features(images)
        flat = features.flatten(0, 1)
        if self.training:
            self.codebook.start(flat.detach())
        codes = self.codebook.nearest(flat.detach())
        quantised = self.codebook.vectors[codes].view_as(features)
        if self.training:
            self.codebook.update(flat.detach(), codes)
        straight_through = features + (quantised - features).detach()
        reconstruction = self._decode(straight_through)
        cosine = F.cosine_similarity(reconstruction.float(), target.float(), dim=-1).mean()
        commitment = F.mse_loss(features, quantised.detach())
        return {
            "loss": 1 - cosine + commitment,
            "cosine": cosine,
            "commitment": commitment,
            "codes": codes.view(features.shape[:2]),
        }

    def _decode(self, codes: Tensor) -> Tensor:
        hidden = self.from_code(codes) + self.decoder_positions
        return self.to_teacher(_encode_pictures(self.decoder, hidden))


def codebook_health(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """Usage and perplexity of visual words.

    Returns `used` (share of codes that occur), `dead` (number that don't), `perplexity`.
    """
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).float()
    share = counts / counts.sum().clamp(min=1)
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    used = int((counts > 0).sum())
    return {
        "used": used / codebook_size,
        "dead": float(codebook_size - used),
        "perplexity": float(entropy.exp()),
    }


def _encode_pictures(encoder: Encoder, tokens: Tensor) -> Tensor:
    n, length, _ = tokens.shape
    layout = to_device(Layout.build(n, length, [], 0), tokens.device)
    hidden = encoder(Streams(tokens.flatten(0, 1), None), layout).vision
    assert hidden is not None
    return hidden.view(n, length, -1)


def _sums(features: Tensor, codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of the features of each code `[count, dim]`, and their number `[count]`."""
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, codes, features)
    return sums, torch.bincount(codes, minlength=count).to(features.dtype)


def _gather_rows(x: Tensor) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
