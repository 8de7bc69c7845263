"""The console command, also as `python -m sleeptrain`. A run listens to signals before anything is loaded."""

import signal
import sys

from sleeptrain.stop import SIGNALS, StopRequest, is_main, listen


def main() -> int:
    """`sleeptrain.cli.main`, in a process that is all its own."""
    trains = sys.argv[1:2] == ["train"]
    if trains:
        listen(StopRequest(says=is_main()))
    from sleeptrain import cli, terminal

    sys.excepthook = terminal.show_traceback

    code = cli.main()
    if trains:
        for number in SIGNALS:  # the exit code is known: the interpreter must not be killed on its way out
            signal.signal(number, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(main())
