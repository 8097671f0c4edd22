# SPDX-License-Identifier: Apache-2.0
"""One module per matcher that `benchmarks/engine.py` measures, all on the graphs of `workload`."""
