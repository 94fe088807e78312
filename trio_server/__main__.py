"""``python -m trio_server``: run the command."""

from trio_server.command import main

if __name__ == "__main__":
    raise SystemExit(main())
