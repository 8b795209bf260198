"""CPU kernels in numba: paged attention, matrix-vector products and the small fused operations between them."""
