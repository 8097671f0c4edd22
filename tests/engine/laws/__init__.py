# SPDX-License-Identifier: Apache-2.0
"""Laws of the matcher and of the engine, on random graphs with random patterns."""
