# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/gpu.py` measures, and how."""
