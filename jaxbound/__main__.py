"""`python -m jaxbound` is the command `jaxbound`."""

from jaxbound.cli.main import run

if __name__ == "__main__":
    run()
