"""`python -m skyrl_otel` is the command `skyrl-otel`."""

from skyrl_otel.cli.main import main

if __name__ == "__main__":
    main()
