"""The planner: demand and events in, plans out. The runtime and the simulator drive this one object."""
