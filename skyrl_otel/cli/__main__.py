"""``python -m skyrl_otel.cli``: the command where no script is on the PATH."""

from skyrl_otel.cli.main import main

if __name__ == "__main__":
    main()
