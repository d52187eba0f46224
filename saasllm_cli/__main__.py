"""The program: `saasllm`, and `python -m saasllm_cli`."""

import gc
import sys


def main() -> None:
    """Runs the command line and exits with its status."""
    gc.disable()  # until the command is loaded: all that is made until then stays
    try:
        from saasllm_cli.cli import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # also while all this is loaded
        status = 130
    finally:
        gc.freeze()  # at its end Python looks through all that was made, for a quarter of a short command's time
    sys.exit(status)


if __name__ == "__main__":
    main()
