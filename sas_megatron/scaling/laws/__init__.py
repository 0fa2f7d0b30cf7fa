"""Scaling laws of the loss: L(N, D) = E + A/N^α + B/D^β and related laws, with their uncertainty.

In order of imports: `log_sum` (the optimizer), `projection` (its starting points), `sum_of_powers` (the
problem of every law), `points` and their bootstrap (`resampling`), tables of points (`table_formats`,
`point_table`); the laws (`loss_surface`, `power_law`, `isoflop`); their uncertainty (`profile`, `hold_out`);
and the complete fit of one table of runs (`law_fit`, `law_record`).
"""
