"""Scaling laws of the loss: L(N, D) = E + A/N^α + B/D^β and related laws, with their uncertainty.

In order of imports: `log_sum` (the optimizer), `projection` (its starting points), `sum_of_powers` (the
problem of every law), `points`; the laws (`loss_surface`, `power_law`, `isoflop`); their uncertainty
(`resampling`, `profile`, `hold_out`); and the complete fit of one table of runs
(`law_fit`).
"""
