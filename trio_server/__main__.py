"""``python -m trio_server``: run the command."""

import sys

from trio_server.command import main

if __name__ == "__main__":
    sys.exit(main())
