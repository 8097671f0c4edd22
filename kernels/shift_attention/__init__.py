# SPDX-License-Identifier: Apache-2.0
"""ShiftAddViT's attention with binary queries and keys: matrix products become masked additions."""
