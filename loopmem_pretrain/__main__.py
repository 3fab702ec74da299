"""`python -m loopmem_pretrain` is `loopmem`."""

import sys

from loopmem_pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
