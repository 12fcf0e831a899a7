"""The options of the limits of raw data."""

import inspect

import pytest

from cachefuse.errors import ConfigError
from cachefuse.limits import UNTRUSTED, Limits, limits
from cachefuse.registry import import_entry
from cachefuse_cli.shared.limit_options import OPTIONS, parse_limits, parse_size, reads_raw_data
from fixtures.messages import naming

COMMANDS = ("extract", "plan", "predict", "retrieve", "zero_shot", "verify", "report", "pairs")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_reads_raw_data_has_them(name):
    command = import_entry(f"cachefuse_cli.commands.{name}:{name}")
    assert OPTIONS.keys() <= inspect.signature(command).parameters.keys()


def test_limits_hold_while_a_command_runs():
    seen = []

    @reads_raw_data
    def command(name: str = ""):
        seen.append((name, limits()))

    command(name="a", memory="2GB", max_text_bytes="1KiB", untrusted=True)
    assert seen[0][0] == "a"
    assert (seen[0][1].memory, seen[0][1].text_bytes, seen[0][1].outside_links) == (2 * 10**9, 1024, False)
    assert limits() == Limits()


def test_a_size_goes_before_that_of_untrusted():
    assert parse_limits(None, None, True) == UNTRUSTED
    assert parse_limits(None, "2MB", True).text_bytes == 2_000_000


@pytest.mark.parametrize(("text", "n_bytes"), [("7", 7), ("1.5GB", 1_500_000_000), ("2 mib", 2 << 20), ("3K", 3000)])
def test_sizes(text, n_bytes):
    assert parse_size("--memory", text) == n_bytes


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "1e9", "1PB", "nan", "9" * 400])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match=naming("--memory")):
        parse_size("--memory", text)
