"""emoji-64: about 1,600 emoji, each drawn by 4 to 9 vendors, in colour and with transparency.

    pip install resvg-py==0.5.0
    images, labels, names = emoji_set.load()

A class is an emoji, its instances are the drawings of it in nine icon sets. The first call fetches
the sets with ``npm pack`` (14.5 MB, each checked), draws them (under a minute) and keeps the result
in the cache folder; later calls need neither npm nor resvg-py.

Names are merged across sets once all but letters and digits are removed. Left out are flags, skin
tones and drawings that are in already, whether in the same class or in one before it in the
alphabet: some vendors use one picture for several emoji, and no model could tell which is meant.
Classes with fewer than four drawings are left out last.

The class order is the alphabetical one of the names, shuffled once by
``numpy.random.RandomState(0).permutation`` as that of icons-400 is: the first half of the classes
is meant for training, the second for testing.

The drawings are not part of this project. Each ``@iconify-json/`` package has its own licence:

* ``twemoji``: CC-BY-4.0, Twitter
* ``noto`` and ``noto-v1``: Apache-2.0, Google Inc
* ``openmoji``: CC-BY-SA-4.0, OpenMoji
* ``fluent-emoji-flat``: MIT, Microsoft Corporation
* ``emojione``: CC-BY-4.0, Emoji One
* ``emojione-v1``: CC-BY-SA-4.0, Emoji One
* ``fxemoji``: Apache-2.0, Mozilla
* ``streamline-emojis``: CC-BY-4.0, Streamline
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .augment import AFFINE, affine, uniform

SETS, SIZE, SEED = 4, 64, 0
FILE = "emoji-64.npz"
RECIPE = 1  # raise it with every change of what is kept or how it is drawn: caches are then renewed

# Name in @iconify-json: version, SHA-256 of the tarball. A class is spelt as its first set does.
PACKAGES = {
    "twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "emojione-v1": ("1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    "fxemoji": ("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "streamline-emojis": (
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    ),
}

# An older name of an emoji, where both names alone would be classes.
SYNONYMS = {
    "ballotboxwithcheck": "checkboxwithcheck",
    "directhit": "bullseye",
    "exclamationmark": "redexclamationmark",
    "maninsuitlevitating": "personinsuitlevitating",
    "pandaface": "panda",
}
# Found by eye: names that mean something else than in the other sets, and one without its colours.
FALSE_FRIENDS = {
    "emojione-v1": {"keyboard"},  # of a piano, as is fxemoji's
    "fxemoji": {"keyboard", "kiss", "sunglasses", "tramcar"},
    "openmoji": {"scroll"},  # of a mouse
}

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


NUMBERS = AFFINE + 3 + 3  # random ones of an augmentation: shape, background, colour


class EmojiError(OSError):
    """The data set cannot be made; the message says what to do."""


def load(cache: Path | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """The images, fetched and drawn on the first call.

    Args:
        cache: folder of the downloads and the result; by default ``s2sd-pml/emoji`` in
            ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        Images (N, 4, 64, 64), uint8 RGBA whose colours are not multiplied by alpha; labels (N,),
        int64, ascending from 0; a name for every label.

    Raises:
        EmojiError: npm or resvg-py is missing, npm fails, or a download is not what it should be.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "s2sd-pml/emoji")
    images, labels, names = read(cache / FILE) or build(cache)
    return torch.from_numpy(images), torch.from_numpy(labels), names.tolist()


def prepare(images: Tensor, seeds: Sequence[int] | None) -> Tensor:
    """Drawings (B, 4, H, W) in 0 to 255 -> (B, 3, H, W) in 0 to 1, on white.

    To train with: distorted, on a background of random colour, with the strength of each colour
    changed by up to a fifth.
    """
    drawn = images.float() / 255
    drawn = torch.cat([drawn[:, :3] * drawn[:, 3:], drawn[:, 3:]], dim=1)  # premultiplied
    if seeds is None:
        return drawn[:, :3] + 1 - drawn[:, 3:]
    numbers = uniform(seeds, NUMBERS)[:, :, None, None]
    background, strength = (1 + numbers[:, AFFINE : AFFINE + 3]) / 2, 1 + numbers[:, -3:] / 5
    drawn = affine(drawn, numbers[:, :AFFINE, 0, 0], degrees=15, scale=0.2)
    drawn = strength * drawn[:, :3] + (1 - drawn[:, 3:]) * background
    return drawn.clamp(0, 1)


def key() -> str:
    """What the result depends on: a file with another key is stale."""
    return hashlib.sha256(f"{RECIPE} {PACKAGES}".encode()).hexdigest()


def read(path: Path) -> Arrays | None:
    """Images, labels and names of the file, or None where it is missing, stale or damaged."""
    try:
        with np.load(path) as data:  # the zip has a checksum of each array
            fresh = data["key"] == key()
            return (data["images"], data["labels"], data["names"]) if fresh else None
    except Exception:  # a damaged zip raises whatever its bytes happen to mean
        return None


