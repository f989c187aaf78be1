import json
import math

import pytest
from common import report
from common.results import Result, Run
from rich.console import Console
from speedup import parse
from studies.speedup.tables import PAPER, Depth, best_of_sweep, compare, depths_table, shown


def result(name, *curves, rate=0.1):
    """Returns a result whose runs were evaluated after 10, 20, ... steps."""
    runs = [
        Run(seed, [10 * (i + 1) for i in range(len(curve))], list(curve), seconds=float(seed))
        for seed, curve in enumerate(curves)
    ]
    return Result(name, rate, runs)


# Best accuracies 0.8, 0.7, 0.9 after 40, 20, 30 steps: medians 0.8 and 30.
BASELINE = result("Baseline", [0.2, 0.5, 0.7, 0.8], [0.3, 0.7, 0.6, 0.6], [0.1, 0.8, 0.9, 0.9])


def rows(table):
    return {row["variant"]: tuple(row.values())[1:] for row in table["rows"]}


def test_medians_and_ratios():
    # Seed by seed the targets 0.8, 0.7, 0.9 are reached after 10, 10, 40 steps: the median is 10.
    variant = result(
        "BN", [0.8, 0.9, 0.9, 0.9], [0.7, 0.7, 0.7, 0.7], [0.8, 0.8, 0.8, 0.95], rate=0.5
    )
    table = compare("title", BASELINE, [variant], 10)
    assert (table["baseline_best_accuracy"], table["baseline_trained"]) == (0.8, True)
    assert rows(table) == {"Baseline": (0.1, 30, 1.0, 0.8, 1.0), "BN": (0.5, 10, 3.0, 0.9, 1.0)}


def test_an_unreached_target_counts_as_infinite():
    once = result("once", [0.8] * 4, [0.8] * 4, [0.8] * 4)
    twice = result("twice", [0.79] * 4, [0.7] * 4, [0.8] * 4)
    table = rows(compare("title", BASELINE, [once, twice], 10))
    assert table["once"][1] == 10 and table["twice"][1:3] == (None, None)


def test_no_ratio_to_a_baseline_that_did_not_train():
    chance = result("Baseline", [0.1, 0.11, 0.19])
    table = compare("title", chance, [result("BN", [0.9, 0.9, 0.9])], 10)
    assert not table["baseline_trained"] and all(row["ratio"] is None for row in table["rows"])
    assert compare("title", result("Baseline", [0.2]), [], 10)["baseline_trained"]


def test_best_of_sweep_prefers_accuracy_then_speed():
    slow, fast = result("slow", [0.7, 0.8, 0.9]), result("fast", [0.9, 0.8, 0.7])
    assert best_of_sweep([result("low", [0.8, 0.8, 0.8]), slow]) is slow
    assert best_of_sweep([slow, fast]) is fast


def printed(table):
    console = Console(width=80)
    with console.capture() as capture:
        console.print(shown(table))
    return capture.get()


def test_what_is_printed_and_written():
    table = compare(
        "title", BASELINE, [result("BN-x5-Sigmoid", [0.1] * 4, [0.1] * 4, [0.1] * 4)], 10
    )
    assert (
        "steps to 80.0%" in printed(table)
        and "not reached" in printed(table)
        and "1.0x" in printed(table)
    )
    assert table["rows"][1]["steps"] is None
    chance = compare("title", result("Baseline", [0.1]), [result("BN", [0.9])], 10)
    lines = [line for line in printed(chance).splitlines() if line.lstrip().startswith("B")]
    assert len(lines) == 2 and all("did not train" in line and "x" not in line for line in lines)


def test_the_paper_stands_beside_what_was_measured():
    table = compare(
        "title", BASELINE, [result("BN-x5", [0.9] * 4, [0.9] * 4, [0.9] * 4)], 10, PAPER
    )
    (line,) = (line for line in printed(table).splitlines() if line.lstrip().startswith("BN-x5"))
    assert line.rstrip().endswith("14.8x 73.0%") and "the paper's" in printed(table)
    assert table["reported"] == PAPER and "paper" not in printed(compare("", BASELINE, [], 10))


def test_the_better_rate_of_each_depth_is_shown():
    low, high = result("plain", [0.2, 0.5], rate=0.5), result("plain", [0.3, 0.9], rate=3.0)
    best = Depth(4, [low, high], [high, low]).best
    assert best["plain"] is high and best["batch norm"] is high
    console = Console(width=80)
    with console.capture() as capture:
        console.print(depths_table([Depth(4, [low], [low, high])], 20))
    assert [cell for cell in capture.get().split() if "%" in cell][:2] == ["50.0%", "90.0%"]


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "results.json"
    report.write_json(path, {"a": 1, "diverged": math.nan})
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1, "diverged": None}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_defaults_and_sweep():
    options = parse(["--sweep", "1/2,4", "8", "--steps", "80"])
    assert options.sweep == [0.5, 1, 4, 8] and options.depth == 3 and options.steps == 80
    assert options.depths == [2, 3, 4, 6, 12] and parse(["--network", "inception"]).depths == []
    assert parse(["--depths", "6", "2", "6"]).depths == [2, 6] and parse(["--depths"]).depths == []
    # A fortieth of the default budget of 8,000, and as many evaluations.
    assert 1 <= options.eval_every <= 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "-3"], "--steps: expected a positive integer, got '-3'"),
        (["--learning-rate", "nan"], "--learning-rate: expected a positive number, got 'nan'"),
        (["--batch-size", "1"], "--batch-size: expected an integer above 1, got '1'"),
        (["--sweep", "1,x"], "--sweep: expected positive factors such as 1/3,1,3,10, got 'x'"),
        (["--data", "cars"], "--data: invalid choice: 'cars'"),
        (["--data", "mnist"], "--data mnist needs --data-dir"),
        (["--network", "inception", "--depth", "3"], "--depth is for --network mlp"),
        (["--network", "inception", "--depths", "3"], "--depths is for --network mlp"),
        (["--depths", "0"], "--depths: expected a positive integer, got '0'"),
    ],
)
def test_bad_values_get_one_line(capsys, arguments, says):
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and says in error and error.count("\n") == 1
