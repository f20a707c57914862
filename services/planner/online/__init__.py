"""`triptych planner`: watches a running system and moves workers to the stages that need them."""
