"""Image tokenizer (VQ-KD): pictures to visual words, distilled from a teacher's features.

Encoder -> l2-normalised code of low dimension -> nearest codebook entry -> decoder -> the teacher's
patch features. The codebook is updated by moving averages, never by gradients.

Source: "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers"
(arXiv 2208.06366) and microsoft/unilm `beit2`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from beit3 import weights
from beit3.config import ModelConfig, Precision
from beit3.device import computing_in, to_device
from beit3.model import PatchEmbedding
from beit3.multiway import Encoder, Layout, Streams
from beit3.objectives import normalise

SHAPE_FILE = "vqkd.json"
NORM_EPS = 1e-6
"""Epsilon of every norm, as in the released tokenizers."""
_ROWS = 1 << 13
"""Features compared with the codebook at once: 8192 x 8192 cosines are 256 MiB."""


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
    """Codes whose average use per step falls below this are replaced by features of the batch; 0,
    as in the authors' code, never does so."""

    def __post_init__(self) -> None:
        if self.codebook_size > 65536:
            raise ValueError(
                f"codebook_size {self.codebook_size} is over 65536: visual words are uint16"
            )

    @property
    def patches(self) -> int:
        """Visual words per picture."""
        return (self.image_size // self.patch_size) ** 2

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
            norm_eps=NORM_EPS,
        )


