"""The entry point of `growjax COMMAND` and of `python -m growjax COMMAND`."""

import sys

from growjax.errors import ExtraError


try:
    from growjax.cli import main
except ExtraError as error:
    sys.exit(f"growjax: {error}")

if __name__ == "__main__":
    main()
