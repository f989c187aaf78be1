"""Studies: what is finished is kept, and shown."""

import json
import os
import signal
from argparse import Namespace

import pytest
from common import report
from common.arguments import Program
from common.interrupt import EXIT_STATUS, Interrupt
from common.study import Claim, Part, Study, conduct


class Squares(Study):
    name, source, caption = "squares", "Euclid", "What to see: squares."
    interrupted_at = None

    def parts(self):
        return {str(n): Part(2, lambda advance, n=n: self.square(n, advance)) for n in (2, 3)}

    def square(self, n, advance):
        advance(1, "half")
        if n == self.interrupted_at:
            os.kill(os.getpid(), signal.SIGINT)
        advance(1, "whole")
        return n * n

    def claims(self):
        return [Claim("of 2", "4", str(self.results["2"]))] if "2" in self.results else []

    def draw(self, path):
        with report.figure(path, "Squares", self.caption) as grid:
            grid[0, 0].plot(list(map(int, self.results)), list(self.results.values()))


def run(study):
    with Interrupt() as interrupt:
        return conduct(study, interrupt)


@pytest.mark.slow
def test_all_parts_are_run_and_left_behind(tmp_path, capsys):
    assert run(Squares(Namespace(out=tmp_path / "new", steps=2))) == 0
    content = json.loads((tmp_path / "new" / "squares.json").read_text())
    assert content["status"] == "finished" and content["results"] == {"2": 4, "3": 9}
    assert content["claims"] == [{"what": "of 2", "reported": "4", "measured": "4"}]
    assert (
        content["config"] == {"out": str(tmp_path / "new"), "steps": 2}
        and content["source"] == "Euclid"
    )
    assert (tmp_path / "new" / "squares.png").stat().st_size > 0
    assert "Reported by Euclid" in capsys.readouterr().out


@pytest.mark.parametrize(("at", "left"), [(3, {"2": 4}), (2, {})])
def test_ctrl_c_leaves_what_is_finished(tmp_path, capsys, at, left):
    study = Squares(Namespace(out=tmp_path))
    study.interrupted_at = at
    assert run(study) == EXIT_STATUS
    content = json.loads((tmp_path / "squares.json").read_text())
    assert content["status"] == "interrupted" and content["results"] == left
    assert (tmp_path / "squares.png").exists() == bool(left)
    assert f"Interrupted: {len(left)} of 2 runs are finished" in capsys.readouterr().out


DEFAULTS = {
    "digits": {"steps": 10, "learning_rate": 0.1},
    "mnist": {"steps": 20, "learning_rate": 0.2},
}


@pytest.mark.parametrize(
    ("arguments", "steps", "rate"),
    [([], 10, 0.1), (["--data", "mnist", "--data-dir", ".", "--steps", "5"], 5, 0.2)],
)
def test_defaults_are_those_of_the_data(arguments, steps, rate):
    program = Program("squares.study:Squares", "description")
    program.add_runs(DEFAULTS)
    options = program.parse(arguments)
    assert (options.steps, options.learning_rate) == (steps, rate)
    assert options.out.parts == ("results", "squares")
