"""The tests of one case follow each other, so that a program is compiled in one process alone."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    places = [place for place, item in enumerate(items) if "case" in _parameters(item)]
    by_case = sorted((items[place] for place in places), key=_case)
    for place, item in zip(places, by_case, strict=True):
        items[place] = item


def _case(item):
    return str(item.path), str(_parameters(item)["case"])


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}
