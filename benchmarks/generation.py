"""Measures caption generation: `beit3.generate` with cached keys and values, against no cache.

    python -m benchmarks.generation                       # base, beams 1 and 3, this machine's CPU
    python -m benchmarks.generation --device cuda --pictures 32

The baseline is the same search in its simplest form: at every step each beam's picture and all its
words so far are encoded again with the generation mask, pictures and beams in one batch, and the
text head is computed at the last position only. (The released code keeps a cache too; this measures
what a cache is worth, not the released code.)

Weights are random, and `</s>` is banned, so that every caption has `--tokens` tokens. Both must
find the same captions; the program fails if they don't.

Prints, for each number of beams, captions per second and seconds of both, medians of `--repeats`
runs in turns, and how many times faster the cache is.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from statistics import median

# Before torch loads: threads that spin while they wait starve each other on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

from beit3.config import PRESETS
from beit3.generate import generate, never_emitted
from beit3.model import BEiT3
from beit3.objectives import normalise
from beit3.text import BOS, EOS, TextTokenizer
from benchmarks import _measure


class Ids(TextTokenizer):
    """The ids of a vocabulary without its pieces: all that a search asks for."""

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def mask_id(self) -> int:
        return self.size - 1


@torch.no_grad()
def generate_uncached(
    backbone: BEiT3,
    text_head: nn.Module,
    images: Tensor,
    tokenizer: TextTokenizer,
    *,
    beams: int,
    tokens: int,
) -> list[tuple[int, ...]]:
    """Beam search for the likeliest captions of `tokens` tokens, encoding all anew each step."""
    pictures, vocabulary = len(images), backbone.config.vocab_size
    repeated = normalise(images).repeat_interleave(beams, 0)
    forbidden = [EOS, *never_emitted(tokenizer, vocabulary)]
    words = torch.full((pictures, beams, 1), BOS, device=images.device)
    # At first all beams are the same empty caption: only one of them may be extended.
    scores = torch.full((pictures, beams), -torch.inf, device=images.device)
    scores[:, 0] = 0.0
    for length in range(2, tokens + 2):
        asked = torch.cat([words, torch.full_like(words[:, :, :1], tokenizer.mask_id)], 2)
        lengths = [length] * (pictures * beams)
        out = backbone(repeated, asked.flatten(), lengths, pairs=len(lengths), causal_text=True)
        assert out.text is not None
        logits = text_head(out.text.unflatten(0, (len(lengths), length))[:, -1]).float()
        logits[:, forbidden] = -torch.inf
        total = scores[:, :, None] + logits.log_softmax(-1).view(pictures, beams, -1)
        scores, choices = total.flatten(1).topk(beams, 1)
        parents = choices.div(vocabulary, rounding_mode="floor")
        kept = words.gather(1, parents[:, :, None].expand(-1, -1, words.shape[2]))
        words = torch.cat([kept, (choices % vocabulary)[:, :, None]], 2)
    return [tuple(caption[1:]) for caption in words[:, 0].tolist()]


def build(options: argparse.Namespace) -> tuple[BEiT3, nn.Linear, Tensor]:
    """A model with random weights, a head that tells words apart, and pictures of noise."""
    torch.manual_seed(options.seed)
    config, device = PRESETS[options.preset], torch.device(options.device)
    backbone = BEiT3(config).eval().to(device)
    head = nn.Linear(config.hidden, config.vocab_size, bias=False)
    # Far larger than at the start of training: no two beams tie up to rounding.
    nn.init.normal_(head.weight, std=0.2)
    side = config.image_size
    images = torch.randint(0, 256, (options.pictures, 3, side, side), dtype=torch.uint8)
    return backbone, head.to(device), images.to(device)


def compare(options: argparse.Namespace, beams: int) -> tuple[float, float]:
    """Median seconds with the cache and without.

    Raises:
        RuntimeError: the captions differ.
    """
    backbone, head, images = build(options)
    tokenizer = Ids(backbone.config.vocab_size)
    found: dict[str, list[tuple[int, ...]]] = {}

    def cached() -> None:
        captions = generate(
            backbone,
            head,
            images,
            tokenizer,
            max_length=options.tokens + 2,
            beams=beams,
            banned=[EOS],
        )
        found["cached"] = [caption.ids for caption in captions]

    def uncached() -> None:
        found["uncached"] = generate_uncached(
            backbone, head, images, tokenizer, beams=beams, tokens=options.tokens
        )

    cached()  # warm-up
    times: dict[str, list[float]] = {"cached": [], "uncached": []}
    for _ in range(options.repeats):
        for name, work in (("cached", cached), ("uncached", uncached)):
            times[name].append(_measure.seconds(work, images.device))
        if found["cached"] != found["uncached"]:
            raise RuntimeError(f"the captions differ with {beams} beams: {found}")
        if any(len(ids) != options.tokens for ids in found["cached"]):
            raise RuntimeError(f"a caption has not {options.tokens} tokens")
    return median(times["cached"]), median(times["uncached"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="base")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=30, help="of each caption")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if min(options.pictures, options.tokens, options.repeats, *options.beams) < 1:
        parser.error("--pictures, --tokens, --repeats, --beams: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(
        f"{options.preset}, {options.pictures} pictures, {options.tokens} tokens each, fp32, "
        f"{_measure.machine(torch.device(options.device))}"
    )
    print(f"{'beams':>5}{'cached, s':>12}{'uncached, s':>13}{'captions/s':>20}{'times faster':>14}")
    for beams in options.beams:
        fast, slow = compare(options, beams)
        rates = f"{options.pictures / fast:.2f} : {options.pictures / slow:.2f}"
        print(f"{beams:5}{fast:12.2f}{slow:13.2f}{rates:>20}{slow / fast:14.1f}", flush=True)


if __name__ == "__main__":
    main()
