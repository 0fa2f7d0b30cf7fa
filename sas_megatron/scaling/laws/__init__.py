"""Laws of loss: L(N, D) = E + A/N^α + B/D^β and its kin, fitted, with what is uncertain about them.

From the bottom: `log_sum` (the optimizer), `projection` (where it starts), `sum_of_powers` (one problem for
every law here), `points`; the laws (`loss_surface`, `power_law`, `isoflop`); what is uncertain (`resampling`,
`profile`, `hold_out`, `shared_irreducible`); and all of it for one table of runs (`fit_report`).
"""
