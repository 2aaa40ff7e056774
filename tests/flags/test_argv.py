"""Words of command lines in every form that users type them."""

import pytest

from megatron_long.errors import ConfigError
from megatron_long.flags.argv import Argv


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("", None),
        ("--other 1", None),
        ("--flag 1", "1"),
        ("--flag=1", "1"),
        ("--flag 1 --flag=2", "2"),
        ("--flag=2 --other 1 --flag 1", "1"),
        ("--flag -1", "-1"),
        ("--flag -1e-5", "-1e-5"),
        ("--flag=-.5", "-.5"),
        ("--flag a=b", "a=b"),
        ("--flag=a=b", "a=b"),
        ("--flag=", ""),
        ("--flag", ""),
        ("--flag --other", ""),
        ("--flag 1 --flag", ""),
        ("--flags 1 --flag-name 2 --fla 3", None),
        ("x --flag - y", "-"),
    ],
)
def test_value(line, value):
    argv = Argv(line.split())
    assert argv.value("--flag") == value
    assert argv.given("--flag") is (value is not None)


def test_values_run_to_the_next_flag():
    argv = Argv("--sizes 2 4 -1 --bf16 --sizes=8 16 -m x".split())
    assert argv.values("--sizes") == ("8", "16")
    assert argv.values("-m") == ("x",)
    assert argv.values("--bf16") == ()
    assert argv.values("--fp16") is None


def test_a_value_with_spaces_or_lines_is_no_flag():
    argv = Argv(["--prompt", "--not a flag", "--text=a\n--lr 1", "--lr", "2"])
    assert argv.value("--prompt") == "--not a flag"
    assert argv.value("--text") == "a\n--lr 1"
    assert argv.value("--lr") == "2"


def test_parts_put_together_are_the_whole():
    argv = Argv("a --x 1 2 --y=3 --z --x 4".split())
    assert sorted([*argv.only("--x"), *argv.without("--x")]) == sorted(argv)
    assert argv.only("--x") == ("--x", "1", "2", "--x", "4")
    assert argv.without("--y", "--z", "--absent") == ("a", "--x", "1", "2", "--x", "4")
    assert [word for group in argv.groups() for word in group] == list(argv)


def test_a_replaced_flag_stands_once():
    assert Argv("--x=1 --y 2 --x 3".split()).replaced("--x", 4) == ("--y", "2", "--x", "4")


def test_words_before_another():
    assert Argv("--a 1 -m x --b".split()).before("-m") == ("--a", "1")
    assert Argv("--a 1".split()).before("-m") == ("--a", "1")


def test_a_value_of_another_type_is_refused_by_name():
    argv = Argv("--steps 3 --rate x --empty".split())
    assert argv.parsed("--steps", int) == 3
    assert argv.parsed("--absent", int) is None
    for flag in ("--rate", "--empty"):
        with pytest.raises(ConfigError, match=f"argument {flag}: .* `--help` lists the flags"):
            argv.parsed(flag, float)
