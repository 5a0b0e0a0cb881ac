"""runtime/launch/cpu_features.py: flags -> level."""

import itertools

import pytest

from moec.runtime.launch.cpu_features import LEVELS, best_level, missing_features, parse_cpuinfo

pytestmark = pytest.mark.null


@pytest.mark.parametrize("level", LEVELS)
def test_a_processor_with_exactly_a_level_gets_it(level):
    assert best_level(LEVELS[level]) == level
    assert missing_features(level, LEVELS[level]) == []


def test_levels_are_nested():
    sets = list(LEVELS.values())
    assert all(a < b for a, b in itertools.pairwise(sets))


def test_names_what_is_missing():
    missing = ["amx_bf16", "amx_int8", "amx_tile", "avx512vbmi", "gfni"]
    assert missing_features("amx_bf16", LEVELS["avx512_bf16"]) == missing
    assert best_level({"sse4_2"}) is None


def test_reads_the_first_processor():
    assert parse_cpuinfo("processor: 0\nflags\t\t: fma avx2\n\nprocessor: 1\nflags\t\t: sse\n") == {"fma", "avx2"}
    assert parse_cpuinfo("Features : asimd\n") == frozenset()
