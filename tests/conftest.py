"""What holds for the whole suite: how Hypothesis picks examples (the same every time, none by a clock), and which files are quick."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")
QUICK = ["bad_files", "names", "rules", "samplers", "schedule", "switching", "tiles", "tokenizers"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest -m quick`: the files that make no whole picture."""
    for item in items:
        if item.path.stem.removeprefix("test_") in QUICK:
            item.add_marker("quick")
