"""Eight CPU devices, strict promotion and bounded hypothesis: settled before JAX's backend starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest

DEVICES = int(os.environ.get("NORMJAX_TEST_DEVICES", "8"))

jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile(
    "normjax",
    deadline=None,
    max_examples=25,
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("normjax")


# Beside the tests that are marked, `make test-fast` leaves out those that check against others, or
# train, and examples.
THOROUGH = {
    "test_accumulate.py",
    "test_activated_batch_norm.py",
    "test_adversarial_pairs.py",
    "test_batch_norm_ghosts.py",
    "test_batch_norm_gradients.py",
    "test_batch_norm_masks.py",
    "test_batch_norm_torch.py",
    "test_batch_variance.py",
    "test_checkpoints.py",
    "test_conditional.py",
    "test_contrastive.py",
    "test_covariate_shift.py",
    "test_cross_batch_attention.py",
    "test_domains.py",
    "test_equilibrium.py",
    "test_export.py",
    "test_family.py",
    "test_family_reference.py",
    "test_family_torch.py",
    "test_flax.py",
    "test_fold.py",
    "test_fold_batch_norm.py",
    "test_fold_kept.py",
    "test_freezing.py",
    "test_golden.py",
    "test_haiku.py",
    "test_hessian.py",
    "test_identities.py",
    "test_interactions.py",
    "test_invariance.py",
    "test_keras.py",
    "test_kinds.py",
    "test_landscape.py",
    "test_leakage.py",
    "test_lint.py",
    "test_lint_examples.py",
    "test_lint_networks.py",
    "test_networks.py",
    "test_new_layers.py",
    "test_onnx_conformance.py",
    "test_percentiles.py",
    "test_programs.py",
    "test_project.py",
    "test_quantize.py",
    "test_recalibrate.py",
    "test_recalibrate_errors.py",
    "test_recalibrate_models.py",
    "test_recalibrate_networks.py",
    "test_recurrent.py",
    "test_remat_policy.py",
    "test_renormalize.py",
    "test_report.py",
    "test_report_command.py",
    "test_report_gap.py",
    "test_report_replicas.py",
    "test_rotation.py",
    "test_scale_invariance.py",
    "test_small_batch.py",
    "test_speedup.py",
    "test_sync_per_example.py",
    "test_torch.py",
    "test_train_resnet.py",
    "test_train_resnet_parts.py",
    "test_transformations.py",
    "test_types.py",
    "test_units.py",
    "test_weights.py",
    "test_without_batch.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in THOROUGH:
            item.add_marker(pytest.mark.slow)


def pytest_sessionstart(session: pytest.Session) -> None:
    if len(jax.devices()) < DEVICES:
        pytest.exit(f"{DEVICES} devices are needed, and {jax.devices()} are there", returncode=1)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Names of settings and dtypes without addresses, the same in every process."""
    if isinstance(val, dict):
        return (
            ",".join(f"{name}={getattr(value, '__name__', value)}" for name, value in val.items())
            or "defaults"
        )
    return val.__name__ if isinstance(val, type) or type(val) is type(jax.numpy.float32) else None


@pytest.fixture
def rng():
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def without_optimizations():
    """Compiles what a module of tests compiles without optimizing it, in two thirds of the time.

    For tests of what a program does, not of what XLA makes of it.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def promotion_as_in_flax():
    """JAX's standard promotion: Flax's layers mix bfloat16 and float32 by way of it, and so do the doors' dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
