"""Nothing about data may hang: a test that lasts too long prints where every thread stands and ends the run."""

import faulthandler

import pytest

SECONDS = 240


@pytest.fixture(autouse=True)
def _watchdog():
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
