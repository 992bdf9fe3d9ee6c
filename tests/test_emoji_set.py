"""The emoji data set, made of miniature packages; one test fetches the real ones."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer import emoji_set

# What every set has: two emoji, one also in tones of both spellings, a lamp, and a flag.
COMMON = "apple hand hand-dark hand-medium-dark hand-light-skin-tone police-car-light flag-peru"
SETS = ["twemoji", "noto", "openmoji", "fxemoji", "streamline-emojis"]


def square(colour, opacity=1.0, side=16):
    return f'<path d="M0 0h{side}v{side}H0z" fill="{colour}" fill-opacity="{opacity}"/>'


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def pack(cache, monkeypatch):
    """Writes a package as npm would have left it, and names it in PACKAGES."""
    packages = {}
    monkeypatch.setattr(emoji_set, "PACKAGES", packages)

    def write(name, icons, flags=(), **sizes):
        path = cache / f"iconify-json-{name}-1.0.0.tgz"
        files = {
            "info": {"prefix": name, "license": {"spdx": "MIT"}},
            "icons": {"prefix": name, "icons": icons, "width": 16, "height": 16, **sizes},
            "metadata": {"categories": {"Objects": list(icons), "Flags": list(flags)}},
        }
        with tarfile.open(path, "w:gz") as archive:
            for file, content in files.items():
                text = json.dumps(content).encode()
                member = tarfile.TarInfo(f"package/{file}.json")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
        packages[name] = ("1.0.0", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    return write


@pytest.fixture
def pack_all(pack):
    """Writes five sets: the common names, more names for some, and each drawing different."""

    def write(**more):
        for i, family in enumerate(SETS):
            names = [*COMMON.split(), *more.get(family.partition("-")[0], "").split()]
            icons = {n: {"body": square(f"#{16 * i:02x}{j:02x}80")} for j, n in enumerate(names)}
            pack(family, icons, flags=["flag-peru"])

    return write


@pytest.fixture
def drawn(monkeypatch):
    """A stand-in for resvg-py, so that the cache is tested without it; counts the drawings."""
    calls = []

    def draw(drawing):
        calls.append(drawing)
        seed = int(hashlib.sha256(drawing.encode()).hexdigest()[:8], 16)
        return np.random.RandomState(seed).randint(256, size=(4, 64, 64)).astype(np.uint8)

    monkeypatch.setattr(emoji_set, "renderer", lambda: draw)
    return calls


def choose(cache):
    sets = emoji_set.PACKAGES
    return emoji_set.choose(
        {name: emoji_set.unpack(emoji_set.tarball(name, cache)) for name in sets}
    )


def counts(cache):
    return {name: len(drawings) for name, drawings in choose(cache).items()}


def test_skin_tones_and_flags_are_left_out_and_a_lamp_is_not(cache, pack_all):
    pack_all()
    assert counts(cache) == {"apple": 5, "hand": 5, "police-car-light": 5}


def test_a_name_needs_four_sets_however_it_is_spelt(cache, pack_all):
    pack_all(
        twemoji="t-rex dragon-face sun",
        noto="t-rex dragon-face sun",
        openmoji="t-rex dragon-face sun",
        fxemoji="trex",
        streamline="dragon-face-1 dragon-face-2 sun-1-2",
    )
    assert counts(cache).items() >= {"t-rex": 4, "dragon-face": 4}.items()
    assert "sun" not in counts(cache)


def test_hidden_icons_do_not_count(cache, pack_all, pack):
    pack_all()
    hidden = {"body": square("red"), "hidden": True}
    shown = {"body": square("red")}
    pack("noto", {"apple": hidden, "hand": shown, "police-car-light": hidden})
    pack("openmoji", {"apple": hidden})
    assert counts(cache) == {"hand": 4}


def test_synonyms_are_one_class_and_false_friends_in_none(cache, pack_all):
    pack_all(
        twemoji="bullseye kiss",
        noto="bullseye kiss",
        openmoji="direct-hit kiss",
        fxemoji="directhit kiss",
    )
    assert counts(cache)["bullseye"] == 4
    assert "kiss" not in counts(cache)


def test_one_picture_is_in_one_class_only(cache, pack):
    for i, family in enumerate(SETS):
        own = {"body": square(f"#0000{i:02x}")}
        shared = {"body": square(f"#ff00{i:02x}")}
        # Two of five use the picture of "family" for "kin" too; "clan" is one vendor's copy.
        kin = shared if i < 2 else {"body": square(f"#00ff{i:02x}")}
        clan = {"body": square(f"#ffff{max(i, 1):02x}")}
        pack(family, {"clan": clan, "family": shared, "kin": kin, "own": own})
    assert counts(cache) == {"clan": 4, "family": 5, "own": 5}
    drawings = [drawing for drawings in choose(cache).values() for drawing in drawings]
    assert len(set(drawings)) == len(drawings)


def test_the_order_is_shuffled_and_fixed(cache, pack_all):
    letters = " ".join("abcdefghij")
    pack_all(twemoji=letters, noto=letters, openmoji=letters, fxemoji=letters)
    names = list(choose(cache))
    order = np.random.RandomState(0).permutation(len(names))
    assert names == [sorted(names)[i] for i in order] != sorted(names)


def test_the_drawings_have_colours_that_alpha_does_not_change(cache, pack):
    pytest.importorskip("resvg_py")
    colours = ["#ff0000", "#00ff00", "#0000ff", "#ff8000"]
    for family, colour in zip(SETS, colours, strict=False):
        half = {"body": square(colour, opacity=0.5, side=8)}
        # Its own box is twice as wide as it is high, and begins at (-4, 0).
        wide = {"body": square(colour, side=8), "left": -4, "width": 16, "height": 8}
        pack(family, {"half": half, "wide": wide})
    images, labels, names = emoji_set.load(cache)
    assert (images.shape, images.dtype) == ((8, 4, 64, 64), torch.uint8)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert sorted(names) == ["half", "wide"]
    for i, colour in enumerate(colours):
        rgb = list(bytes.fromhex(colour[1:]))
        half = images[labels == names.index("half")][i]
        wide = images[labels == names.index("wide")][i]
        assert half[:, 10, 10].tolist() == [*rgb, 128]
        assert half[:, 40, 10].tolist() == half[:, 10, 40].tolist() == [0, 0, 0, 0]
        assert wide[:, 32, 32].tolist() == [*rgb, 255]
        assert wide[3].bool().nonzero().aminmax(dim=0)[0].tolist() == [16, 16]
        assert wide[3].bool().nonzero().aminmax(dim=0)[1].tolist() == [47, 47]


def test_the_second_call_needs_neither_npm_nor_resvg(cache, pack_all, drawn, monkeypatch):
    pack_all()
    images, labels, names = emoji_set.load(cache)
    assert len(drawn) == len(images) == len(labels) == 15
    for package in cache.glob("*.tgz"):
        package.unlink()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(emoji_set, "renderer", None)
    again = emoji_set.load(cache)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert names == again[2]


def test_the_default_cache_is_the_users(cache, pack_all, drawn, monkeypatch, tmp_path):
    pack_all()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = tmp_path / "xdg" / "s2sd-pml" / "emoji"
    folder.parent.mkdir(parents=True)
    cache.rename(folder)
    emoji_set.load()
    assert (folder / "emoji-64.npz").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / "xdg").rename(tmp_path / ".cache")
    emoji_set.load()
    assert len(drawn) == 15  # the second time it was found


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "not a zip", "another recipe"])
def test_a_stale_or_damaged_cache_is_made_again(cache, pack_all, drawn, monkeypatch, damage):
    pack_all()
    images, _, names = emoji_set.load(cache)
    path = cache / "emoji-64.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "another recipe":
        monkeypatch.setattr(emoji_set, "RECIPE", 0)
    else:
        damaged = {"cut": content[:-9], "flipped": content, "empty": b"", "not a zip": b"emoji"}
        path.write_bytes(damaged[damage])
    again = emoji_set.load(cache)
    assert len(drawn) == 2 * len(images)
    assert torch.equal(images, again[0])
    assert names == again[2]
    assert emoji_set.read(path) is not None


def test_no_flipped_byte_changes_what_is_read(cache, pack_all, drawn):
    pack_all()
    emoji_set.load(cache)
    path = cache / "emoji-64.npz"
    good, content = emoji_set.read(path), path.read_bytes()
    size = len(content)
    for place in [*range(0, size, 997), *range(size - 300, size)]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        seen = emoji_set.read(path)
        assert seen is None or all(map(np.array_equal, seen, good)), place


def test_a_result_that_is_not_wholly_written_is_not_kept(cache, pack_all, drawn, monkeypatch):
    pack_all()
    before = set(cache.iterdir())

    def fail(path, **arrays):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", fail)
        with pytest.raises(OSError, match="no space left"):
            emoji_set.load(cache)
    assert set(cache.iterdir()) == before
    assert len(emoji_set.load(cache)[0]) == 15
    assert set(cache.iterdir()) == before | {cache / "emoji-64.npz"}


def test_a_wrong_checksum_is_refused_and_deletes_only_that_file(cache, pack_all, drawn):
    pack_all()
    bad = cache / "iconify-json-openmoji-1.0.0.tgz"
    bad.write_bytes(b"not what was asked for")
    before = set(cache.iterdir())
    with pytest.raises(emoji_set.EmojiError) as caught:
        emoji_set.load(cache)
    seen = hashlib.sha256(b"not what was asked for").hexdigest()
    for words in (str(bad), seen, emoji_set.PACKAGES["openmoji"][1], "run again"):
        assert words in str(caught.value)
    assert set(cache.iterdir()) == before - {bad}


def make_npm(tmp_path, monkeypatch, script):
    if sys.platform == "win32":
        pytest.skip("the stand-in for npm is a shell script")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_what_is_missing_is_fetched_and_checked(cache, pack_all, drawn, monkeypatch, tmp_path):
    pack_all()
    path = cache / "iconify-json-noto-1.0.0.tgz"
    kept = path.rename(tmp_path / "noto")
    # $1 to $6: pack, the package, two flags, --pack-destination, the folder
    copy = f'[ "$2" = @iconify-json/noto@1.0.0 ] && /bin/cp {kept} "$6/fetched.tgz"'
    make_npm(tmp_path, monkeypatch, copy)
    assert len(emoji_set.load(cache)[0]) == 15
    assert path.read_bytes() == kept.read_bytes()
    path.unlink()
    kept.write_bytes(b"something else")
    with pytest.raises(emoji_set.EmojiError, match="is expected"):
        emoji_set.tarball("noto", cache)
    assert not path.exists()


def test_a_missing_npm_is_named(cache, pack_all, drawn, monkeypatch):
    pack_all()
    path = cache / "iconify-json-noto-1.0.0.tgz"
    path.unlink()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(emoji_set.EmojiError, match="npm was not found: install Node.js") as caught:
        emoji_set.load(cache)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "npm error code ENOTFOUND\nnpm error syscall getaddrinfo\nnpm error errno ENOTFOUND\n"
            "npm error network request to https://registry.npmjs.org/x failed\n"
            "npm error network In most cases you are behind a proxy\n"
            "npm error A complete log of this run can be found in: /root/debug.log",
            "network request to https://registry.npmjs.org/x failed",
        ),
        ("npm ERR! code E404\nnpm ERR! 404 Not Found", "404 Not Found"),
        ("npm error code EWHAT", "code EWHAT"),
        ("", "it gave no reason"),
    ],
)
def test_a_failing_npm_is_named_with_its_reason(
    cache, pack_all, drawn, monkeypatch, tmp_path, said, reason
):
    pack_all()
    (cache / "iconify-json-noto-1.0.0.tgz").unlink()
    before = set(cache.iterdir())
    make_npm(tmp_path, monkeypatch, f"printf '%s' '{said}' >&2\nexit 1")
    with pytest.raises(emoji_set.EmojiError) as caught:
        emoji_set.load(cache)
    assert f"npm could not fetch @iconify-json/noto@1.0.0 ({reason}): fix" in str(caught.value)
    assert set(cache.iterdir()) == before


def test_a_missing_resvg_is_named_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(emoji_set.EmojiError, match="pip install resvg-py"):
        emoji_set.load(tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.download
def test_the_real_packages(tmp_path):
    pytest.importorskip("resvg_py")
    images, labels, names = emoji_set.load(tmp_path)
    assert images.shape == (10434, 4, 64, 64)
    assert len(names) == len(set(names)) == 1591
    sizes = labels.bincount()
    assert labels.equal(labels.sort().values)
    assert sizes.bincount().tolist() == [0, 0, 0, 0, 391, 100, 193, 290, 371, 246]
    assert names[:3] == ["sheaf-of-rice", "blue-square", "man-astronaut"]
    assert not [n for n in names if "skin-tone" in n or n.startswith("flag-for")]
    alpha = images[:, 3].flatten(1)
    assert (alpha.amax(dim=1) > 200).all()
    assert (alpha.amin(dim=1) == 0).float().mean() > 0.95  # few fill their square
