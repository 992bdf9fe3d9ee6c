"""Build ``icons400.npz``: 400 concepts, each drawn by eight independent icon families.

The file is committed; nobody needs to run this script to use it. It exists so that the file can be
checked and made again. It needs ``npm`` (or ``--tarball``) and
``pip install numpy pillow resvg-py==0.5.0``.

A class is the name of an icon once style suffixes ("outline", "filled", "24"...) are stripped and
the synonyms listed below are merged; its instances are the drawings different families give it, one
per family. Left out are brand logos, drawings that are the same icon of the same family under a
second name, drawings pixel-identical to one already kept, and drawings nearly identical to another
of their class (one family copied the other). The 400 classes drawn by most families are kept, and
of each class eight drawings picked at random with a fixed seed. Class order is then shuffled with
the same generator: classes 0 to 199 are meant for training, 200 to 399 for testing.

Arrays in the file (3,200 images, sorted by class):

* ``images``: uint8 (3200, 32, 16). Two 4-bit pixels a byte, the left one in the high nibble;
  0 is background and 15 is full ink.
* ``labels``: int64 (3200,), class index.
* ``names``: str (400,), class names.
* ``families``: str (3200,), the icon family each drawing comes from.

``--others N`` writes another set to check a choice on, which is not committed: concepts that
are not among the 400, with N drawings each. ``train.py --dataset icons400 --root FILE`` reads it.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

PACKAGE = "@iconify/json@2.2.535"
RESVG_PY = "0.5.0"
TARBALL_SHA256 = "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91"
# Of the bytes of images followed by those of labels.
RESULT_SHA256 = "15041e96c2082517609f16354c67ab5a384140c436c8b6ee54bcfc3bd6e57fd2"

CLASSES, DRAWINGS, SIZE, RENDER_SIZE, SEED = 400, 8, 32, 64, 0
NEAR_IDENTICAL = 0.95  # cosine between the ink of two drawings of a class
LICENCES = {"MIT", "Apache-2.0", "ISC", "CC0-1.0"}

FAMILIES = """
mdi tabler lucide ph ic bi ri carbon fluent ion heroicons octicon bx iconoir ant-design uil eva
mingcute hugeicons pixelarticons zondicons clarity majesticons mynaui jam icon-park-outline
akar-icons teenyicons humbleicons proicons si gg vaadin ep maki oi
""".split()

# Style markers, removed from the ends of names; some mean style in one family only.
STYLES = r"outlined?|filled|fill|solid|sharp|rounded|regular|duotone|twotone|\d+"
MORE_STYLES = {
    "ri": "line", "mingcute": "line", "si": "line", "clarity": "line", "majesticons": "line",
    "ph": "bold|light|thin", "fluent": "light", "jam": "f", "vaadin": "o", "uil": "alt",
    "bx": "alt", "ep": "bold", "icon-park-outline": "one|two|three|four|five",
}  # fmt: skip
PREFIXES = {
    "bx": "bxs",
    "ic": "baseline|outline|round|sharp|twotone",
    "ion": "android|ios|md",
}

# Different names for one concept, merged into the last name of each group.
SYNONYMS = """
add plus | add-circle plus-circle | subtract minus | close x | close-circle x-circle
attachment paperclip | bike bicycle | bulb lightbulb | cart shopping-cart | chart-bar bar-chart
chart-pie pie-chart | cog settings | cut scissors | delete trash | document file | drop droplet
earth globe | envelope mail | envelope-open mail-open | flame fire | flash lightning bolt
folder-add folder-plus | funnel filter | hashtag hash | house home | info-circle info | label tag
lock-open unlock | log-in login | log-out sign-out logout | microphone mic | view-list list
microphone-off mic-off | notification bell | people group users | percentage percent | print printer
person user | person-add user-plus | plane airplane | question-mark question | reload sync refresh
shop store | sparkles sparkle | thumbs-down thumb-down | thumbs-up thumb-up | time clock
help question-circle | volume-off volume-mute | cross x | chat message | video-camera video
alert warning | pen pencil | ban block | location map-pin | eye-closed eye-off | suitcase luggage
pulse activity | alarm alarm-clock | stopwatch timer | music-note music | comment message
text-align-left align-left | text-align-center align-center | text-align-right align-right
text-align-justify align-justify | arrow-circle-up arrow-up-circle | flash-off bolt-off
arrow-circle-down arrow-down-circle | arrow-circle-left arrow-left-circle
arrow-circle-right arrow-right-circle
"""
BRANDS = set(
    """airplay amazon android apple behance bluetooth chrome codepen discord dribbble dropbox
    facebook figma github gitlab google instagram javascript linkedin linux markdown mastodon medium
    microsoft npm paypal pinterest react reddit skype slack snapchat spotify telegram threads tiktok
    trello twitch twitter vimeo wechat whatsapp windows wordpress youtube""".split()
)
LETTER_X_IS_A_BRAND = {"iconoir", "ant-design", "pixelarticons", "akar-icons"}


def synonyms() -> dict[str, str]:
    """Map each alternative name to the name of its class."""
    groups = [group.split() for line in SYNONYMS.splitlines() for group in line.split("|")]
    return {name: group[-1] for group in groups for name in group[:-1]}


def pack(directory: Path) -> Path:
    """Download the pinned package with npm."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm was not found: install Node.js or pass --tarball PATH")
    command = [npm, "pack", PACKAGE, "--loglevel=error", "--pack-destination", str(directory)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next(directory.glob("*.tgz"))


def read(tarball: Path) -> dict[str, dict]:
    """Return the icon sets of the families under a permissive licence."""
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != TARBALL_SHA256:
        raise SystemExit(f"{tarball} has SHA-256 {digest}, expected {TARBALL_SHA256}")
    with tarfile.open(tarball) as archive:
        wanted = {f"package/json/{family}.json": family for family in FAMILIES}
        found = {}
        for member in archive:
            if member.name in wanted or member.name == "package/collections.json":
                name = wanted.get(member.name, "collections")
                found[name] = json.load(archive.extractfile(member))
    licences = {f: found["collections"][f]["license"]["spdx"] for f in FAMILIES}
    return {family: found[family] for family in FAMILIES if licences[family] in LICENCES}


def name_icons(family: str, icons: dict) -> dict[str, str]:
    """Map class names to the icon of this family that draws them, each icon used once."""
    prefix = re.compile(f"^({PREFIXES.get(family, '(?!)')})-")
    suffix = re.compile(f"-({STYLES}|{MORE_STYLES.get(family, '(?!)')})$")
    renamed = synonyms()
    candidates = []  # (rank, name, class, icon): the best comes first
    for is_alias, entries in enumerate((icons["icons"], icons.get("aliases", {}))):
        for name, entry in entries.items():
            icon = entry.get("parent", name)
            transformed = is_alias and set(entry) != {"parent"}
            if entry.get("hidden") or transformed or icon not in icons["icons"]:
                continue
            stem, previous = prefix.sub("", name), ""
            while stem != previous:
                stem, previous = suffix.sub("", stem), stem
            concept = renamed.get(stem, stem)
            rank = (is_alias, concept != stem, any(c.isdigit() for c in name), len(name))
            candidates.append((rank, name, concept, icon))
    brands = BRANDS | ({"x"} if family in LETTER_X_IS_A_BRAND else set())
    chosen: dict[str, str] = {}
    used = set()
    for _, _, concept, icon in sorted(candidates):
        if concept not in chosen and icon not in used and concept not in brands:
            chosen[concept] = icon
            used.add(icon)
    return chosen


def render(icons: dict, name: str) -> np.ndarray:
    """Draw one icon: (SIZE, SIZE) uint8, 0 background to 15 ink."""
    icon = icons["icons"][name]
    default = {"left": 0, "top": 0, "width": 16, "height": 16}
    box = [icon.get(key, icons.get(key, value)) for key, value in default.items()]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER_SIZE}" height="{RENDER_SIZE}" viewBox="{" ".join(map(str, box))}" '
        f'color="black">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    grey = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("L"), dtype=np.float64)
    step = RENDER_SIZE // SIZE
    ink = 1 - grey.reshape(SIZE, step, SIZE, step).mean((1, 3)) / 255
    return np.rint(ink * 15).astype(np.uint8)


