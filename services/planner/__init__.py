"""The planner: how many workers of which kind a load needs, found by simulating the services."""
