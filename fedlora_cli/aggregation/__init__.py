"""One method on one cohort: what is chosen, who counts how much, and one module of the sum."""
