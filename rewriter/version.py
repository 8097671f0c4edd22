# SPDX-License-Identifier: Apache-2.0
"""The package's version, read by the build and stamped into every saved file."""

__version__ = "0.1.0"
