"""The page of tuning results: what it says, and that a browser shows all of it."""

import re
import shutil
import struct
import subprocess
import zlib

import pytest
from tuning import a_key, a_record, a_tuning_run

from moec.compiler.tune import report
from moec.compiler.tune.compare import summaries
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.page import tuning_page, write_page
from moec.compiler.tune.roofline import bits_of, work_of

pytestmark = pytest.mark.null
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OVERFLOWS = """<script>
let found = [];
for (const svg of document.querySelectorAll("svg")) {
  const box = svg.viewBox.baseVal;
  for (const item of svg.querySelectorAll("text, circle, rect, path")) {
    if (item.closest("clipPath") || item.hasAttribute("clip-path")) continue;
    const b = item.getBBox();
    if (b.x < -1 || b.y < -3 || b.x + b.width > box.width + 1 || b.y + b.height > box.height + 3)
      found.push(svg.getAttribute("aria-label") + ": " + (item.textContent || item.outerHTML).slice(0, 60));
  }
}
if (document.documentElement.scrollWidth > window.innerWidth + 1) found.push("the page is wider than the window");
document.title = "overflows " + found.length + " " + found.slice(0, 3).join("; ");
</script>"""


@pytest.fixture(scope="module")
def records():
    return a_tuning_run()


def test_the_page_says_what_was_found(records):
    page = tuning_page(records)
    found = summaries(records)
    for heading in ("Speed-up", "Under the roof", "Search", "Parameters", "Winners", "Rejected"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count('aria-label="search curve"') == len(found) == 18
    gained = sum(s.speedup > 1 for s in found)
    assert f"<b>{gained} of 18</b>" in page and page.count("default stays") == 18 - gained
    assert f"<b>{sum(s.trials for s in found)}</b>" in page
    for reason in {r.reason for r in records if r.status != "ok"}:
        assert reason in page
    fastest = max(found, key=lambda s: s.speedup)
    assert f"{fastest.speedup:.2f}x" in page and f"{fastest.speedup:.3f}" in page


def test_the_page_is_one_file_of_text(records):
    page = tuning_page([*records, a_record(0, a_key(device="<script>alert(1)</script>"), reason="</svg><b>")])
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import", page.replace("url(#plot)", ""))
    assert "prefers-color-scheme: dark" in page


def test_few_records_make_a_page_too(tmp_path):
    only = a_record(0, is_default=True, ratio=1.0, ratio_low=None, ratio_high=None)
    assert "default stays" in tuning_page([only])
    failed = a_record(
        1, status="crashed", median_us=None, ratio=None, ratio_low=None, ratio_high=None, reason="signal 6"
    )
    assert "signal 6" in tuning_page([failed])
    odd = a_record(0, a_key(shape="something-else"), is_default=True, ratio=1.0)
    assert "something-else" in tuning_page([odd]) and "Under the roof" not in tuning_page([odd])
    with pytest.raises(TuneError, match="the database has no record of that kind"):
        tuning_page([])
    with pytest.raises(TuneError, match="cannot be written"):
        write_page([only], tmp_path / "no" / "page.html")


def test_the_work_of_a_problem():
    # 16 tokens take 2 of 8 experts each: 8 * (1 - 0.75**16) of them in use; x and y are 2 * 16 rows of 256 in 2 bytes
    work = work_of(a_key(weight_format="bf16"))
    used = 8 * (1 - 0.75**16)
    assert work.num_bytes == pytest.approx(used * 3 * 512 * 256 * 2 + 2 * 16 * 2 * 256)
    assert work.flops == 2 * 16 * 2 * 3 * 512 * 256
    assert work_of(a_key(shape="E=8,F=512,H=256,K=2,S=0,mode=down")).flops == work.flops / 3
    assert work_of(a_key(shape="odd")) is None
    assert bits_of("bf16-packed") == 12.125
    assert [bits_of(f) for f in ("bf16", "int4-g64", "int8", "mxfp4", "int2-g16-asym", "odd")] == [
        16,
        4.25,
        8,
        4.25,
        3,
        16,
    ]


def test_known_devices_have_their_own_roof(records):
    assert report.roof(summaries(records)).source == "the most that any problem here reached"
    on_gpu = a_record(0, a_key(device="NVIDIA H200"), is_default=True, ratio=1.0)
    assert report.roof(summaries([on_gpu])).source == "data sheet of h200, bf16"


def test_effects_compare_within_a_problem_and_a_kernel():
    """A value that is always 10 % slower shows as that, whatever the level of its problem."""
    made = []
    for level, tokens in ((0.5, 1), (3.0, 64)):
        for n in range(12):
            config = {"kernel": "k", "rows": n % 2, "seldom": int(n == 0)}
            ratio = level * (1.1 if n % 2 else 1.0)
            made.append(a_record(n, a_key(tokens=tokens), config=config | {"n": n // 2}, ratio=ratio))
    found = report.effects(made)
    slow, fast = (next(e for e in found["rows"] if e.value == v) for v in "10")
    assert slow.median / fast.median == pytest.approx(1.1) and slow.count == 12
    assert "seldom" not in found and "kernel" not in found


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH (looked for chromium, google-chrome)")
@pytest.mark.parametrize(("width", "scheme"), [(1100, 1), (480, 0)])  # 0: dark
def test_a_browser_shows_all_of_it(records, tmp_path, width, scheme):
    page = tmp_path / "page.html"
    page.write_text(tuning_page(records).replace("</body>", OVERFLOWS + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--hide-scrollbars", f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},700"]
    dom = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert "<title>overflows 0 </title>" in dom, re.findall(r"<title>overflows.*?</title>", dom)
    shot = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    colours = colours_of(shot.read_bytes())
    paper = (0x14, 0x19, 0x1F) if scheme == 0 else (0xFB, 0xFC, 0xFD)
    blue = (0x2F, 0x6F, 0xB3)
    assert max(colours, key=colours.get) == paper and colours[blue] > 300


def colours_of(png):
    """How often each colour occurs in a PNG of 8 bits RGB or RGBA."""
    at, data, counts = 8, b"", {}
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            wide, high, depth, form = struct.unpack(">IIBB", body[:10])
            size = {2: 3, 6: 4}[form]
            assert depth == 8
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    rows, before = zlib.decompress(data), bytearray(wide * size)
    for y in range(high):
        start = y * (wide * size + 1)
        before = _unfiltered(rows[start], bytearray(rows[start + 1 : start + 1 + wide * size]), before, size)
        for x in range(0, len(before), size * 2):  # every second pixel is enough
            colour = tuple(before[x : x + 3])
            counts[colour] = counts.get(colour, 0) + 1
    return counts


def _unfiltered(kind, row, above, size):
    if kind == 2:
        return bytearray((a + b) & 255 for a, b in zip(row, above, strict=True))
    for i in range(len(row) if kind else 0):
        left = row[i - size] if i >= size else 0
        corner = above[i - size] if i >= size else 0
        if kind == 1:
            add = left
        elif kind == 3:
            add = (left + above[i]) // 2
        else:
            guess = left + above[i] - corner
            add = min((left, above[i], corner), key=lambda v, g=guess: abs(v - g))
        row[i] = (row[i] + add) & 255
    return row
