"""Text that goes into one line of a message or a table."""

import pytest

from triscale.text import first_line, printable


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError(), "ValueError"),  # a message of its own would be none at all
        (KeyError("a\nb"), "'a\\nb'"),
        (RuntimeError("\n  PassManager::run failed\nin full"), "PassManager::run failed"),
        (OSError(28, "No space left on device", "x"), "[Errno 28] No space left on device: 'x'"),
        (RuntimeError("x" * 500), "x" * 200),
    ],
)
def test_the_first_line_of_an_error_is_never_empty_nor_long(error, said):
    assert first_line(error) == said


def test_what_would_steer_a_terminal_is_written_out():
    assert printable("a\x1b[31mb\nü") == "a\\x1b[31mb\\nü"
