"""`python -m onebase`: the same as the command `onebase`."""

from onebase.cli.main import main

if __name__ == "__main__":
    main()
