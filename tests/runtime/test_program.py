from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from moec.runtime.errors import FormatError
from moec.runtime.program import Buffer, Program, Step

PROGRAM = Program(
    symbols=("T",),
    buffers=(Buffer("x", "float32", ("T", 4), "input"), Buffer("y", "float32", ("2*T", 4), "value")),
    inputs=(0,),
    outputs=(1,),
    steps=(
        Step(
            "choose",
            "",
            "cat",
            symbol="T",
            variants=(
                (4, (Step("aten", "aten.cat.default", "cat", ([{"buffer": 0}, {"buffer": 0}],), outputs=(1,)),)),
                (None, (Step("aten", "aten.cat.default", "cat", ([{"buffer": 0}, {"buffer": 0}], 0), outputs=(1,)),)),
            ),
        ),
    ),
)


def test_an_engine_of_a_newer_moec_is_refused() -> None:
    later = dataclasses.replace(PROGRAM.buffers[1], kind="later")
    data = dataclasses.replace(PROGRAM, buffers=(PROGRAM.buffers[0], later)).to_json()
    with pytest.raises(FormatError, match=r"buffer y is of kind 'later', known: input, .*, zeros; update moec$"):
        Program.from_json(data)


@pytest.mark.parametrize("shape", [("T", 4), (0,), (True,), (2.0,)])
def test_zeros_have_a_fixed_size(shape: tuple) -> None:
    data = dataclasses.replace(PROGRAM, buffers=(PROGRAM.buffers[0], Buffer("y", "int32", shape, "zeros"))).to_json()
    with pytest.raises(FormatError, match=r"buffer y of zeros has the shape .*, expected numbers"):
        Program.from_json(data)


def test_json_round_trip() -> None:
    assert Program.from_json(json.loads(json.dumps(PROGRAM.to_json()))) == PROGRAM


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("buffers", 0, "kind"), "file"),
        (("inputs", 0), 7),
        (("outputs", 0), -1),
        (("steps", 0, "kind"), "shell"),
        (("steps", 0, "variants", 0, 1, 0, "args"), [{"buffer": 99}]),
        (("steps", 0, "dies"), ["1"]),
        (("steps",), 3),
        (("buffers", 0), {"name": "x"}),
        (("symbols",), None),
    ],
)
def test_refuses_what_has_no_meaning(path: tuple, value: object) -> None:
    data = copy.deepcopy(json.loads(json.dumps(PROGRAM.to_json())))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(FormatError, match=r"program\.json"):
        Program.from_json(data)
