"""The console command, also as `python -m sleeptrain`. `train` handles signals before it imports torch."""

import signal
import sys

from sleeptrain.stop import SIGNALS, StopRequest, is_main, listen


def main() -> int:
    """Run `sleeptrain.cli.main` with this process's signal handlers and exception hook."""
    trains = sys.argv[1:2] == ["train"]
    if trains:
        listen(StopRequest(says=is_main()))
    from sleeptrain import cli, terminal

    sys.excepthook = terminal.show_traceback

    code = cli.main()
    if trains:
        for number in SIGNALS:  # the exit code is known: no signal may kill the interpreter while it shuts down
            signal.signal(number, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(main())
