"""`lint` sees through what layers compute on one device: sums around the mean of a sample."""

import pytest

from tests.layers.test_programs import in_process


@pytest.mark.slow
def test_cancelled_biases_are_found_on_one_device():
    tests = "tests/diagnostics/test_lint_networks.py"
    chosen = "test_a_bias_is_found_if_and_only_if_its_gradient_is_zero"
    arguments = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", tests, "-k", chosen)
    done = in_process(1, *arguments)
    assert " passed" in done and "failed" not in done
