"""The programs of the study: grids of runs, and what S2SD does in them."""
