"""``python -m corolla`` is the command line."""

from corolla.cli import main

if __name__ == "__main__":
    main()
