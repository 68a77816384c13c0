"""The teacher: AnyText2's networks, its encoders, and the solver of its ODE."""
