"""Runs a command's main: flags parsed by absl, and what a user can mend said in one line."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from vlm_jax.errors import UserError, mendable


def run(main: Callable[[Sequence[str]], None], several_hosts: bool = False, preemptible: bool = False) -> None:
    """`absl.app.run(main)`, with errors of flags, config files and users as one line on stderr and exit status 2.

    Args:
      main: is given what is left of the arguments.
      several_hosts: adds the flag `--distributed`; main then runs with the other processes there.
      preemptible: main asks `processes.StopSignal` whether to stop.
    """
    if several_hosts:
        flags.DEFINE_string("distributed", None, "On several hosts: auto, or address:port,processes,index")

    def quiet_main(argv):
        try:
            if several_hosts:
                from vlm_jax import processes  # which imports jax

                with processes.joined(flags.FLAGS.distributed, preemptible):
                    main(argv)
            else:
                main(argv)
        except Exception as error:
            if not mendable(error):
                raise
            _fail(mendable(error))

    # orbax tells of every step of a save, and of what it raises, too; --verbosity=0 shows it
    logging.set_verbosity(logging.WARNING)
    shown = lambda record: "orbax" not in record.pathname or logging.get_verbosity() >= logging.INFO
    logging.get_absl_logger().addFilter(shown)
    app.run(quiet_main, flags_parser=_parse)


def read_config(flag: flags.FlagHolder) -> dict:
    """The config of a `config_flags` flag; absl keeps the error of a file that is not there until it is used."""
    try:
        return flag.value.to_dict()
    except OSError as error:
        raise UserError(f"--{flag.name}: {str(error).splitlines()[-1].strip()}") from error


def _parse(argv: Sequence[str]) -> Sequence[str]:
    try:
        return flags.FLAGS(list(argv))
    except (UserError, flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, KeyError | AttributeError):  # an override of what the config does not hold
            message = str(error.args[0]).replace("\\n", "; ").replace("\n", "; ")
            message = "the config has no key " + message.translate(str.maketrans("", "", "\"'\\"))
        elif "Traceback" in message:  # of a config file; its last line is what went wrong
            lines = [line.strip() for line in message.splitlines() if line.strip()]
            message = f"{lines[0]} {lines[-1]}"
        _fail(message)


def _fail(error: object) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
