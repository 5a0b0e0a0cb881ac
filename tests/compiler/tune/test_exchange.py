"""Results as files: JSON lines that are the same for the same results, and what is refused."""

import random

import pytest
from tuning import a_key, a_record, a_tuning_run

from moec.compiler.tune.compare import by_key, differences, merge, summaries
from moec.compiler.tune.database import Database
from moec.compiler.tune.errors import ResultsError
from moec.compiler.tune.exchange import read_lines, to_lines, write_lines

pytestmark = pytest.mark.null


@pytest.fixture
def database(tmp_path):
    with Database(tmp_path / "tuning.db") as made:
        yield made


def test_export_and_import_keep_everything(database, tmp_path):
    records = a_tuning_run()
    database.add_all(records)
    write_lines(database.records(), tmp_path / "out.jsonl")
    again = read_lines(tmp_path / "out.jsonl")
    assert sorted(again, key=lambda r: r.key) == sorted(records, key=lambda r: r.key)
    with Database(tmp_path / "copy.db") as copy:
        assert merge(copy, again).added == len(records)
        assert merge(copy, again).added == 0
        assert to_lines(copy.records()) == (tmp_path / "out.jsonl").read_text()


def test_the_same_results_are_the_same_bytes_whatever_the_order_of_problems():
    groups = list(by_key(a_tuning_run()).values())
    first = to_lines(r for group in groups for r in group)
    random.Random(1).shuffle(groups)
    assert to_lines(r for group in groups for r in group) == first


def test_files_can_be_joined(tmp_path):
    one, two = to_lines([a_record(1)]), to_lines([a_record(2)])
    (tmp_path / "both").write_text(one + "\n" + two)
    assert read_lines(tmp_path / "both") == [a_record(1), a_record(2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":1}\n', "line 1: expected .*moec-tuning.*moec tune export"),
        ("hello\n", "line 1: is not JSON"),
        ("[" * 100_000, "line 1: is not JSON"),
        ('{"format":"other","version":1}\n', "line 1: format 'other', expected 'moec-tuning'"),
        ('{"format":"moec-tuning","version":2}\n', "line 1: version 2, this moec reads up to 1; update moec"),
        ('{"format":"moec-tuning","version":1}\n{"key":3}\n', "line 2: the field 'config' is missing"),
        ('{"format":"moec-tuning","version":1}\n{"key"', "line 2: is not JSON"),
    ],
)
def test_what_is_no_file_of_results_is_refused(tmp_path, text, message):
    (tmp_path / "f").write_text(text)
    with pytest.raises(ResultsError, match=message):
        read_lines(tmp_path / "f")


def test_absent_and_unwritable_files(tmp_path):
    with pytest.raises(ResultsError, match="cannot be read"):
        read_lines(tmp_path / "absent")
    with pytest.raises(ResultsError, match="cannot be written"):
        write_lines([], tmp_path / "no" / "file")


def won(number, high, key=None):
    ratio = high - 0.02
    return a_record(number, key, ratio=ratio, ratio_low=ratio - 0.02, ratio_high=high, is_winner=True)


def test_of_two_winners_the_surer_one_stays_in_any_order(tmp_path):
    sure, unsure, same = won(1, 0.8), won(2, 0.9), won(3, 0.8)
    for number, order in enumerate([(sure, unsure), (unsure, sure)]):
        with Database(tmp_path / f"{number}.db") as database:
            conflicts = [len(merge(database, [r]).conflicts) for r in order]
            assert conflicts == [0, 1] and database.winner(a_key()) == sure
    for number, order in enumerate([(sure, same), (same, sure)], 2):
        with Database(tmp_path / f"{number}.db") as database:
            for record in order:
                merge(database, [record])
            assert database.winner(a_key()).config["tile"] == 1  # equal bounds: the first by its text


def test_differences():
    near, far, third = a_key(tokens=1), a_key(tokens=2), a_key(tokens=3)
    left = [won(1, 0.8, near), won(1, 0.8, far), won(1, 0.8, third), won(1, 0.8, a_key(tokens=4))]
    right = [won(2, 0.81, near), won(2, 0.5, far), won(1, 0.7, third), won(1, 0.8, a_key(tokens=5))]
    found, agree = differences(left, right)
    assert agree == 1
    assert [(d.key.tokens, d.kind, d.within_noise) for d in found] == [
        (1, "config", True), (2, "config", False), (4, "only-left", None), (5, "only-right", None),
    ]  # fmt: skip


def test_summaries_count_what_was_found_out():
    default = a_record(0, is_default=True, ratio=1.0, ratio_low=None, ratio_high=None)
    suggested = a_record(5, median_us=None, ratio=None, ratio_low=None, ratio_high=None, samples=0)
    failed = a_record(6, status="timeout", median_us=None, ratio=None, ratio_low=None, ratio_high=None)
    (found,) = summaries([default, won(1, 0.8), a_record(2), failed, suggested])
    assert found.trials == 4 and found.by_status == {"ok": 3, "timeout": 1}
    assert found.default == default and found.best == found.winner == won(1, 0.8)
    assert found.speedup == pytest.approx(1 / 0.78)
    kept = a_record(0, is_default=True, ratio=0.97, ratio_low=0.9, ratio_high=1.1, is_winner=True)
    assert summaries([kept])[0].speedup == 1.0  # the default timed against itself is noise
    (plain,) = summaries([default])
    assert plain.speedup == 1.0 and plain.winner is None


def test_a_suggestion_refuses_no_claim(database):
    suggested = a_record(5, median_us=None, ratio=None, ratio_low=None, ratio_high=None, samples=0)
    database.add(suggested)
    from moec.compiler.tune.record import config_hash

    assert not suggested.is_measured
    assert database.claim(a_key(), config_hash(suggested.config), "w")
    database.add(a_record(5))
    assert not database.claim(a_key(), config_hash(suggested.config), "w")
