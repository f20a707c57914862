"""`triptych role`: who hosts which stages, and the change of it."""
