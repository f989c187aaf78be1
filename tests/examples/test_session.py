import os
import signal

import pytest
from common.data import DataError
from common.interrupt import EXIT_STATUS, Interrupt
from common.session import guard, train_all
from rich.console import Console


def train(seed, evaluated, pressed=()):
    for step in (1, 2):
        if (seed, step) in pressed:
            os.kill(os.getpid(), signal.SIGINT)
        evaluated(1, 0.5)
    return seed


def test_all_is_trained_in_turn():
    finished = {}
    with Interrupt() as interrupt:
        variants = {"a": train, "b": train}
        assert train_all(variants, 2, 2, interrupt, Console(quiet=True), finished.__setitem__)
    assert finished == {"a": [0, 1], "b": [0, 1]}


def test_ctrl_c_keeps_what_is_finished():
    finished = {}

    def interrupted(seed, evaluated):
        return train(seed, evaluated, pressed={(1, 1)})

    with Interrupt() as interrupt:
        variants = {"a": train, "b": interrupted, "c": train}
        assert not train_all(variants, 2, 2, interrupt, Console(quiet=True), finished.__setitem__)
    assert finished == {"a": [0, 1]}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (DataError("file: empty"), "file: empty"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
    ],
)
def test_mistakes_get_one_line(error, says, tmp_path, capsys):
    def work():
        raise error

    assert guard("program.py", tmp_path, work) == 1
    assert capsys.readouterr().err == f"program.py: error: {says}\n"
    assert guard("program.py", tmp_path, lambda: False) == EXIT_STATUS
    assert guard("program.py", tmp_path, lambda: True) == 0
