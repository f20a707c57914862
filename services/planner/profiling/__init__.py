"""`triptych profile`: how long steps and hops take on this machine, for the planner."""
