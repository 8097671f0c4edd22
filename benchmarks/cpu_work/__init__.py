# SPDX-License-Identifier: Apache-2.0
"""The work `benchmarks/cpu.py` times, one file per family."""
