"""`python -m server` is `flowcontrol`."""

from server.cli import main

if __name__ == "__main__":
    main()
