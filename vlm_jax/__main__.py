"""Runs `vlm-jax COMMAND ...` like `python -m vlm_jax.COMMAND ...`; `--help` and wrong flags answer at once."""

import os
import signal
import sys


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)  # until `command.run`; nothing is lost
    import platform
    from importlib.metadata import version

    from vlm_jax import __version__, command
    from vlm_jax.command import help_page
    from vlm_jax.command.commands import COMMANDS
    from vlm_jax.errors import near

    name = sys.argv[1] if len(sys.argv) > 1 else "help"
    if name in ("help", "--help", "-h"):
        return command.show(help_page.overview())
    if name == "--version":
        return command.show(f"vlm_jax {__version__}, jax {version('jax')}, Python {platform.python_version()}")
    if name not in COMMANDS:
        hint = near(name, COMMANDS, f"expected one of: {', '.join(COMMANDS)}")
        print(f"error: vlm-jax has no command `{name}`; {hint}", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a config file can import its neighbours
    del sys.argv[1]
    command.run(name)


def _leave(*_) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