PRESETS: dict[str, VQKDConfig] = {
    "tiny": VQKDConfig(
        image_size=48,
        patch_size=12,
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
    # For models with patches of 14 pixels, such as the giant.
    "base14": VQKDConfig(patch_size=14),
}


class Codebook(nn.Module):
    """Unit vectors `[codes, dim]`, kept as moving averages of the features they stand for.

    Its statistics cover all workers: it moves as it would on one worker with the whole batch, if
    picture `i` goes to worker `i` modulo their number (as `pipelines.loader` deals them out). Its
    arithmetic is fp32 even under autocast: bf16 can't tell neighbouring codes apart.
    """

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
        with computing_in("fp32", features.device):
            return nearest(features.float(), self.vectors)

    @torch.no_grad()
    def start(self, features: Tensor, iterations: int = 10) -> None:
        """Initialise by k-means (cosine) over all workers' first features, alike on every worker.

        Args:
            features: Unit vectors `[n, dim]`, or `[pictures, patches, dim]`.
        """
        if bool(self.ready):
            return
        with computing_in("fp32", features.device):
            vectors = kmeans(_gather(features.float()), len(self.vectors), iterations)
        # GPU sums have no fixed order: all workers take the first one's result.
        self.vectors.copy_(_of_first_worker(vectors))
        self.ready.fill_(True)

    @torch.no_grad()
    def update(self, features: Tensor, codes: Tensor) -> None:
        """Move used codes towards the mean of their features, over all workers.

        Args:
            features: Unit vectors `[n, dim]`, or `[pictures, patches, dim]`.
            codes: `[n]`, or `[pictures, patches]`.
        """
        features = features.float()
        flat = features.reshape(-1, features.shape[-1])
        sums, counts = _sums(flat, codes.flatten(), len(self.vectors))
        if _workers() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        used = counts > 0
        means = F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
        moved = F.normalize(self.decay * self.vectors + (1 - self.decay) * means, dim=-1)
        self.vectors.copy_(torch.where(used[:, None], moved, self.vectors))
        self.usage.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        if self.revive_below > 0:
            with computing_in("fp32", features.device):
                self._revive(_gather(features))

    def _revive(self, features: Tensor) -> None:
        dead = (self.usage < self.revive_below).nonzero().flatten()
        if not len(dead):
            return
        # The features that the codebook serves worst, spread evenly: the same on every worker.
        served = torch.cat([(part @ self.vectors.T).amax(-1) for part in features.split(_ROWS)])
        worst = served.argsort(stable=True)[: 4 * len(dead)]
        step = max(1, len(worst) // len(dead))
        chosen = worst[::step][: len(dead)]
        self.vectors[dead[: len(chosen)]] = features[chosen]
        self.vectors.copy_(_of_first_worker(self.vectors))
        self.usage[dead[: len(chosen)]] = 1.0


def kmeans(features: Tensor, count: int, iterations: int = 10) -> Tensor:
    """Spherical k-means of unit features `[n, dim]`: `count` unit vectors `[count, dim]`.

    Centres start at features evenly spread over the rows; one that is nearest to no feature stays
    where it is.
    """
    pick = torch.linspace(0, len(features) - 1, count, device=features.device).long()
    noise = torch.randn(count, features.shape[1], generator=torch.Generator().manual_seed(0))
    # There may be fewer distinct features than centres: a little noise tells twins apart.
    vectors = F.normalize(features[pick] + 0.01 * noise.to(features), dim=-1)
    for _ in range(iterations):
        sums, counts = _sums(features, nearest(features, vectors), count)
        used = counts > 0
        vectors[used] = F.normalize(sums[used] / counts[used, None], dim=-1)
    return vectors


class VQKD(nn.Module):
    """The tokenizer: `encode` is all that is needed once it is trained."""

    def __init__(self, config: VQKDConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.transformer(config.encoder_layers)
        self.grid = shape.grid
        self.embedding = PatchEmbedding(shape)
        self.embedding.register_parameter("mask_token", None)  # nothing is hidden from it
        self.encoder = Encoder(shape)
        self.to_code = nn.Sequential(
            nn.Linear(config.hidden, config.hidden),
            nn.Tanh(),
            nn.Linear(config.hidden, config.code_dim),
        )
        self.codebook = Codebook(config)
        self.from_code = nn.Linear(config.code_dim, config.hidden)
        self.decoder_cls_token = nn.Parameter(torch.zeros(config.hidden))
        self.decoder_positions = nn.Parameter(torch.empty(1 + shape.patches, config.hidden))
        self.decoder = Encoder(config.transformer(config.decoder_layers))
        self.to_teacher = nn.Sequential(
            nn.Linear(config.hidden, config.hidden),
            nn.Tanh(),
            nn.Linear(config.hidden, config.teacher_dim),
        )
        nn.init.normal_(self.decoder_cls_token, std=0.02)
        nn.init.normal_(self.decoder_positions, std=0.02)

    def features(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, height, width]` to unit code features `[n, patches, code_dim]`, fp32.

        Bytes only: the released tokenizers take [0, 1] and scale it to [-1, 1] themselves, other
        models take [-1, 1], and a batch of floats doesn't tell its range.

        Raises:
            ValueError: the images are not bytes, or not of the tokenizer's size.
        """
        side = self.config.image_size
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(
                f"images: expected uint8 [n, 3, {side}, {side}], got "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            )
        tokens = self.embedding(normalise(images).to(self.embedding.positions.dtype))
        hidden = _encode_pictures(self.encoder, tokens)[:, 1:]
        with computing_in("fp32", images.device):
            return F.normalize(self.to_code(hidden.float()), dim=-1)

    @torch.no_grad()
    def encode(self, images: Tensor, precision: Precision = "fp32") -> Tensor:
        """uint8 `[n, 3, height, width]` to visual words `[n, patches]`.

        The encoder runs in `precision`, whatever the caller's autocast. Everything after it is
        fp32, as in BEiT v2.
        """
        with computing_in(precision, images.device):
            features = self.features(images)
        return self.codebook.nearest(features.flatten(0, 1)).view(features.shape[:2])

    @torch.no_grad()
    def encode_scored(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Visual words `[n, patches]`, and the cosine of each with its feature."""
        features = self.features(images)
        codes = self.codebook.nearest(features.flatten(0, 1)).view(features.shape[:2])
        return codes, (features * self.codebook.vectors[codes]).sum(-1)

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
        found = features.detach()
        if self.training:
            self.codebook.start(found)
        codes = self.codebook.nearest(found.flatten(0, 1)).view(features.shape[:2])
        quantised = self.codebook.vectors[codes]
        if self.training:
            self.codebook.update(found, codes)
        straight_through = features + (quantised - features).detach()
        reconstruction = self._decode(straight_through)
        cosine = F.cosine_similarity(reconstruction.float(), target.float(), dim=-1).mean()
        commitment = F.mse_loss(features, quantised.detach())
        return {
            "loss": 1 - cosine + commitment,
            "cosine": cosine,
            "commitment": commitment,
            "codes": codes,
        }

    def _decode(self, codes: Tensor) -> Tensor:
        cls = self.decoder_cls_token.expand(len(codes), 1, -1)
        hidden = torch.cat([cls, self.from_code(codes).to(cls.dtype)], 1) + self.decoder_positions
        return self.to_teacher(_encode_pictures(self.decoder, hidden)[:, 1:])


def save(folder: Path, model: VQKD) -> None:
    """Write a tokenizer folder: `model.safetensors` and `vqkd.json`."""
    save_tensors(folder, model.state_dict(), model.config)


def save_tensors(folder: Path, tensors: dict[str, Tensor], config: VQKDConfig) -> None:
    """`save` for tensors that no module holds."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / weights.WEIGHTS
    )
    (folder / SHAPE_FILE).write_text(json.dumps(asdict(config), indent=1) + "\n")


def load(folder: Path) -> VQKD:
    """Read a tokenizer folder, ready to encode.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
        ValueError: its tensors don't fit its configuration.
    """
    model = VQKD(VQKDConfig(**json.loads((folder / SHAPE_FILE).read_text())))
    weights.load_into(model, weights.load_tensors(folder))
    return model.eval()


def batch_that_fits(
    model: VQKD, share: float = 1.0, most: int = 1024, precision: Precision = "fp32"
) -> int:
    """Number of pictures that `encode` can take at once: a power of two.

    On a GPU it fills most of the free memory, judging by a few pictures. On a CPU, where larger
    batches are no faster, it takes 256 MiB of activations.

    Args:
        share: This process's share of the GPU.
        precision: Precision to encode in.
    """
    config = model.config
    device = model.codebook.vectors.device
    if device.type == "cuda":
        few = torch.zeros(8, 3, config.image_size, config.image_size, dtype=torch.uint8)
        few = few.to(device)
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        model.encode(few, precision)
        each = max(1, (torch.cuda.max_memory_allocated(device) - level) // len(few))
        room = 0.7 * share * torch.cuda.mem_get_info(device)[0]
    else:
        wide = (1 + config.patches) * (config.mlp + 8 * config.hidden)
        each, room = 4 * (wide + config.patches * config.codebook_size), float(1 << 28)
    return 1 << int(math.log2(min(most, max(1.0, room / each))))


def codebook_health(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """Usage and perplexity of visual words.

    Returns `used` (share of codes that occur), `dead` (number that don't), `perplexity`.
    """
    return usage_health(torch.bincount(codes.flatten(), minlength=codebook_size).float())


def usage_health(counts: Tensor, least: float = 0.0) -> dict[str, float]:
    """`codebook_health` from each code's uses `[codes]`; a code is used if above `least`."""
    share = counts / counts.sum().clamp(min=1e-12)
    entropy = -torch.special.xlogy(share, share).sum()
    used = int((counts > least).sum())
    return {
        "used": used / len(counts),
        "dead": float(len(counts) - used),
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


def nearest(features: Tensor, vectors: Tensor) -> Tensor:
    """Indices `[n]` of the `vectors` `[m, dim]` nearest by cosine to unit features `[n, dim]`."""
    return torch.cat([(part @ vectors.T).argmax(-1) for part in features.split(_ROWS)])


def _workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(x: Tensor) -> Tensor:
    """All workers' rows `[n, ..., dim]` as `[workers * n * ..., dim]`, in the order of the batch.

    Row i of worker r is row `i * workers + r` of the batch.
    """
    if _workers() > 1:
        parts = [torch.empty_like(x) for _ in range(_workers())]
        dist.all_gather(parts, x.contiguous())
        x = torch.stack(parts, 1).flatten(0, 1)
    return x.reshape(-1, x.shape[-1])


def _of_first_worker(x: Tensor) -> Tensor:
    if _workers() > 1:
        dist.broadcast(x := x.contiguous(), 0)
    return x
