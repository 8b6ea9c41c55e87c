"""The leading directions of ΔW = sum_k s_k B_k diag(w_k) A_k, by several routes and one answer.

- `gram`: through the Gram matrices of the stacked factors, while their total rank S is small.
- `factored`: subspace iteration on the stacked factors, nothing S × S or out × in.
- `dense`: ΔW summed once, term by term, then subspace iteration on it: from where S comes near
  the smaller side.
- `qr`: `lowrank.orthogonalize` and `lowrank.svd`, QR in float64: slower, and right for any input.

`cost.choose` says which. The others give a `Leading` with its measured residual, or raise
`Unresolved`; the caller then takes `qr`.
"""
