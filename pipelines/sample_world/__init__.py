"""A small drawn world in the published formats, used by the demo and every test.

    with serve(root, port=8123) as server:
        world = generate(root, base_url=server.url)

`generate` writes images, annotations and texts; `serve` serves the images on a web that fails as
the real one does. Equal arguments give equal bytes, and `picture(seed, name)` tells what is in any
image. The scenes, their language and their drawing are in `scenes`, `language` and `draw`.
"""

from __future__ import annotations

from .pictures import Picture, picture
from .scenes import Kind, Scene, Thing, synset, synset_kind
from .server import FAILURES, Server, serve
from .world import World, WorldSize, load
from .writing import generate

__all__ = [
    "FAILURES",
    "Kind",
    "Picture",
    "Scene",
    "Server",
    "Thing",
    "World",
    "WorldSize",
    "generate",
    "load",
    "picture",
    "serve",
    "synset",
    "synset_kind",
]
