"""The leading directions of ΔW = sum_k s_k B_k diag(w_k) A_k, by four routes with the same result.

- `gram`: from the Gram matrices of the concatenated factors. Fast if their total rank S is small.
- `factored`: subspace iteration by products with the factors. Forms nothing S × S or out × in.
- `dense`: sum of ΔW term by term, then subspace iteration. For S near or above the smaller side.
- `qr`: QR and SVD in float64. Slower, but right for any input.

`routes.ROUTES` is the table of routes: `ROUTES[name](total, rank, dtype)` returns `Decomposed`.
Every route but `qr` measures its residual, and raises `Unresolved` if it is too large; the caller
then takes `qr`. `cost.choose` chooses a route from sizes alone.
"""