def distinct(drawn: dict[str, np.ndarray], seen: set[bytes]) -> dict[str, np.ndarray]:
    """Keep the drawings of a class that are not empty, seen before or close to an earlier one."""
    kept: dict[str, np.ndarray] = {}
    unit: list[np.ndarray] = []
    for family, image in drawn.items():
        ink = image.ravel() / max(float(np.linalg.norm(image)), 1e-9)
        nearest = max((float(ink @ other) for other in unit), default=0.0)
        if image.any() and nearest < NEAR_IDENTICAL and image.tobytes() not in seen:
            kept[family] = image
            unit.append(ink)
            seen.add(image.tobytes())
    return kept


def build(
    sets: dict[str, dict], drawings: int = DRAWINGS, most: int | None = CLASSES, without: tuple = ()
) -> dict[str, np.ndarray]:
    """Choose classes and drawings and return the arrays of the file."""
    concepts: dict[str, dict[str, str]] = {}
    for family, icons in sets.items():
        for concept, name in name_icons(family, icons).items():
            concepts.setdefault(concept, {})[family] = name
    for concept in without:
        concepts.pop(concept)
    by_size = sorted((-len(v), concept) for concept, v in concepts.items() if len(v) >= drawings)
    seen: set[bytes] = set()
    drawn = {}
    for _, concept in by_size:
        images = {f: render(sets[f], name) for f, name in concepts[concept].items()}
        drawn[concept] = distinct(images, seen)
    eligible = sorted((-len(v), concept) for concept, v in drawn.items() if len(v) >= drawings)
    print(f"{len(by_size)} classes with {drawings} drawings, {len(eligible)} without duplicates")

    rng = np.random.RandomState(SEED)  # the generator whose stream NumPy has frozen
    chosen: dict[str, list[str]] = {}
    for _, concept in eligible[:most]:
        found = list(drawn[concept])
        picks = rng.permutation(len(found))[:drawings]
        chosen[concept] = [found[i] for i in sorted(picks)]
    names = [sorted(chosen)[i] for i in rng.permutation(len(chosen))]
    pixels = np.stack([drawn[name][family] for name in names for family in chosen[name]])
    return {
        "images": pixels[:, :, 0::2] << 4 | pixels[:, :, 1::2],
        "labels": np.repeat(np.arange(len(names), dtype=np.int64), drawings),
        "names": np.array(names),
        "families": np.array([family for name in names for family in chosen[name]]),
    }


