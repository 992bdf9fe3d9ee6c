"""Draw images/how-it-works.png. Its matrices are real, of a short S2SD training on icons-400.

python docs/draw_how_it_works.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path as Outline
from pytorch_metric_learning import losses, miners
from torch import Tensor

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

from trainer import icons  # noqa: E402
from trainer.images import Batches  # noqa: E402
from trainer.network import Network  # noqa: E402

from s2sd_pml import S2SDLoss  # noqa: E402

Point = tuple[float, float]

# The batch of the picture, of training classes, as the KL terms see it.
CLASSES = "airplane camera scissors fish ghost heart anchor key".split()
PER_CLASS, EMBEDDING_SIZE, HEADS = 4, 8, (128, 512)

KEPT, HEAD, TEACHER, INK = "#0f6e84", "#c8641b", "#7b3fa0", "#1d2b33"
KEPT_CARD, TRAINING_CARD, EQUATION_CARD = "#e3f1f4", "#fbf4ea", "#f1f3f5"
SIMILARITY = LinearSegmentedColormap.from_list("s", ["#ffffff", "#bcd3de", "#3f7f9f", "#0b2a45"])

# Columns and rows, in units of 100 pixels.
PHI, EMBED, PSI, LOSS, MATRIX, SIDE = 5.95, 7.4, 8.85, 10.3, 11.95, 1.5
ROWS = {"gm": 7.55, "g1": 5.75, "φ": 3.95, "ψ": 1.55}
WORDS = 0.66  # the line of words under the model


def trained_batch() -> tuple[Tensor, dict[str, Tensor]]:
    """A training batch and its cosine similarities in every space, after a short training.

    Returns:
        images (B, 32, 32), and the B x B matrix by the name of its row in the picture.
    """
    torch.manual_seed(0)
    data, _ = icons.split(icons.load())
    model = Network(EMBEDDING_SIZE)
    loss_func = S2SDLoss(
        losses.MultiSimilarityLoss(),
        miners.MultiSimilarityMiner(),
        embedder=model.embedder,
        head_dims=HEADS,
        distill_weight=5.0,
        feature_distill_weight=5.0,
        feature_distill_delay=0,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss_func.add_to(optimizer)
    for rows, _ in Batches(data.labels, 128, 4, steps=300, seed=0):
        loss = loss_func(model(data.images[rows]), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    rows = [
        int(row)
        for name in CLASSES
        for row in (data.labels == data.names.index(name)).nonzero()[:PER_CLASS]
    ]
    images = data.images[rows]
    with torch.no_grad():
        features = model.trunk(images).mean(dim=(2, 3))
        heads = loss_func.project(features)
        spaces = {"φ": features, "ψ": model.embedder(features)}
        spaces |= {"g1": heads[HEADS[0]], "gm": heads[HEADS[1]]}
    unit = {name: torch.nn.functional.normalize(z, dim=1) for name, z in spaces.items()}
    return images[:, 0], {name: z @ z.T for name, z in unit.items()}


def rounded(corners: list[Point], radius: float, closed: bool = False) -> Outline:
    """A polyline through ``corners`` with rounded bends."""
    points = [torch.tensor(c) for c in corners]
    n = len(points)
    vertices, codes = [], []
    for i, corner in enumerate(points):
        if not closed and i in (0, n - 1):
            bend = [corner]
        else:
            ways = [points[i - 1] - corner, points[(i + 1) % n] - corner]
            before, after = (corner + w * min(radius / float(w.norm()), 0.5) for w in ways)
            bend = [before, corner, after]
        codes += [Outline.LINETO] + [Outline.CURVE3] * (len(bend) - 1)
        vertices += [tuple(p.tolist()) for p in bend]
    codes[0] = Outline.MOVETO
    if closed:
        vertices, codes = [*vertices, vertices[0]], [*codes, Outline.CLOSEPOLY]
    return Outline(vertices, codes)


def card(ax: Axes, corners: list[Point], colour: str) -> None:
    """A tinted region with rounded corners."""
    ax.add_patch(PathPatch(rounded(corners, 0.25, closed=True), fc=colour, ec="none", zorder=0))


def wire(ax: Axes, corners: list[Point], colour: str, head: bool = True) -> None:
    """A line with rounded bends, and an arrow head at its end."""
    outline = rounded(corners, 0.22)
    ax.add_patch(PathPatch(outline, fc="none", ec=colour, lw=2.2, capstyle="round", zorder=2))
    if head:
        (x0, y0), (x1, y1) = corners[-2:]
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        base = (x1 - 0.2 * dx, y1 - 0.2 * dy)
        wings = [(base[0] + s * 0.1 * dy, base[1] + s * 0.1 * dx) for s in (1, -1)]
        ax.add_patch(Polygon([(x1, y1), *wings], fc=colour, ec=colour, lw=1, zorder=3))


def label(ax: Axes, x: float, y: float, text: str, size: float, colour: str = INK, **kw) -> None:
    """Text, by default centred on its point."""
    ax.text(x, y, text, **{"ha": "center", "va": "center", **kw}, fontsize=size, color=colour)


def dot(ax: Axes, x: float, y: float, colour: str) -> None:
    """Where a line splits."""
    ax.add_patch(Circle((x, y), 0.085, fc=colour, ec="white", lw=1.5, zorder=4))


def box(ax: Axes, x: float, y: float, text: str, colour: str, dashed: bool = False) -> None:
    """A layer with weights."""
    style = "round,pad=0,rounding_size=0.16"
    corner, ls = (x - 0.55, y - 0.4), "--" if dashed else "-"
    patch = FancyBboxPatch(corner, 1.1, 0.8, boxstyle=style, fc="white", ec=colour, lw=2.2, ls=ls)
    patch.set_zorder(3)
    ax.add_patch(patch)
    label(ax, x, y - 0.02, text, 21, zorder=4)


def loss(ax: Axes, y: float, text: str, colour: str) -> None:
    """A metric-learning loss, next to the line that feeds it."""
    wire(ax, [(PSI, y), (PSI, y + 0.58), (LOSS - 0.36, y + 0.58)], colour, head=False)
    ax.add_patch(Circle((LOSS, y + 0.58), 0.36, fc=colour, ec="none", zorder=3))
    label(ax, LOSS, y + 0.57, text, 18, "white", zorder=4)
    dot(ax, PSI, y, colour)


def matrix(ax: Axes, y: float, values: Tensor, title: str, colour: str) -> None:
    """A heat map of similarities with its name to the left."""
    x0, x1, y0, y1 = MATRIX - SIDE / 2, MATRIX + SIDE / 2, y - SIDE / 2, y + SIDE / 2
    others = values[~torch.eye(len(values), dtype=torch.bool)]
    scale = {"vmin": others.quantile(0.1), "vmax": others.quantile(0.995)}  # each its own contrast
    ax.imshow(values.numpy(), extent=(x0, x1, y0, y1), cmap=SIMILARITY, **scale, zorder=2)
    ax.add_patch(Rectangle((x0, y0), SIDE, SIDE, fc="none", ec=colour, lw=2.4, zorder=3))
    label(ax, x0 - 0.62, y - 0.3, title, 16, colour)


def contact_sheet(ax: Axes, images: Tensor, x: float, y: float) -> float:
    """The batch, a column for every class; returns its right edge."""
    size = 0.36
    for i, image in enumerate(images):
        left, top = x + i // PER_CLASS * size, y + 2 * size - i % PER_CLASS * size
        extent = (left + 0.03, left + size - 0.03, top - size + 0.03, top - 0.03)
        ax.imshow(image.numpy(), extent=extent, cmap="Greys", zorder=3)
    width, height = len(images) // PER_CLASS * size, PER_CLASS * size
    style = "round,pad=0.06,rounding_size=0.1"
    patch = FancyBboxPatch((x, y - height / 2), width, height, boxstyle=style, fc="white", ec=KEPT)
    patch.set(lw=2.2, zorder=2)
    ax.add_patch(patch)
    return x + width + 0.06


def model(ax: Axes, images: Tensor) -> None:
    """The lane at the bottom, which is all that is deployed."""
    y = ROWS["ψ"]
    edge = contact_sheet(ax, images, 0.6, y)
    wide, narrow, left, right = 0.72, 0.4, edge + 0.5, edge + 1.75
    wire(ax, [(edge, y), (left, y)], KEPT)
    shape = [(left, y - wide), (left, y + wide), (right, y + narrow), (right, y - narrow)]
    ax.add_patch(
        PathPatch(rounded(shape, 0.13, closed=True), fc="white", ec=KEPT, lw=2.2, zorder=3)
    )
    label(ax, (left + right) / 2, y, "trunk", 17, zorder=4)
    wire(ax, [(right, y), (EMBED - 0.55, y)], KEPT)
    box(ax, EMBED, y, "$f$", KEPT)
    wire(ax, [(EMBED + 0.55, y), (PSI, y)], KEPT, head=False)
    label(ax, PHI, y - 0.33, "$\\varphi$", 22)
    label(ax, PSI, y - 0.33, "$\\psi$", 22)
    for x, word in ((PHI, "features"), (EMBED, "embedder"), (PSI, "embeddings")):
        label(ax, x, WORDS, word, 14.5, KEPT)


def objective(ax: Axes) -> None:
    """The three terms, each in the colour of what it does in the picture."""
    x, y, step = 0.55, 6.7, 0.8
    card(ax, [(0.25, 4.55), (0.25, 8.7), (5.25, 8.7), (5.25, 4.55)], EQUATION_CARD)
    label(ax, x, y + 0.75, "loss  =", 16, ha="left")
    terms = (
        ("$\\frac{1}{2}\\,[\\;L(\\psi)\\,+\\,\\mathrm{mean}_i\\;L_i(g_i(\\varphi))\\;]$", INK),
        ("$+\\;\\gamma\\;\\mathrm{mean}_i\\;\\mathrm{KL}(g_i(\\varphi)\\to\\psi)$", HEAD),
        ("$+\\;\\gamma_f\\;\\mathrm{KL}(\\varphi\\to\\psi)$", TEACHER),
    )
    for i, (term, colour) in enumerate(terms):
        label(ax, x, y - i * step, term, 22, colour, ha="left")


def draw(path: Path) -> None:
    """The whole picture: one row for every space, the deployed model at the bottom."""
    images, similarities = trained_batch()
    plt.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "cm"})
    fig = plt.figure(figsize=(16, 9), dpi=100)
    ax = fig.add_axes((0, 0, 1, 1))
    psi, right = ROWS["ψ"], MATRIX + SIDE / 2
    card(ax, [(0.25, 0.3), (0.25, 2.95), (9.75, 2.95), (9.75, 0.3)], KEPT_CARD)
    card(
        ax,
        [(5.45, 3.05), (5.45, 8.7), (15.75, 8.7), (15.75, 0.3), (9.85, 0.3), (9.85, 3.05)],
        TRAINING_CARD,
    )

    for row, name, bus in (("gm", "m", 14.5), ("g1", "1", 14.5)):
        y = ROWS[row]
        wire(ax, [(PHI, psi), (PHI, y), (EMBED - 0.55, y)], HEAD)
        box(ax, EMBED, y, f"$g_{name}$", HEAD, dashed=True)
        wire(ax, [(EMBED + 0.55, y), (MATRIX - SIDE / 2, y)], HEAD)
        loss(ax, y, f"$L_{name}$", HEAD)
        matrix(ax, y, similarities[row], f"$\\cos(g_{name}(\\varphi))$", HEAD)
        wire(ax, [(right, y), (bus, y), (bus, psi - 0.25), (right + 0.06, psi - 0.25)], HEAD)
    label(ax, EMBED, ROWS["gm"] + 0.68, "heads", 14.5, HEAD)
    label(ax, EMBED, (ROWS["gm"] + ROWS["g1"]) / 2, "$\\vdots$", 24, HEAD)

    y = ROWS["φ"]
    wire(ax, [(PHI, psi), (PHI, y)], KEPT, head=False)
    wire(ax, [(PHI, y), (MATRIX - SIDE / 2, y)], TEACHER)
    dot(ax, PHI, y, KEPT)
    matrix(ax, y, similarities["φ"], "$\\cos(\\varphi)$", TEACHER)
    wire(ax, [(right, y), (13.4, y), (13.4, psi + 0.25), (right + 0.06, psi + 0.25)], TEACHER)

    model(ax, images)
    wire(ax, [(PSI, psi), (MATRIX - SIDE / 2, psi)], KEPT)
    loss(ax, psi, "$L$", KEPT)
    matrix(ax, psi, similarities["ψ"], "$\\cos(\\psi)$", KEPT)
    dot(ax, PHI, psi, KEPT)
    label(ax, 14.65, 4.75, "$\\gamma\\;\\mathrm{KL}$", 21, HEAD, ha="left")
    label(ax, 13.55, 2.9, "$\\gamma_f\\,\\mathrm{KL}$", 21, TEACHER, ha="left")

    objective(ax)
    label(ax, 0.55, 2.64, "kept: the model you deploy", 16, KEPT, ha="left")
    label(ax, 15.45, 8.4, "training only", 16, HEAD, ha="right")
    ax.set(xlim=(0, 16), ylim=(0, 9), aspect="equal")
    ax.axis("off")
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, transparent=True)  # every word stands on a card


if __name__ == "__main__":
    draw(DOCS / "images" / "how-it-works.png")
