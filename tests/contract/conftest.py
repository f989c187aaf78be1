"""The tests of one case follow each other, so that a program is compiled in one process alone."""

import pytest

from tests.contract.cases import Case


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    places = [place for place, item in enumerate(items) if _case(item) is not None]
    in_order = sorted((items[place] for place in places), key=_file_and_case)
    for place, item in zip(places, in_order, strict=True):
        items[place] = item


def _file_and_case(item):
    return str(item.path), repr(_case(item))


def _case(item):
    """The case that an item is for; None for items of other files, which the hook sees, too."""
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case if isinstance(case, Case) else None
