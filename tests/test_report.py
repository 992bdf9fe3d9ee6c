"""report.html: one file with all that a run shows, readable in a real browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess

import pytest
import torch
import train
from test_examples import PICTURES, SMALL
from trainer import page, spaces


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    torch.set_num_threads(1)
    train.main([*SMALL, "--quiet", "--output", str(path)])
    return path


def test_it_holds_table_pictures_and_configuration_and_asks_for_nothing(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    table = (folder / "table.md").read_text()
    rows = [line[1:-1].split("|") for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 10
    for cell in (cell.strip() for row in rows[2:] for cell in row):
        assert f"<td>{cell}</td>" in text
    assert "<th>difference</th>" in text
    images = re.findall(r'<img alt="[^"]+" src="data:image/png;base64,([^"]+)"', text)
    files = [(folder / name).read_bytes() for name in page.PICTURES]
    assert [base64.b64decode(image) for image in images] == files
    assert set(page.PICTURES) == PICTURES
    config = json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", text, re.DOTALL)[1]))
    assert config == json.loads((folder / "config.json").read_text())
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "<script" not in text
    assert "<strong>One seed.</strong>" in text


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["1200,900", "390,844"])
def test_a_browser_shows_it_readable_and_without_a_message(folder, size, scheme, tmp_path):
    """A copy of the page measures itself, so that the browser can tell."""
    probe = """<script>addEventListener("load", () => {
      const images = [...document.images].every(i => i.complete && i.naturalWidth > 0);
      const fits = document.documentElement.scrollWidth <= innerWidth;
      const scheme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      const light = color => {  // relative luminance, as WCAG defines it
        const [r, g, b] = color.match(/[0-9]+/g).slice(0, 3).map(v => v / 255)
          .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const style = getComputedStyle(document.body);
      const [a, b] = [light(style.color), light(style.backgroundColor)];
      const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      document.title = [images, fits, scheme, contrast >= 7, a > b].join(" ");
    })</script></body>"""
    copy = tmp_path / "copy.html"
    copy.write_text((folder / "report.html").read_text().replace("</body>", probe))
    dark = scheme == "dark"
    flags = [
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [BROWSER, *flags, f"--window-size={size}", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    expected = f"true true {scheme} true {str(dark).lower()}"
    assert f"<title>{expected}</title>" in done.stdout
    assert "CONSOLE" not in done.stderr


def test_rho_is_zero_for_equal_directions_and_grows_as_they_vanish():
    assert spaces.rho(torch.eye(8)) == pytest.approx(0, abs=1e-9)
    x = torch.randn(200, 8)
    narrow = x * torch.tensor([1.0] * 4 + [0.05] * 4)
    assert 0 < spaces.rho(x) < spaces.rho(narrow)
    # by hand, for singular values 3 and 1: ½ ln(½ / ¾) + ½ ln(½ / ¼)
    assert spaces.rho(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(0.14384, abs=1e-5)
