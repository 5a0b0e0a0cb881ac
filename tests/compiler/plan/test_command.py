"""moec plan: what it prints, its JSON, its page, and one clear line for each bad input."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import zlib

import pytest
import typer
from typer.testing import CliRunner

from moec.compiler.errors import CompileError
from moec.compiler.plan.api import plan
from moec.compiler.plan.command import register
from moec.compiler.plan.page import plan_page
from moec.passes.placement.calibration import ServingRow, calibration, fitted_parameters, predict_row, row_case
from moec.passes.placement.verify import verify_plan

MESH = {
    "name": "two",
    "devices": ["rtx4090", "rtx4090"],
    "inside": {"kind": "pcie", "latency_s": 5e-5, "bytes_per_s": 1e10},
}
SMALL = ["zoo:deepseek-moe-16b", "--mesh", "rtx4090x4", "--weights", "fp8"]


def run(*args: object):
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return CliRunner().invoke(app, ["plan", *map(str, args)])


def test_table():
    result = run(*SMALL, "--capacity", "1.25")
    assert result.exit_code == 0
    for text in (
        "deepseek-moe-16b in fp8 on rtx4090x4",
        "16.4 billion parameters, 2.8 billion of them for a token",
        "certificate:",
        "verifier: holds",
        "capacity 1.25",
        "slower than",
    ):
        assert text in result.output


def test_json_has_the_fields_that_other_programs_read(tmp_path):
    result = run(*SMALL, "--json", "-o", tmp_path / "plan.json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "plan.json").read_text())
    assert verify_plan(document) == []
    assert {"strategy", "ranks", "kv_tokens", "step_ms", "tokens_per_s", "certificate", "rejected"} <= set(document)
    assert {"rank", "weight_bytes", "kv_bytes_per_token", "shares"} <= set(document["ranks"][0])
    assert {"objective", "lower_bound", "gap"} <= set(document["certificate"])
    assert {"strategy", "reason", "tokens_per_s"} <= set(document["rejected"][0])


def test_same_inputs_same_plan():
    assert run(*SMALL, "--json").stdout == run(*SMALL, "--json").stdout


def test_directory_mesh_file_and_trace(tmp_path):
    config = {
        "model_type": "mixtral",
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 1000,
    }
    config |= {"num_key_value_heads": 4, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text(json.dumps(config))
    (tmp_path / "mesh.json").write_text(json.dumps(MESH))
    trace = {"model": "tiny", "counts": [[100, 1, 1, 1, 1, 1, 1, 1]] * 4}
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    files = (tmp_path / "tiny", "--mesh", tmp_path / "mesh.json", "--trace", tmp_path / "trace.json")
    result = run(*files, "--strategy", "EP2+1", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    held = {g for e, g, _ in document["layers"][0]["resident"] if e == 0}
    assert held == {0, 1}  # the expert that takes 93 % of the slots is copied to both groups
    assert verify_plan(document) == []


@pytest.mark.parametrize(("gpu", "count", "weights"), [("H100", 2, "fp8"), ("A100", 8, "fp16"), ("L40S", 8, "fp8")])
def test_a_published_row_asked_for_on_the_command_line(gpu, count, weights):
    """The command gives what the calibration gives for the same row: same cache format, same queue."""
    fields = next(r for r in calibration()["rows"] if (r["gpu"], r["num_gpus"], r["weights"]) == (gpu, count, weights))
    row = ServingRow(**fields)
    lengths = ("--prompt-len", row.input_len, "--gen-len", row.output_len, "--num-requests", row.num_requests)
    result = run(
        f"zoo:{row.model}",
        "--mesh",
        f"{gpu}x{count}",
        "--weights",
        weights,
        "--strategy",
        row.parallel,
        *lengths,
        "--json",
    )
    assert result.exit_code == 0, result.output
    predicted = predict_row(row_case(row), fitted_parameters())
    # expert use differs (Zipf here, even there), which matters only to the few slices with almost no sequences
    assert json.loads(result.stdout)["tokens_per_s"] == pytest.approx(predicted, rel=0.01)


def test_what_does_not_fit_says_what_would():
    result = run("zoo:mixtral-8x22b", "--mesh", "rtx4090x8", "--weights", "bf16")
    assert result.exit_code != 0
    message = str(result.exception)
    assert isinstance(result.exception, CompileError)
    assert re.search(
        r"mixtral-8x22b in bf16 does not fit rtx4090x8: .*--weights fp8 fits this mesh; bf16 fits rtx4090x8x", message
    )


BAD_INPUTS = [
    (["zoo:gpt-9", "--mesh", "h100x8"], "no such zoo model; expected zoo: and one of skywork-moe"),
    (["nowhere", "--mesh", "h100x8"], "expected zoo:NAME or a directory with config.json"),
    (["zoo:mixtral-8x7b", "--mesh", "h100xx8"], "mesh 'h100xx8': unknown"),
    (["zoo:mixtral-8x7b", "--mesh", "none.json"], "none.json: cannot be read"),
    (["zoo:mixtral-8x7b", "--mesh", "{missing}"], "inside: field 'bytes_per_s' is missing"),
    (["zoo:mixtral-8x7b", "--mesh", "{negative}"], "field 'bytes_per_s' is -1; expected a positive number"),
    (["zoo:mixtral-8x7b", "--mesh", "{garbage}"], "is not JSON"),
    (["zoo:mixtral-8x7b", "--mesh", "h100x8", "--weights", "fp7"], "weights 'fp7': unknown format"),
    (["zoo:mixtral-8x7b", "--mesh", "h100x8", "--strategy", "QP8"], "strategy 'QP8': expected a name such as TP8"),
    (["zoo:mixtral-8x7b", "--mesh", "h100x8", "--strategy", "TP4"], "needs 4 devices, mesh h100x8 has 8"),
    (["zoo:skywork-moe", "--mesh", "h100x8x8", "--strategy", "TP64"], "36 query heads, fewer than the 64 shares"),
    (["zoo:mixtral-8x7b", "--mesh", "h100x8", "--trace", "{trace}"], "the trace is of model 'grok-1'"),
    (["zoo:mixtral-8x7b", "--mesh", "h100x8", "--batch", "-1"], "--batch is -1; expected at least 0"),
    (["zoo:mixtral-8x7b", "--mesh", "h100x8", "--gen-len", "0"], "--gen-len is 0; expected at least 1"),
    (["zoo:mixtral-8x7b", "--mesh", "h100x8", "--capacity", "0"], "capacity 0.0: expected a factor above 0"),
    (["zoo:mixtral-8x7b", "--mesh", "h100x8", "--zipf", "9"], "--zipf is 9.0; expected an exponent"),
    (["zoo:mixtral-8x7b", "--mesh", "h100x8", "--kv", "int1"], "--kv is 'int1'; expected auto, bf16 or fp8"),
]


@pytest.mark.parametrize(("args", "message"), BAD_INPUTS)
def test_bad_input(args, message, tmp_path):
    without = {"kind": "pcie", "latency_s": 5e-5}
    files = {
        "missing": json.dumps(MESH | {"inside": without}),
        "negative": json.dumps(MESH | {"inside": without | {"bytes_per_s": -1}}),
        "garbage": "{",
        "trace": json.dumps({"model": "grok-1", "counts": [[1] * 8] * 64}),
    }
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    result = run(*(a.format(**{n: tmp_path / f"{n}.json" for n in files}) if "{" in a else a for a in args))
    assert isinstance(result.exception, CompileError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium here: apt-get install chromium to look at the page in a real browser")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    made = plan("zoo:skywork-moe", "rtx4090x8", "fp8", zipf=0.8)
    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(plan_page(made.document))
    return path, made.document


def test_page_is_self_contained(page):
    text = page[0].read_text()
    assert not re.search(r"<script|<link|<img|@import|url\(|https?://", text)
    assert "<b>" in text and "Rejected strategies" in text


def test_page_in_a_browser(page):
    """The browser parses it without repair of what matters: every section, every rank, every rejected strategy, every
    cell."""
    path, document = page
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for title in (
        "Mesh",
        "Memory of each device",
        "What each device holds",
        "Where a step",
        "Expert load before",
        "Rejected",
    ):
        assert f"<h2>{title}" in dom
    assert dom.count("<title>layer ") == 2 * 52 * document["certificate"]["plan"]["expert_groups"]
    for row in document["rejected"]:
        assert f"<td>{row['strategy']}</td>" in dom
    assert f"{document['tokens_per_s']:,.0f}" in dom


def test_page_paints_bars_and_heat_map(page, tmp_path):
    shot = tmp_path / "page.png"
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2600"]
    command.append("--force-device-scale-factor=0.5")  # a quarter of the pixels to decode here
    subprocess.run([*command, f"--screenshot={shot}", page[0].as_uri()], capture_output=True, check=True)
    width, height, colours = png_colours(shot.read_bytes())
    assert (width, height) == (550, 1300)
    weights, cache, experts = (47, 111, 179), (61, 143, 109), (217, 131, 36)
    assert all(colours.get(c, 0) > 1000 for c in (weights, cache, experts))  # pixels of the bars' fills
    assert len(colours) > 60  # the shades of the heat map


def png_colours(data: bytes) -> tuple[int, int, dict[tuple[int, ...], int]]:
    """Size and colour counts of an 8-bit RGB or RGBA PNG without interlacing, as a screenshot is."""
    at, packed, header = 8, b"", b""
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        header, packed = (body, packed) if kind == b"IHDR" else (header, packed + body if kind == b"IDAT" else packed)
        at += 12 + length
    width, height, depth, kind = struct.unpack(">IIBB", header[:10])
    assert depth == 8 and kind in (2, 6)
    step = 3 if kind == 2 else 4
    raw, stride, before = zlib.decompress(packed), width * step, bytearray(width * step)
    counts: dict[tuple[int, ...], int] = {}
    for y in range(height):
        start = y * (stride + 1)
        line = unfilter(raw[start], bytearray(raw[start + 1 : start + 1 + stride]), before, step)
        for x in range(0, stride, step):
            colour = tuple(line[x : x + 3])
            counts[colour] = counts.get(colour, 0) + 1
        before = line
    return width, height, counts


def unfilter(kind: int, line: bytearray, before: bytearray, step: int) -> bytearray:
    """Undoes one PNG line filter (PNG specification, section 9)."""
    for i in range(len(line)):
        left, up = line[i - step] if i >= step else 0, before[i]
        corner = before[i - step] if i >= step else 0
        if kind == 4:
            guess = left + up - corner
            near = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))
            line[i] = (line[i] + near[2]) & 255
        elif kind:
            line[i] = (line[i] + (left, up, (left + up) // 2)[kind - 1]) & 255
    return line