def build(cache: Path) -> Arrays:
    """Fetch what is missing, choose, draw and keep the result."""
    draw = renderer()  # first, so that nobody waits for a download in vain
    cache.mkdir(parents=True, exist_ok=True)
    chosen = choose({name: unpack(tarball(name, cache)) for name in PACKAGES})
    counts = [len(drawings) for drawings in chosen.values()]
    drawings = tqdm(chain(*chosen.values()), desc="drawing", total=sum(counts))
    images = np.stack([draw(drawing) for drawing in drawings])
    labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    names = np.array(list(chosen))
    with TemporaryDirectory(dir=cache) as directory:  # nobody ever reads half a file
        fresh = Path(directory, FILE)
        np.savez_compressed(fresh, images=images, labels=labels, names=names, key=np.array(key()))
        os.replace(fresh, cache / FILE)
    return images, labels, names


def tarball(name: str, cache: Path) -> Path:
    """The checked package, fetched unless it is there."""
    version, expected = PACKAGES[name]
    path = cache / f"iconify-json-{name}-{version}.tgz"
    if not path.exists():
        fetch(f"@iconify-json/{name}@{version}", path)
    seen = hashlib.sha256(path.read_bytes()).hexdigest()
    if seen != expected:
        path.unlink()
        raise EmojiError(
            f"{path} had SHA-256 {seen} where {expected} is expected, and is deleted: "
            "run again to fetch it anew"
        )
    return path


def fetch(package: str, path: Path) -> None:
    """Download a package with npm."""
    npm = shutil.which("npm")
    if npm is None:
        raise EmojiError(f"npm was not found: install Node.js, or put {package} in place as {path}")
    with TemporaryDirectory(dir=path.parent) as directory:
        # With npm's own two retries it takes over a minute to say that there is no network.
        flags = ["--loglevel=error", "--fetch-retries=1", "--pack-destination", directory]
        done = subprocess.run([npm, "pack", package, *flags], capture_output=True, text=True)
        found = list(Path(directory).glob("*.tgz"))
        if done.returncode or not found:
            raise EmojiError(
                f"npm could not fetch {package} ({reason(done.stderr)}): "
                f"fix that and run again, or put the package in place as {path}"
            )
        os.replace(found[0], path)


def reason(stderr: str) -> str:
    """Of what npm says, the line that tells why; codes come before it, advice after it."""
    lines = [re.sub(r"^npm (error|ERR!) ?", "", line) for line in stderr.strip().splitlines()]
    telling = [line for line in lines if not re.match(r"code |syscall |errno |path ", line)]
    return (telling or lines or ["it gave no reason"])[0]


def unpack(path: Path) -> tuple[dict[str, Any], set[str]]:
    """The icon set in Iconify's format, and which of its icons are flags."""
    with tarfile.open(path) as archive:
        files = [archive.extractfile(f"package/{name}.json") for name in ("icons", "metadata")]
        icons, metadata = (json.load(file) for file in files if file)
    return icons, set(metadata["categories"].get("Flags", []))


def choose(sets: dict[str, tuple[dict[str, Any], set[str]]]) -> dict[str, list[str]]:
    """Map the class names, in their final order, to the SVG of each drawing."""
    merged: dict[str, dict[str, str]] = {}  # for each concept its different drawings, each named
    for family, (icons, flags) in sets.items():
        for concept, name in concepts(family, icons["icons"], flags).items():
            merged.setdefault(concept, {}).setdefault(svg(icons, name), name)
    chosen: dict[str, list[str]] = {}
    seen: set[str] = set()  # of what is chosen
    for _, drawings in sorted(merged.items()):
        fresh = [drawing for drawing in drawings if drawing not in seen]
        if len(fresh) >= SETS:
            seen.update(fresh)
            chosen[next(iter(drawings.values()))] = fresh
    names = sorted(chosen)
    order = np.random.RandomState(SEED).permutation(len(names))  # a stream that NumPy has frozen
    return {names[i]: chosen[names[i]] for i in order}


def concepts(family: str, icons: dict[str, Any], flags: set[str]) -> dict[str, str]:
    """Map each concept of a set, in letters and digits, to the first icon that shows it."""
    found: dict[str, str] = {}
    for name, icon in icons.items():
        # Streamline numbers its drawings of one emoji.
        stem = re.sub(r"-\d$", "", name) if family == "streamline-emojis" else name
        concept = re.sub(r"[^a-z0-9]", "", stem)
        dropped = icon.get("hidden") or name in flags or has_skin_tone(name, icons)
        if not dropped and concept not in FALSE_FRIENDS.get(family, ()):
            found.setdefault(SYNONYMS.get(concept, concept), name)
    return found


def has_skin_tone(name: str, icons: dict[str, Any]) -> bool:
    """Whether it is one of an emoji's five tones. A traffic light is not: it comes in no other."""
    tone = re.search(r"-(medium|(medium-)?(light|dark))$", name)
    return "skin-tone" in name or bool(tone and f"{name[: tone.start()]}-medium-dark" in icons)


def svg(icons: dict[str, Any], name: str) -> str:
    """A whole SVG file of one icon."""
    icon = icons["icons"][name]
    default = {"left": 0, "top": 0, "width": 16, "height": 16}  # those of Iconify's format
    box = [icon.get(side, icons.get(side, value)) for side, value in default.items()]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )


def renderer() -> Callable[[str], np.ndarray]:
    """A function from an SVG to its pixels (4, SIZE, SIZE)."""
    try:
        import resvg_py
    except ImportError:
        raise EmojiError("resvg-py draws the emoji: pip install resvg-py==0.5.0") from None

    def draw(drawing: str) -> np.ndarray:
        png = bytes(resvg_py.svg_to_bytes(svg_string=drawing, skip_system_fonts=True))
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    return draw
