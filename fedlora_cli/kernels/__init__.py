"""The leading directions of ΔW = sum_k s_k B_k diag(w_k) A_k, by four routes with the same result.

README.md describes the routes, and `routes.ROUTES` is their table. Every route but `qr` measures
its residual, and raises `Unresolved` if it is too large; the caller then takes `qr`.
"""
