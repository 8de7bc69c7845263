"""Control sequences are shown, not sent to the terminal. Secrets of a URL are not shown."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import unicodedata

import pytest

from sleeptrain import terminal
from sleeptrain.cli import main
from sleeptrain.errors import ConfigError, format_error
from tests.hostile import HOSTILE, SURROGATE, is_harmless

# Invisible, but a part of text: joiners of scripts and emoji, and signs with a meaning.
SHOWN_FORMATS = {0x200C, 0x200D, *range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2}


def test_no_control_character_is_printed() -> None:
    for code in range(0x20000):
        category = unicodedata.category(chr(code))
        found = terminal.printable(chr(code))
        if category in ("Cc", "Cs", "Zl", "Zp") and chr(code) not in "\n\t":
            assert found.isascii() and found.startswith("\\"), hex(code)
        elif category == "Cf" and code < 0x10000 and code not in SHOWN_FORMATS:
            assert found.isascii(), hex(code)
        elif category[0] in "LMNPS":
            assert found == chr(code), hex(code)
    assert terminal.printable("\u202e\u2067\x1b\x9b\ud800") == "\\u202e\\u2067\\x1b\\x9b\\ud800"
    assert terminal.printable("naïve 日 👩‍👩‍👧 \n\t") == "naïve 日 👩‍👩‍👧 \n\t"
    assert terminal.printable("two\nlines", keep="") == "two\\nlines"


def test_credentials_are_left_out() -> None:
    hidden = terminal.hide_credentials
    assert hidden("s3://key:secret@bucket/a@b") == "s3://***@bucket/a@b"
    assert hidden("ftp://me:p@ss@host/a") == "ftp://***@host/a"
    assert hidden("pipe:curl 'https://u:p@h/x' -o -") == "pipe:curl 'https://***@h/x' -o -"
    assert hidden("https://h/x.tar?X-Amz-Signature=abc&part=1") == "https://h/x.tar?X-Amz-Signature=***&part=1"
    assert hidden("write to a@b or https://h/me@here") == "write to a@b or https://h/me@here"


def test_errors_and_logs_are_harmless(caplog: pytest.LogCaptureFixture) -> None:
    error = ConfigError(f"{HOSTILE}: no such file\nsecond", [f"{HOSTILE}\nsleeptrain: all is well", "https://u:p@h"])
    shown = format_error(error)
    assert is_harmless(shown) and len(shown.splitlines()) == 3 and "u:p" not in shown
    with caplog.at_level(logging.WARNING):
        terminal.log_printable("sleeptrain.some").warning("%s is odd: https://u:p@h", SURROGATE)
    assert is_harmless(caplog.messages[0]) and "u:p" not in caplog.messages[0]


def test_a_traceback_is_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise RuntimeError(HOSTILE)
    except RuntimeError as error:
        terminal.show_traceback(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    assert "Traceback" in err and "\\x1b" in err and is_harmless(err)


def test_json_is_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say_json('{"\x7f": "\\u001b"}')
    assert capsys.readouterr().out == '{"\x7f": "\\u001b"}\n'


def test_a_stream_may_be_named() -> None:
    stream = io.StringIO()
    terminal.say(f"a{HOSTILE}", stream, end="")
    assert stream.getvalue().startswith("a\\x1b]0;owned\\x07") and is_harmless(stream.getvalue())


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", HOSTILE],
        ["evaluate", HOSTILE, HOSTILE],
        ["data", "which", HOSTILE, "--step", "1"],
        ["report", HOSTILE],
        ["report", ".", "--out", f"pyproject.toml{HOSTILE}"],
        ["convert", "export", HOSTILE, "out"],
        ["convert", "import", HOSTILE, "out"],
        ["generate", HOSTILE, "--prompt", "a"],
        ["doctor", "--skip", HOSTILE],
        ["doctor", f"run.name={HOSTILE}"],
        ["train", f"experiment={HOSTILE}"],
        ["plan", "experiment=stdlib", f"optim.{HOSTILE}=1"],
        [HOSTILE],
    ],
    ids=lambda arguments: " ".join(arguments[:2]).partition("\x1b")[0],
)
def test_each_command_shows_hostile_names_harmlessly(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([word.replace("\x00", "") for word in arguments]) == 2
    out, err = capfd.readouterr()
    assert is_harmless(out) and is_harmless(err) and err


def test_an_unexpected_error_of_a_command_is_harmless() -> None:
    code = (
        "import sys; from sleeptrain import __main__, cli\n"
        "def fail(arguments=None): raise RuntimeError('\\x1b[31m')\n"
        "cli.main = fail; sys.argv = ['sleeptrain', 'report']; __main__.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "\\x1b[31m" in done.stderr and is_harmless(done.stderr)
