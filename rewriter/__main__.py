# SPDX-License-Identifier: Apache-2.0
"""``python -m rewriter``: the command line."""

from rewriter.cli.app import main

if __name__ == "__main__":
    main()