def main() -> None:
    """Parse the arguments, build the file and check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tarball", type=Path, help=f"an already downloaded {PACKAGE}")
    parser.add_argument("--output", type=Path, default=Path("icons400.npz"))
    parser.add_argument("--others", type=int, metavar="N", help="concepts not among the 400")
    args = parser.parse_args()
    if version("resvg-py") != RESVG_PY:
        raise SystemExit(f"resvg-py {version('resvg-py')} is installed, {RESVG_PY} is needed")
    with tempfile.TemporaryDirectory() as directory:
        sets = read(args.tarball or pack(Path(directory)))
    if args.others is None:
        arrays = build(sets)
    else:
        with np.load(Path(__file__).with_name("icons400.npz")) as committed:
            arrays = build(sets, args.others, None, committed["names"])
    np.savez_compressed(args.output, **arrays)
    for family, count in Counter(arrays["families"].tolist()).most_common():
        print(f"{family:18} {count}")
    digest = hashlib.sha256(arrays["images"].tobytes() + arrays["labels"].tobytes()).hexdigest()
    print(f"{args.output}: {args.output.stat().st_size} bytes, SHA-256 of the content {digest}")
    if args.others is None and digest != RESULT_SHA256:
        raise SystemExit(f"the content differs from the committed file ({RESULT_SHA256})")


if __name__ == "__main__":
    main()
